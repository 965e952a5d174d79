"""Read queries. Every function takes a connection and returns contract models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import Field, ValidationError
from sqlalchemy import ColumnElement, Row, case, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.errors import sentences_of
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.task_events import EventType, TaskEvent
from comfyui_temporal.contracts.task_store import TaskExceptionRow, TaskRow, TrainedModel, TrainingLogRow
from comfyui_temporal.contracts.tasks import TaskStatus
from store.cursors import event_cursor
from store.inputs import has_text
from store.tables import task_claims, task_events, task_exceptions, tasks, training_log

_ENDS: Final = (EventType.COMPLETED.value, EventType.FAILED.value, EventType.CANCELLED.value)


class StoredEvent(TaskEvent):
    """An event with what is not its callers': the trace that it was written in, which is never sent to a stream."""

    traceparent: str | None = Field(default=None, exclude=True)


class UnreadableRow(OwnModel):
    """A task whose row this process cannot read, maybe a newer one's. `reason` names fields, never a value."""

    task_id: str
    created_at: Instant
    reason: str


_JOB_EVENT: Final = task_events.alias("job_event")
_JOB_BEGAN: Final = (
    select(func.min(_JOB_EVENT.c.ts))
    .where(
        _JOB_EVENT.c.task_id == tasks.c.task_id,
        _JOB_EVENT.c.job_id == tasks.c.job_id,
        tasks.c.ended_at.is_(None),
    )
    .correlate(tasks)
    .scalar_subquery()
    .label("job_began_at")
)
"""When an open task's job first reported: from then on its `estimated_time` counts."""


async def task(connection: AsyncConnection, task_id: str) -> TaskRow | None:
    row = (await connection.execute(select(tasks, _JOB_BEGAN).where(tasks.c.task_id == task_id))).one_or_none()
    return None if row is None else _task_row(row)


async def models(
    connection: AsyncConnection, tenant_id: str, task_ids: Sequence[str], *, user_id: str | None = None
) -> list[TrainedModel]:
    """What these trainings made: those of the tenant, or of one of its users, that have completed."""
    statement = select(tasks.c.task_id, tasks.c.output).where(
        tasks.c.task_id.in_(task_ids),
        tasks.c.tenant_id == tenant_id,
        tasks.c.scene.in_([scene for scene, spec in SCENES.items() if spec.makes_models]),
        tasks.c.status == TaskStatus.COMPLETED,
    )
    if user_id is not None:
        statement = statement.where(tasks.c.user_id == user_id)
    outputs = [
        (row.task_id, TrainingOutput.model_validate(row.output or {})) for row in await connection.execute(statement)
    ]
    return [
        TrainedModel(model_id=task_id, model_path=output.model_path, sha256=output.sha256)
        for task_id, output in outputs
        if output.model_path is not None
    ]


async def is_claimed(connection: AsyncConnection, task_id: str) -> bool:
    found = await connection.scalar(select(task_claims.c.task_id).where(task_claims.c.task_id == task_id))
    return found is not None


async def claimed_input(connection: AsyncConnection, task_id: str) -> str | None:
    """The hash of the input that a task id was claimed with."""
    found: str | None = await connection.scalar(
        select(task_claims.c.input_sha256).where(task_claims.c.task_id == task_id)
    )
    return found


async def task_list(
    connection: AsyncConnection,
    *,
    tenant_id: str | None,
    user_id: str | None,
    status: TaskStatus | None,
    scene: Scene | None,
    text: str | None,
    after: tuple[datetime, str] | None,
    limit: int,
) -> list[TaskRow | UnreadableRow]:
    """Newest first. `after` is the creation time and id of the last task of the page before.

    An unreadable row hides none of the others.
    """
    statement = select(tasks, _JOB_BEGAN).order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc()).limit(limit)
    if tenant_id is not None:
        statement = statement.where(tasks.c.tenant_id == tenant_id)
    if user_id is not None:
        statement = statement.where(tasks.c.user_id == user_id)
    if status is not None:
        statement = statement.where(tasks.c.status == status)
    if scene is not None:
        statement = statement.where(tasks.c.scene == scene)
    if text:
        statement = statement.where(has_text(text))
    if after is not None:
        statement = statement.where(tuple_(tasks.c.created_at, tasks.c.task_id) < tuple_(*after))
    return [_row_if_readable(row) for row in await connection.execute(statement)]


async def open_tasks(
    connection: AsyncConnection, *, quiet_for: timedelta, after: tuple[datetime, str] | None, limit: int
) -> list[TaskRow | UnreadableRow]:
    """Tasks without an end and without a recent write; oldest first. `after` and unreadable rows as in `task_list`."""
    statement = (
        select(tasks)
        .where(tasks.c.ended_at.is_(None), tasks.c.updated_at <= func.now() - quiet_for)
        .order_by(tasks.c.created_at, tasks.c.task_id)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(tuple_(tasks.c.created_at, tasks.c.task_id) > tuple_(*after))
    return [_row_if_readable(row) for row in await connection.execute(statement)]


def _row_if_readable(row: Row[*tuple[Any, ...]]) -> TaskRow | UnreadableRow:
    try:
        return _task_row(row)
    except ValidationError as error:
        return UnreadableRow(task_id=row.task_id, created_at=row.created_at, reason="; ".join(sentences_of(error)))


def credits_at_end(event: ColumnElement[str]) -> ColumnElement[Any]:
    """The task's credits beside its end, null beside its other events."""
    return case((event.in_(_ENDS), tasks.c.credits)).label("credits_at_end")


async def events(connection: AsyncConnection, task_id: str, *, after_seq: int, limit: int) -> list[TaskEvent]:
    statement = (
        select(task_events, tasks.c.scene, credits_at_end(task_events.c.event))
        .join(tasks, tasks.c.task_id == task_events.c.task_id)
        .where(task_events.c.task_id == task_id, task_events.c.seq > after_seq)
        .order_by(task_events.c.seq)
        .limit(limit)
    )
    return [event_of_row(row) for row in await connection.execute(statement)]


async def log_rows(
    connection: AsyncConnection, task_id: str, *, after_position: int, limit: int
) -> list[TrainingLogRow]:
    statement = (
        select(training_log)
        .where(training_log.c.task_id == task_id, training_log.c.position > after_position)
        .order_by(training_log.c.position)
        .limit(limit)
    )
    return [TrainingLogRow.model_validate(dict(row._mapping)) for row in await connection.execute(statement)]


async def exceptions(
    connection: AsyncConnection, *, task_id: str | None, codes: Sequence[str] | None, limit: int
) -> list[TaskExceptionRow]:
    """Newest first."""
    statement = select(task_exceptions).order_by(task_exceptions.c.ts.desc()).limit(limit)
    if task_id is not None:
        statement = statement.where(task_exceptions.c.task_id == task_id)
    if codes is not None:
        statement = statement.where(task_exceptions.c.code.in_(codes))
    return [TaskExceptionRow.model_validate(dict(row._mapping)) for row in await connection.execute(statement)]


def _task_row(row: Row[*tuple[Any, ...]]) -> TaskRow:
    return TaskRow.model_validate(dict(row._mapping))


def event_of_row(row: Row[*tuple[Any, ...]]) -> TaskEvent:
    return TaskEvent.model_validate(event_values(row))


def event_values(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of an event, and of a StoredEvent. `credits_at_end` is the task's row's, read for ends alone."""
    values = dict(row._mapping)
    task_id, seq = values["task_id"], values["seq"]
    if credits := values.pop("credits_at_end", None):
        values["credits"] = {"final_cost": credits.get("charged"), "refund": credits.get("returned")}
    if values["event"] == EventType.FAILED:
        values["failure_reason"] = values["message"] or (values["error"] or {}).get("message")
    return {
        **values,
        "event_id": f"{task_id}:{seq}",
        "task_type": values["scene"],
        "cursor": event_cursor(task_id, seq),
    }
