"""What keeps the store in shape and tells how it fares: purge, queue by priority. Each function takes a connection."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import Select, TextClause, bindparam, delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from contracts.comfyui import TaskPriority
from contracts.errors import ExceptionCode
from contracts.fields import OwnModel
from contracts.tasks import TaskStatus
from store.tables import task_exceptions, tasks

PURGED_AT_ONCE: Final = 500


class QueueState(OwnModel):
    """The queue of one priority. `oldest_seconds`: for how long the oldest queued task has stood; 0 without one."""

    priority: TaskPriority
    queued: int = 0
    oldest_seconds: float = 0.0
    sla_missed: int = 0
    """Tasks on record that were queued for longer than promised (contract §6)."""


ALIVE: Final[TextClause] = text("SELECT 1")
_ENDED_BEFORE: Final = (
    select(tasks.c.task_id)
    .where(tasks.c.ended_at < bindparam("before"))
    .order_by(tasks.c.ended_at)
    .limit(PURGED_AT_ONCE)
    .with_for_update(skip_locked=True)
)
_PURGE: Final = delete(tasks).where(tasks.c.task_id.in_(_ENDED_BEFORE))
# The literal, not a parameter: only then does the planner see that the partial index serves.
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
    .where(task_exceptions.c.code == ExceptionCode.QUEUE_SLA_MISSED.value)
    .group_by(tasks.c.priority)
)


async def purge(connection: AsyncConnection, before: datetime) -> int:
    """Delete at most 500 tasks that ended before an instant, with events, log and records; the claims of their ids
    stay. How many were deleted."""
    return (await connection.execute(_PURGE, {"before": before})).rowcount


async def queue_states(connection: AsyncConnection) -> list[QueueState]:
    states = {priority: QueueState(priority=priority) for priority in TaskPriority}
    for row in await connection.execute(_QUEUED):
        state = states[TaskPriority(row.priority)]
        state.queued, state.oldest_seconds = row.queued, float(row.oldest_seconds)
    for row in await connection.execute(_MISSED):
        states[TaskPriority(row.priority)].sla_missed = row.missed
    return list(states.values())
