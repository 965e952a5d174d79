"""Purge, and the state of the queues by priority. Each function takes a connection."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    Select,
    Table,
    Text,
    TextClause,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.tasks import TaskStatus
from store.tables import task_events, task_exceptions, tasks, training_log
from store.unsettled import still_looked_at

PURGED_AT_ONCE: Final = 20
LINES_AT_ONCE: Final = 5_000
"""Rows of log and events. A statement may take 1.5 s, and a long training has hundreds of thousands of them."""


class Purged(OwnModel):
    """What one step of a purge deleted. `is_done`: nothing is left to delete."""

    tasks: int
    is_done: bool


class QueueState(OwnModel):
    """The queue of one priority. `oldest_seconds`: how long the oldest queued task has waited; 0 if there is none."""

    priority: TaskPriority
    queued: int = 0
    oldest_seconds: float = 0.0
    sla_missed: int = 0
    """Tasks that were queued for longer than promised (contract §6), in the last 24 hours."""


def _some_of(table: Table) -> Delete:
    """Deletes at most 5,000 lines of some tasks."""
    place: ColumnElement[Any] = literal_column("ctid")
    some = select(place).select_from(table).where(table.c.task_id == any_(bindparam("ids", type_=ARRAY(Text))))
    return delete(table).where(place == any_(func.array(some.limit(LINES_AT_ONCE).scalar_subquery())))


ALIVE: Final[TextClause] = text("SELECT 1")
_ENDED_BEFORE: Final = (
    select(tasks.c.task_id)
    .where(tasks.c.ended_at < bindparam("before"), ~still_looked_at())
    .order_by(tasks.c.ended_at)
    .limit(PURGED_AT_ONCE)
    .with_for_update(skip_locked=True)
)
_DELETE_TASKS: Final = delete(tasks).where(tasks.c.task_id == any_(bindparam("ids", type_=ARRAY(Text))))
_DELETE_LINES: Final = tuple(_some_of(table) for table in (training_log, task_events))
# The literal, not a parameter: only then does the planner use the partial index.
_QUEUED: Final[Select[Any]] = (
    select(
        tasks.c.priority,
        func.count().label("queued"),
        func.extract("epoch", func.now() - func.min(tasks.c.created_at)).label("oldest_seconds"),
    )
    .where(text(f"tasks.status = '{TaskStatus.QUEUED.value}'"))
    .group_by(tasks.c.priority)
)
_MISSED: Final[Select[Any]] = (
    select(tasks.c.priority, func.count().label("missed"))
    .join(task_exceptions, task_exceptions.c.task_id == tasks.c.task_id)
    .where(
        task_exceptions.c.code == ExceptionCode.QUEUE_SLA_MISSED.value,
        task_exceptions.c.ts > func.now() - timedelta(hours=24),
    )
    .group_by(tasks.c.priority)
)


async def purge(connection: AsyncConnection, before: datetime) -> Purged:
    """Delete some tasks that ended before a time: their lines first, then the tasks. The claims of their ids are kept.

    A task whose settlement is unknown is kept while its ledger is still checked.
    """
    ids = (await connection.scalars(_ENDED_BEFORE, {"before": before})).all()
    if not ids:
        return Purged(tasks=0, is_done=True)
    for statement in _DELETE_LINES:
        if (await connection.execute(statement, {"ids": ids})).rowcount == LINES_AT_ONCE:
            return Purged(tasks=0, is_done=False)
    await connection.execute(_DELETE_TASKS, {"ids": ids})
    return Purged(tasks=len(ids), is_done=False)


async def queue_states(connection: AsyncConnection) -> list[QueueState]:
    states = {priority: QueueState(priority=priority) for priority in TaskPriority}
    for row in await connection.execute(_QUEUED):
        state = states[TaskPriority(row.priority)]
        state.queued, state.oldest_seconds = row.queued, float(row.oldest_seconds)
    for row in await connection.execute(_MISSED):
        states[TaskPriority(row.priority)].sla_missed = row.missed
    return list(states.values())
