"""Figures of the whole store for operators: open tasks, points, unknown settlements, exception records.

Each statement reads open rows or a bounded part of an index, never the table of all tasks.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, Literal

from sqlalchemy import BigInteger, ColumnElement, Select, case, cast, func, literal, select, text, true, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import SettlementState, TaskStatus
from store.tables import task_events, task_exceptions, tasks, unseen_tasks
from store.unsettled import LOOKED_AT_FOR

RECORDS_FOR: Final = timedelta(hours=24)
MAX_RECORDS: Final = 1_000
"""Records of one code are counted up to this many."""
MAX_HOLDS: Final = 1_000
"""The oldest hold is looked for among so many open tasks, the oldest first."""
Reading = Literal["hourly", "by_hand"]
"""Who reads an unknown settlement's ledger: the reconciler for a day after the task's end, then a person."""


class OpenTasks(OwnModel):
    """The open tasks of one scene and status, and the points that they hold."""

    scene: Scene
    status: TaskStatus
    tasks: int
    points_held: int


class Unsettled(OwnModel):
    """Ended tasks whose settlement is unknown, and the points that they held last."""

    read: Reading
    tasks: int = 0
    points: int = 0


class StoreFigures(OwnModel):
    """What `read` found. `oldest_hold_seconds` is 0 without a hold, `exceptions` has every code."""

    open: list[OpenTasks]
    oldest_hold_seconds: float
    unsettled: list[Unsettled]
    exceptions: dict[ExceptionCode, int]
    """Records of the last 24 hours."""
    not_looked_at: int
    """Open tasks whose run the reconciler could not read the last time."""


_HELD: Final = cast(tasks.c.credits["held"].astext, BigInteger)
_IS_OPEN: Final[ColumnElement[bool]] = tasks.c.credits["settlement"].astext == SettlementState.OPEN.value
_OPEN: Final = (
    select(
        tasks.c.scene,
        tasks.c.status,
        func.count().label("tasks"),
        func.coalesce(func.sum(_HELD).filter(_IS_OPEN), 0).label("points_held"),
    )
    .where(tasks.c.ended_at.is_(None))
    .group_by(tasks.c.scene, tasks.c.status)
)
_HOLDERS: Final = (
    select(tasks.c.task_id)
    .where(tasks.c.ended_at.is_(None), func.cardinality(tasks.c.hold_ids) > 0)
    .order_by(tasks.c.created_at, tasks.c.task_id)
    .limit(MAX_HOLDS)
    .subquery()
)
_NEWEST_HOLD: Final = (
    select(func.max(task_events.c.ts).label("at"))
    .where(task_events.c.task_id == _HOLDERS.c.task_id, task_events.c.credits_delta < 0)
    .lateral()
)
_OLDEST_HOLD: Final = select(func.extract("epoch", func.now() - func.min(_NEWEST_HOLD.c.at))).select_from(
    _HOLDERS.join(_NEWEST_HOLD, true())
)
_READING: Final = case((tasks.c.ended_at > func.now() - LOOKED_AT_FOR, "hourly"), else_="by_hand").label("read")
_UNSETTLED: Final = (
    select(_READING, func.count().label("tasks"), func.coalesce(func.sum(_HELD), 0).label("points"))
    .where(
        # The literal, not a parameter: only then does the planner use the partial index.
        text(f"tasks.credits ->> 'settlement' = '{SettlementState.UNKNOWN.value}'"),
        tasks.c.ended_at.is_not(None),
    )
    .group_by(_READING)
)


def _records_of(code: ExceptionCode) -> Select[str, int]:
    some = (
        select(task_exceptions.c.ts)
        .where(task_exceptions.c.code == code.value, task_exceptions.c.ts > func.now() - RECORDS_FOR)
        # In the order of the index, so that no plan walks through the table.
        .order_by(task_exceptions.c.ts.desc())
        .limit(MAX_RECORDS)
        .subquery()
    )
    return select(literal(code.value).label("code"), func.count().label("records")).select_from(some)


_EXCEPTIONS: Final = union_all(*(_records_of(code) for code in ExceptionCode))
_NOT_LOOKED_AT: Final = (
    select(func.count())
    .select_from(unseen_tasks.join(tasks, tasks.c.task_id == unseen_tasks.c.task_id))
    .where(tasks.c.ended_at.is_(None))
)


async def read(connection: AsyncConnection) -> StoreFigures:
    """The figures now."""
    unsettled: dict[str, Unsettled] = {"hourly": Unsettled(read="hourly"), "by_hand": Unsettled(read="by_hand")}
    for row in await connection.execute(_UNSETTLED):
        unsettled[row.read] = Unsettled.model_validate(dict(row._mapping))
    return StoreFigures(
        open=[OpenTasks.model_validate(dict(row._mapping)) for row in await connection.execute(_OPEN)],
        oldest_hold_seconds=float(await connection.scalar(_OLDEST_HOLD) or 0.0),
        unsettled=list(unsettled.values()),
        exceptions={row.code: row.records for row in await connection.execute(_EXCEPTIONS)},
        not_looked_at=await connection.scalar(_NOT_LOOKED_AT) or 0,
    )
