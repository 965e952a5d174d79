"""Task events (contract §6), as they are pushed and stored."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import model_validator

from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import Confirmation, TaskStatus


class EventType(StrEnum):
    ACCEPTED = "task.accepted"
    RUNNING = "task.running"
    CHECKPOINT = "task.checkpoint"
    COMPLETED = "task.completed"
    FAILED = "task.failed"
    CANCELLED = "task.cancelled"
    CREDITS = "credits.updated"
    HEARTBEAT = "system.heartbeat"


_END_OF: Final[dict[Any, TaskStatus]] = {
    EventType.COMPLETED: TaskStatus.COMPLETED,
    EventType.FAILED: TaskStatus.FAILED,
    EventType.CANCELLED: TaskStatus.CANCELLED,
}


class EndCredits(OwnModel):
    """What a task cost and what came back, in points; null where it is not known."""

    final_cost: int | None
    refund: int | None


class TaskEvent(OwnModel):
    """One event as pushed and stored (contract §6). `seq` is the store's; `cursor` is opaque."""

    event_id: str
    seq: int
    event: EventType
    task_id: str
    task_type: Scene
    attempt: int
    status: TaskStatus
    stage: str | None = None
    progress: float | None = None
    next_eta: Instant | None = None
    queue_position: int | None = None
    message: str | None = None
    credits_delta: int | None = None
    balance_after: int | None = None
    ts: Instant
    cursor: str
    result_urls: list[str] | None = None
    output: TrainingOutput | None = None
    error: ErrorDetails | None = None
    confirmation: Confirmation | None = None
    failure_reason: str | None = None
    """On `task.failed`: the error's sentence."""
    credits: EndCredits | None = None
    """On an end."""

    @model_validator(mode="before")
    @classmethod
    def _of_another_word(cls, values: Any) -> Any:
        """A gateway may say an end in its clients' words (`STATUS_WORDS`); the type says which end it was."""
        end = _END_OF.get(values.get("event")) if isinstance(values, dict) else None
        return values | {"status": end} if end is not None else values


class Heartbeat(OwnModel):
    """The event `system.heartbeat`: it has no `seq` and no `event_id` (contract §6)."""

    event: Literal[EventType.HEARTBEAT] = EventType.HEARTBEAT
    ts: Instant
    cursor: str | None = None
    unknown_tasks: list[str] | None = None
    """In the first frame of a WebSocket: the ids that the stream leaves out."""
