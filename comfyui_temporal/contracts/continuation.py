"""What a run passes to the next run when it continues as new; its mechanisms keep their state as data, not as closures.

Everything that must survive is here: a hold that may be open, a job that may run, facts that are not written yet. A
worker of another version may read it: see handed_on.py here, and docs/versioning.md before you add a field.
"""

from __future__ import annotations

from pydantic import Field

from comfyui_temporal.contracts.comfyui import (
    Checkpoint,
    JobState,
    SnapshotReference,
    TrainingOutput,
    TrainingState,
)
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.handed_on import RunArgument
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.requests import HoldState, RequestedJob
from comfyui_temporal.contracts.task_store import Fact, TaskException, TaskState, TrainedModel
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus, TrainingTask


class JobUpdate(OwnModel):
    """One message about a job or training, from a callback or a poll, with the field names that both flows share."""

    job_id: str
    sequence: int
    status: TaskStatus
    stage: str | None = None
    progress: float | None = None
    next_eta: Instant | None = None
    estimated_time: float | None = None
    gpu_slots: int | None = None
    queue_position: int | None = None
    error: ErrorDetails | None = None
    succeeded: bool = False
    result_urls: list[str] = []
    actual_cost: int | None = None
    gpu_hours: float | None = None
    gpu_hours_used: float | None = None
    checkpoint: Checkpoint | None = None
    output: TrainingOutput | None = None

    @property
    def is_final(self) -> bool:
        return self.succeeded or self.error is not None

    @classmethod
    def of_job(cls, state: JobState) -> JobUpdate:
        return cls(
            job_id=state.job_id,
            sequence=state.sequence,
            status=TaskStatus.QUEUED if state.job_status == "queued" else TaskStatus.RUNNING,
            stage=state.job_status.value,
            progress=state.stage_progress,
            next_eta=state.next_eta,
            estimated_time=state.estimated_time,
            gpu_slots=state.gpu_slots,
            queue_position=state.queue_position,
            error=state.failure(),
            succeeded=state.has_succeeded() and state.failure() is None,
            result_urls=state.result_urls if state.has_succeeded() else [],
            actual_cost=state.actual_cost,
        )

    @classmethod
    def of_training(cls, state: TrainingState) -> JobUpdate:
        return cls(
            job_id=state.training_id,
            sequence=state.sequence,
            status=TaskStatus.QUEUED if state.training_status == "queued" else TaskStatus.RUNNING,
            stage=state.training_stage.value if state.training_stage else None,
            progress=state.stage_progress,
            next_eta=state.next_eta,
            estimated_time=state.estimated_time,
            gpu_slots=state.gpu_slots,
            error=state.failure(),
            succeeded=state.has_succeeded() and state.failure() is None,
            gpu_hours=state.gpu_hours,
            gpu_hours_used=state.gpu_hours_used,
            checkpoint=state.checkpoint,
            output=state.output if state.has_succeeded() else None,
        )


class WatchState(OwnModel):
    """What is known of the jobs of one task."""

    current: str | None = None
    newest: JobUpdate | None = None
    earlier: list[str] = []
    inbox: list[JobUpdate] = []
    callbacks_refused: int = 0
    last_news_at: Instant | None = None
    silence_seconds: float = 0.0
    unreadable: str = ""
    """Why the last poll's answer could not be read; empty if it could."""
    unreadable_since: Instant | None = None
    begun: dict[str, Instant] = {}
    """When the newest jobs were first seen at work, by job id."""
    unknown_since: Instant | None = None
    """When the server first answered that it does not know the job."""
    reported_at: Instant | None = None
    """When the job last reported to the workflow, by a callback or a poll."""
    looked_at: Instant | None = None
    """When the workflow last looked into the store for its ticks."""


class ClockState(OwnModel):
    """The times that a deadline is computed from (contract §1)."""

    first_start: Instant | None = None
    attempt_start: Instant | None = None
    counts_from_processing: bool = False
    """The deadline of the present attempt counts from `processing`, not from its start."""
    queued_seconds: float = 0.0
    """How long earlier attempts waited in the queue."""
    first_span_minutes: float | None = None
    longest_span_minutes: float | None = None
    """The longest span of all estimates. None where none was longer than the first."""
    estimated_time: float | None = None
    queued_since: Instant | None = None
    sla_told: bool = False


class HeldProgress(OwnModel):
    """The newest progress that came too soon after the last published one."""

    job_id: str
    sequence: int


class RecordState(OwnModel):
    """A task's record and the facts that are not written yet."""

    state: TaskState = Field(default_factory=lambda: TaskState(version=0, status=TaskStatus.QUEUED))
    unwritten: list[Fact] = []
    exceptions: list[TaskException] = []
    written_status: TaskStatus | None = None
    written_stage: str | None = None
    written_version: int = 0
    """Of the newest state that is known to be stored."""
    last_progress_at: Instant | None = None
    held_back: HeldProgress | None = None
    last_shown: str = ""
    last_news_at: Instant | None = None
    input_sha256: str | None = None
    """Of the claim, and when it was made: those of the chain's first run."""
    claimed_at: Instant | None = None


class PriceState(OwnModel):
    """A task's price in points: the confirmed ceiling, and for a training the hours that count.

    `carried_gpu_hours` are those of earlier attempts, up to the checkpoint that the current one resumed from.
    """

    ceiling: int = 0
    job_estimate: int = 0
    carried_gpu_hours: float = 0.0
    gpu_hours: float = 0.0
    resume_from: str | None = None
    resumed_from: list[str] = []
    """Every checkpoint that an attempt resumed from. If it is reported again, it adds no hours."""
    checkpoint: Checkpoint | None = None
    asked_at_checkpoint: str | None = None
    askings: int = 0
    """How often the payer was asked to confirm a price."""


class DatasetState(OwnModel):
    """A training's snapshot. It is recorded before the copy begins, so that an incomplete copy is deleted too."""

    snapshot: SnapshotReference | None = None
    is_asked: bool = False
    is_deleted: bool = False


class Continuation(OwnModel):
    """Everything that the next run needs. A first run starts from the defaults."""

    policy: Policy | None = None
    run_number: int = 0
    """1 for a chain's second run, and so on; see `comfyui_temporal.contracts.lives.TaskRun`."""
    record: RecordState = Field(default_factory=RecordState)
    watch: WatchState = Field(default_factory=WatchState)
    clock: ClockState = Field(default_factory=ClockState)
    hold: HoldState = Field(default_factory=HoldState)
    jobs: list[RequestedJob] = []
    retry_at: Instant | None = None
    """When the next attempt may begin, if a run continues as new between two attempts."""
    price: PriceState = Field(default_factory=PriceState)
    dataset: DatasetState = Field(default_factory=DatasetState)
    models: list[TrainedModel] = []
    """The models that an image uses."""


class ImageRun(ImageTask, RunArgument):
    """Argument of `ImageGenerationWorkflow`: the task, and the continuation for a continued run."""

    carried: Continuation | None = None


class TrainingRun(TrainingTask, RunArgument):
    """Argument of `TrainingWorkflow`: the task, and the continuation for a continued run."""

    carried: Continuation | None = None
