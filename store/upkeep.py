"""Deletion of ended tasks and of tenants, and the state of the queues by priority. Each function takes a connection."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    Select,
    Table,
    Text,
    any_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.tasks import TaskStatus
from store.tables import (
    task_claims,
    task_events,
    task_exceptions,
    tasks,
    tenant_starts,
    tenant_streams,
    training_log,
)
from store.unsettled import still_looked_at

DELETED_AT_ONCE: Final = 20
SHOWN_IDS: Final = 5
LINES_AT_ONCE: Final = 5_000
"""Rows of log and events. A statement may take 1.5 s, and a long training has hundreds of thousands of them."""


class EndedTask(OwnModel):
    """A task that may be deleted, and its jobs: their files are deleted first, because only the row names them."""

    task_id: str
    job_ids: list[str | None]
    """The row's last job is named again at the end, None without one: releases before 0.1.0 kept no list."""


class Undeletable(OwnModel):
    """A tenant's tasks that prevent its deletion: how many, and some of their ids."""

    open: int = 0
    open_ids: list[str] = []
    unsettled: int = 0


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


_ENDED: Final = (
    select(tasks.c.task_id, func.array_append(tasks.c.job_ids, tasks.c.job_id).label("job_ids"))
    .where(tasks.c.ended_at.is_not(None), ~still_looked_at())
    .order_by(tasks.c.ended_at)
    .limit(DELETED_AT_ONCE)
)
_ENDED_BEFORE: Final = _ENDED.where(tasks.c.ended_at < bindparam("before"))
_ENDED_OF: Final = _ENDED.where(tasks.c.tenant_id == bindparam("tenant"))
_OPEN_OF: Final = select(tasks.c.task_id).where(tasks.c.tenant_id == bindparam("tenant"), tasks.c.ended_at.is_(None))
_UNSETTLED_OF: Final = select(func.count()).where(tasks.c.tenant_id == bindparam("tenant"), still_looked_at())
_FORGET_CLAIMS: Final = (
    update(task_claims)
    .where(
        task_claims.c.task_id.in_(
            select(task_claims.c.task_id)
            .where(
                task_claims.c.tenant_id == bindparam("tenant"),
                ~exists().where(tasks.c.task_id == task_claims.c.task_id),
            )
            .limit(LINES_AT_ONCE)
        )
    )
    .values(tenant_id="", input_sha256="", first_execution_run_id="")
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


async def ended_before(connection: AsyncConnection, before: datetime) -> list[EndedTask]:
    """Some tasks that ended before a time. One whose ledger is still checked is left out."""
    return [EndedTask(**row._mapping) for row in await connection.execute(_ENDED_BEFORE, {"before": before})]


async def ended_of(connection: AsyncConnection, tenant_id: str) -> list[EndedTask]:
    """Some ended tasks of a tenant. One whose ledger is still checked is left out."""
    return [EndedTask(**row._mapping) for row in await connection.execute(_ENDED_OF, {"tenant": tenant_id})]


async def undeletable(connection: AsyncConnection, tenant_id: str) -> Undeletable:
    values = {"tenant": tenant_id}
    open_ids = (await connection.scalars(_OPEN_OF, values)).all()
    unsettled = await connection.scalar(_UNSETTLED_OF, values)
    return Undeletable(open=len(open_ids), open_ids=list(open_ids[:SHOWN_IDS]), unsettled=unsettled or 0)


async def delete_tasks(connection: AsyncConnection, task_ids: Sequence[str]) -> bool:
    """Delete tasks: their lines first, some at a time, then the tasks. True once they are gone. Claims are kept."""
    ids = {"ids": list(task_ids)}
    for statement in _DELETE_LINES:
        if (await connection.execute(statement, ids)).rowcount == LINES_AT_ONCE:
            return False
    await connection.execute(_DELETE_TASKS, ids)
    return True


async def forget_claims(connection: AsyncConnection, tenant_id: str) -> bool:
    """Remove a tenant from its counts, and from some claims whose tasks are deleted. True once none is left.

    The ids stay taken.
    """
    for counts in (tenant_starts, tenant_streams):
        await connection.execute(delete(counts).where(counts.c.tenant_id == tenant_id))
    return (await connection.execute(_FORGET_CLAIMS, {"tenant": tenant_id})).rowcount < LINES_AT_ONCE


async def queue_states(connection: AsyncConnection) -> list[QueueState]:
    states = {priority: QueueState(priority=priority) for priority in TaskPriority}
    for row in await connection.execute(_QUEUED):
        state = states[TaskPriority(row.priority)]
        state.queued, state.oldest_seconds = row.queued, float(row.oldest_seconds)
    for row in await connection.execute(_MISSED):
        states[TaskPriority(row.priority)].sla_missed = row.missed
    return list(states.values())
