"""What workflows tell the task store: the claim of an id, and facts that become a task's row, events and log."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from comfyui_temporal.contracts.comfyui import SnapshotReference, TaskPriority, TrainingLogLine, TrainingOutput
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.handed_on import KeptModel
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.tasks import Confirmation, CreditsSummary, EventType, TaskStatus, with_settlement


class Fact(OwnModel):
    """One thing that happened, named by the workflow; the store gives it its `seq` (contract §6).

    `key` is `accepted`, `held:{n}`, `{job_id}:{sequence}`, `settled`, `end` and the like: a known key writes
    nothing. Where `job_id` and `sequence` are set, a lower sequence than the job's newest writes nothing.
    """

    key: str = Field(max_length=256)
    event: EventType
    ts: Instant
    attempt: int
    status: TaskStatus
    stage: str | None = None
    progress: float | None = None
    next_eta: Instant | None = None
    queue_position: int | None = None
    message: str | None = None
    credits_delta: int | None = None
    balance_after: int | None = None
    result_urls: list[str] | None = None
    output: TrainingOutput | None = None
    error: ErrorDetails | None = None
    confirmation: Confirmation | None = None
    job_id: str | None = None
    sequence: int | None = None
    is_end: bool = False
    """The task's last fact: nothing is written after it."""


class TaskException(OwnModel):
    """A record for ops (contract §4, §6): `key` names it within the task, so that a repeat writes nothing."""

    key: str = Field(max_length=256)
    code: str
    """A `FailureCode` or an `ExceptionCode`."""
    message: str
    details: dict[str, Any] = {}
    ts: Instant


class RecordedPrices(OwnModel):
    """The three prices that are compared (contract §5), in points."""

    job: int | None = None
    estimate: int | None = None
    table: int | None = None


class TaskState(OwnModel):
    """The mutable part of a task's row, whole each time it is written."""

    version: int
    """Rises with every change in the workflow; a lower one never overwrites a higher one."""
    status: TaskStatus
    stage: str | None = None
    progress: float = 0.0
    next_eta: Instant | None = None
    estimated_time: float | None = None
    gpu_slots: int | None = None
    queue_position: int | None = None
    job_id: str | None = None
    """The current job's or training's id."""
    attempts: int = 0
    credits: CreditsSummary = CreditsSummary()
    prices: RecordedPrices = RecordedPrices()
    confirmation: Confirmation | None = None
    result_urls: list[str] = []
    output: TrainingOutput | None = None
    error: ErrorDetails | None = None
    dataset: SnapshotReference | None = None
    """What a training trains on: where the list of its files lay, its checksum and counts."""


class TaskClaim(OwnModel):
    """The first act of a run: claims the task id for its `first_execution_run_id` (contract §8)."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    template_id: str
    priority: TaskPriority
    resolution: str
    """The resolution, or a training's base model."""
    workflow_id: str
    first_execution_run_id: str
    input_sha256: str
    at: Instant


class ClaimOutcome(KeptModel):
    """`claimed` is true for the run that holds the id, whatever it repeats. `policy` is the worker's, read with it."""

    claimed: bool
    policy: Policy
    earlier_life: EarlierLife | None = None


class LookOrder(OwnModel):
    """Which run asks what the task's row knows."""

    task_id: str
    first_execution_run_id: str
    run_number: int = 0


class RowSeen(OwnModel):
    """What the store knows of a task that one of its runs may have forgotten. `row` is None where there is none."""

    life: EarlierLife
    row: TaskRow | None = None
    told_points: int = 0
    """What the events that are written have told of points: the sum of their `credits_delta`."""
    life_seconds: float | None = None
    """For how long the run that acts has been the one; None where the task's run was never reset."""


class TaskWrite(OwnModel):
    """One transaction: row, events, log lines, exception records and one NOTIFY.

    Accepted only from the run that claimed the id.
    """

    task_id: str
    first_execution_run_id: str
    state: TaskState
    facts: list[Fact] = []
    exceptions: list[TaskException] = []
    run_number: int = 0
    """Of the run that writes; see `comfyui_temporal.contracts.lives.TaskRun`."""
    written_version: int = 0
    """The newest version that the run knows to be written; a row that is older comes from a backup."""
    claim: TaskClaim | None = None
    """What the run claimed the id with: a store that lost the row makes it anew from this."""


class TrainingLogWrite(OwnModel):
    """Lines of one callback, written by the callback receiver (decision 4).

    Keyed by training, sequence and line number: a repeated callback writes nothing twice.
    """

    task_id: str
    training_id: str
    sequence: int
    lines: list[TrainingLogLine]
    metrics: dict[str, float] = {}


class TaskRow(TaskState):
    """A task as the store tells it: what the claim fixed, and the newest state."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    template_id: str
    priority: TaskPriority
    resolution: str
    workflow_id: str
    first_execution_run_id: str
    input_sha256: str
    created_at: Instant
    updated_at: Instant
    ended_at: Instant | None = None
    last_seq: int
    """`seq` of the newest event."""
    run_id: str | None = None
    """The run that acts for the task, as the store has seen last; None where none has told since 0.1.0."""
    lives: int = 0
    """How often the task's run was reset."""
    given_back_by: str | None = None
    hold_ids: list[str] = []
    """Every hold that any run of the task took, and `job_ids` every job or training that one asked for."""
    job_ids: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_release(cls, values: Any) -> Any:
        has_ended = isinstance(values, dict) and values.get("ended_at") is not None
        return with_settlement(values, has_ended=has_ended)


class UnsettledTask(OwnModel):
    """An ended task whose settlement is unknown: whose ledger is to be read, and what was told."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    priority: TaskPriority
    credits: CreditsSummary


class Correction(OwnModel):
    """What the ledger shows of a task by now: its row's new `credits`, and the record that says so."""

    task_id: str
    credits: CreditsSummary
    record: TaskException


class TaskExceptionRow(TaskException):
    """An exception record as the store tells it."""

    task_id: str


class TrainingLogRow(TrainingLogLine):
    """A line of a task's training log; `position` is 1, 2, 3 … per task in order of arrival.

    `line` counts from 1 within a callback; a row with line 0 holds that callback's `metrics` and no message.
    """

    position: int
    training_id: str
    sequence: int
    line: int
    metrics: dict[str, float] | None = None
