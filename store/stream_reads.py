"""What streams read: heads of tasks, and the events of many tasks together. Every function takes a connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import BigInteger, Row, Select, Text, any_, bindparam, column, func, or_, select, true, tuple_
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import TaskStatus
from store.reads import StoredEvent, credits_at_end, event_values
from store.tables import task_events, tasks

NEW_TASK_SECONDS: Final = 60
"""A task that is younger counts as recent, ended or not."""
_OPEN: Final = (TaskStatus.QUEUED, TaskStatus.RUNNING)


class TaskHead(OwnModel):
    """How far a task has come: `last_seq` is its newest event's. An ended task gets no further events."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    created_at: datetime
    last_seq: int
    has_ended: bool


_HEADS: Final[Select[*tuple[Any, ...]]] = select(
    tasks.c.task_id,
    tasks.c.tenant_id,
    tasks.c.user_id,
    tasks.c.scene,
    tasks.c.created_at,
    tasks.c.last_seq,
    tasks.c.ended_at,
)
_HEADS_OF: Final = _HEADS.where(tasks.c.task_id == any_(bindparam("ids", type_=ARRAY(Text))))
_RECENT_HEADS: Final = (
    _HEADS.where(
        tasks.c.tenant_id == bindparam("tenant"),
        or_(
            tasks.c.status.in_(_OPEN),
            tasks.c.created_at > func.now() - timedelta(seconds=NEW_TASK_SECONDS),
        ),
    )
    .order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc())
    .limit(bindparam("most"))
)
_OLDER_HEADS: Final = _RECENT_HEADS.where(
    tuple_(tasks.c.created_at, tasks.c.task_id) < tuple_(bindparam("created_at"), bindparam("task"))
)


def _events_of_each() -> Select[*tuple[Any, ...]]:
    wanted = (
        func.unnest(bindparam("ids", type_=ARRAY(Text)), bindparam("seqs", type_=ARRAY(BigInteger)))
        .table_valued(column("task_id", Text), column("seq", BigInteger))
        .render_derived("wanted")
    )
    newer = (
        select(task_events)
        .where(task_events.c.task_id == wanted.c.task_id, task_events.c.seq > wanted.c.seq)
        .order_by(task_events.c.seq)
        .limit(bindparam("most"))
        .lateral("newer")
    )
    return (
        select(newer, tasks.c.scene, credits_at_end(newer.c.event))
        .select_from(wanted.join(tasks, tasks.c.task_id == wanted.c.task_id).join(newer, true()))
        .order_by(newer.c.task_id, newer.c.seq)
    )


_EVENTS_OF_EACH: Final = _events_of_each()


async def heads(connection: AsyncConnection, task_ids: Sequence[str]) -> list[TaskHead]:
    """Of those tasks that exist, in no order."""
    return [_head(row) for row in await connection.execute(_HEADS_OF, {"ids": list(task_ids)})]


async def recent_heads(
    connection: AsyncConnection, tenant_id: str, *, older_than: TaskHead | None, limit: int
) -> list[TaskHead]:
    """A tenant's tasks that are open or were created within the last minute: the newest `limit`, or the next older."""
    statement, values = _RECENT_HEADS, {"tenant": tenant_id, "most": limit}
    if older_than is not None:
        statement = _OLDER_HEADS
        values |= {"created_at": older_than.created_at, "task": older_than.task_id}
    return [_head(row) for row in await connection.execute(statement, values)]


async def events_of_each(
    connection: AsyncConnection, positions: Mapping[str, int], *, limit_each: int
) -> list[StoredEvent]:
    """Events after each task's `seq`, at most `limit_each` of a task, in order of `seq` within each."""
    values = {"ids": list(positions), "seqs": list(positions.values()), "most": limit_each}
    rows = await connection.execute(_EVENTS_OF_EACH, values)
    return [StoredEvent.model_validate(event_values(row)) for row in rows]


def _head(row: Row[*tuple[Any, ...]]) -> TaskHead:
    values = dict(row._mapping)
    return TaskHead.model_validate({**values, "has_ended": values["ended_at"] is not None})
