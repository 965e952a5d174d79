"""Answers of the gateway's tasks API (contract §6): written by the gateway, read by `HttpTasks`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pydantic import JsonValue

from comfyui_temporal.contracts.comfyui import TaskPriority, TrainingOutput
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.task_store import RecordedPrices, TaskExceptionRow, TaskRow
from comfyui_temporal.contracts.tasks import (
    Confirmation,
    CreditsSummary,
    TaskDelay,
    TaskInput,
    TaskStatus,
    workflow_id_of,
)


class TaskView(OwnModel):
    """A task as callers see it (contract §6, §8)."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    template_id: str
    priority: TaskPriority
    resolution: str
    """The resolution; a training's base model."""
    workflow_id: str
    status: TaskStatus
    stage: str | None = None
    progress: float = 0.0
    next_eta: Instant | None = None
    estimated_time: float | None = None
    """Minutes."""
    expected_end: Instant | None = None
    """When the whole task is expected to end; None before its job has reported, and after the end."""
    gpu_slots: int | None = None
    queue_position: int | None = None
    job_id: str | None = None
    """ComfyUI's job or training."""
    attempts: int = 0
    credits: CreditsSummary = CreditsSummary()
    prices: RecordedPrices = RecordedPrices()
    confirmation: Confirmation | None = None
    """The price that a training waits to have confirmed."""
    result_urls: list[str] = []
    output: TrainingOutput | None = None
    error: ErrorDetails | None = None
    created_at: Instant
    updated_at: Instant
    ended_at: Instant | None = None
    input: dict[str, JsonValue] | None = None
    """What was asked for: §8's input without ids. Null where it is not kept, before the run has claimed its id, and in
    the answer to a start; in a list without `dataset.files`."""
    last_seq: int = 0
    """`seq` of the newest event; 0 before the first."""

    @classmethod
    def of_row(cls, row: TaskRow, given: dict[str, JsonValue] | None = None) -> TaskView:
        return cls.model_validate(row.model_dump() | {"input": given, "expected_end": _expected_end(row)})

    @classmethod
    def accepted(cls, task: TaskInput) -> TaskView:
        """A task whose run has started but has not claimed its id yet."""
        now = datetime.now(UTC)
        return cls(
            task_id=task.task_id,
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            scene=task.scene,
            template_id=task.template_id,
            priority=task.priority,
            resolution=SCENES[task.scene].variant(task),
            workflow_id=workflow_id_of(task.task_id),
            status=TaskStatus.QUEUED,
            created_at=now,
            updated_at=now,
        )


def _expected_end(row: TaskRow) -> datetime | None:
    """Never before the next stage: that is the newer word."""
    if row.ended_at is not None or row.job_began_at is None or row.estimated_time is None:
        return None
    ends = row.job_began_at + timedelta(minutes=row.estimated_time)
    return max(ends, row.next_eta) if row.next_eta else ends


class TaskDetail(TaskView):
    """A task, with its exception records and what delays it now."""

    exceptions: list[TaskExceptionRow] = []
    delays: list[TaskDelay] = []


class TaskList(OwnModel):
    """Tasks, newest first. `cursor` leads to the next page; null on the last one."""

    tasks: list[TaskView]
    cursor: str | None = None
