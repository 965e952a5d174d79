"""What a run hands to its continuation (continue-as-new) and what its mechanisms keep as data, not as closures.

Everything that must survive is here: a hold that may stand, a job that may run, facts not yet written. A worker of
another version may read it: see handed_on.py here, and docs/versioning.md before a field is added.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Self

from pydantic import Field, model_validator

from comfyui_temporal.contracts.comfyui import (
    Checkpoint,
    JobRequest,
    JobState,
    SnapshotReference,
    TrainingDraft,
    TrainingOutput,
    TrainingState,
)
from comfyui_temporal.contracts.credits import PreDeductRequest
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.handed_on import RunArgument
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.task_store import Fact, TaskException, TaskState
from comfyui_temporal.contracts.tasks import ImageTask, SettlementState, TaskStatus, TrainingTask


class JobUpdate(OwnModel):
    """One message about a job or training, whichever way it came, in the words both flows share."""

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


class AskedJob(OwnModel):
    """A job that we asked for: noted before the call, so that an undo can learn its id by repeating key and body."""

    attempt: int
    key: str
    request: JobRequest | TrainingDraft | None = None
    """Kept until the call is answered: then nothing asks again with it, and a run does not carry it on."""
    asked_at: Instant
    job_id: str | None = None
    refused: bool = False
    """A definite refusal: there is no job to cancel."""
    is_key_taken: bool = False
    """An earlier life of the task had used the key with another body: this was no attempt."""
    cancelled: bool = False

    def is_known_as(self, job_id: str) -> None:
        """The call was answered."""
        self.job_id, self.request = job_id, None

    def is_refused(self) -> None:
        """The call was refused, or its answer never became readable."""
        self.refused, self.request = True, None

    def lighten(self) -> None:
        """Drop the body that nothing asks again with: the first release carried every job's."""
        if self.job_id is not None or self.refused:
            self.request = None


class AskedHold(OwnModel):
    """A hold that we asked for, noted before the call. Its life counts from the first sending (contract §4)."""

    n: int
    request: PreDeductRequest
    asked_at: Instant
    pre_deduct_id: str | None = None
    amount: int = 0
    refused: bool = False
    resolved: bool = False
    told: int = 0
    """Points that an event told as held."""
    told_back: bool = False
    """Whether an event told that it was given back."""
    leaving: str | None = None
    """Why it is being given back beside the flow; a repeat of that call, or the undo, says the same."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be done or told about it."""
        return self.resolved and (self.told_back or not self.told)

    @property
    def usable(self) -> int:
        """Points that may be charged to it: what was granted beyond the asked amount is never used (contract §5)."""
        return min(self.amount, self.request.estimated_cost)


class HoldState(OwnModel):
    """A task's holds; at most one stands outside a renewal. Of what is over the newest are kept, of the rest counts."""

    asked: list[AskedHold] = []
    asked_count: int = 0
    """How many were asked for in all: the newest one's `n`."""
    granted_before: int = 0
    """How many were granted of those that are not kept."""
    estimated: int = 0
    charged: int = 0
    """Points charged by commit or charge; also what a hold turned out to be committed for by somebody else."""
    shortfall: int = 0
    settlement: SettlementState = SettlementState.OPEN
    is_unknown: bool = False
    """What became of a hold or a charge could not be learned: the task ends with `settlement` unknown."""
    granted: int | None = None
    """How many holds were granted in all; None where an earlier release kept no count, as for the next."""
    given_back: int | None = None
    """How many of these are known to have been given back."""
    committed: int = 0
    """How many of these are known to have been committed."""
    asked_again: int = 0
    """How many of these were asked for more than once: a service without idempotency may have taken more of them."""
    next_renewal_at: Instant | None = None
    uncovered_since: Instant | None = None
    asking: int | None = None
    """`n` of the hold that a renewal asked for and has no answer about: it repeats key and body."""
    checkpoint_passed: bool = False
    """Whether a training has reached a checkpoint since it was without cover."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        self.asked_count = max(self.asked_count, *(hold.n for hold in self.asked), 0)
        return self

    def add(self, n: int, request: PreDeductRequest, at: datetime) -> AskedHold:
        """The next hold, recorded before its request."""
        self.leave_out_old()
        self.asked_count = max(self.asked_count, n)
        hold = AskedHold(n=n, request=request, asked_at=at)
        self.asked.append(hold)
        return hold

    def granted_holds(self) -> list[AskedHold]:
        """Those kept that were granted, oldest first."""
        return [hold for hold in self.asked if hold.pre_deduct_id]

    def leave_out_old(self) -> None:
        """Thirty days of renewals ask for thousands of holds: what nothing can ask for again is counted, not kept."""
        over = [hold for hold in self.granted_holds() if hold.is_over]
        too_old = {hold.n for hold in over[: max(0, len(over) - MAX_KEPT_HOLDS)]}
        self.granted_before += len(too_old)
        refused = {hold.n for hold in self.asked[:-1] if hold.refused and hold.n != self.asking}
        self.asked = [hold for hold in self.asked if hold.n not in too_old | refused]


def not_left_out(in_order: list[str], kept: Collection[str], left_out: int) -> list[str]:
    """Of a task's holds, in the order in which they were granted, those that are not older than what was kept.

    `left_out`: how many were over and are counted only. What is older than the 64 that are kept has long expired.
    """
    if not left_out:
        return in_order
    return in_order[next((n for n, pre_deduct_id in enumerate(in_order) if pre_deduct_id in kept), 0) :]


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
    """Why the last poll's answer could not be read; empty where it could."""
    unreadable_since: Instant | None = None
    unknown_since: Instant | None = None
    """When the server said first that it does not know the job."""


class ClockState(OwnModel):
    """The instants a deadline is made of (contract §1)."""

    first_start: Instant | None = None
    attempt_start: Instant | None = None
    first_span_minutes: float | None = None
    estimated_time: float | None = None
    queued_since: Instant | None = None
    sla_told: bool = False


class HeldProgress(OwnModel):
    """The newest progress that came too soon after the last that was told."""

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
    """Of the newest state that is known to be in the store."""
    last_progress_at: Instant | None = None
    held_back: HeldProgress | None = None
    last_shown: str = ""
    last_news_at: Instant | None = None


class PriceState(OwnModel):
    """A task's price in points: what was confirmed, and for a training the hours that count.

    `carried_gpu_hours` are those of earlier attempts, up to the checkpoint that the present one resumed from.
    """

    ceiling: int = 0
    job_estimate: int = 0
    carried_gpu_hours: float = 0.0
    gpu_hours: float = 0.0
    resume_from: str | None = None
    resumed_from: list[str] = []
    """Every checkpoint that an attempt resumed from: reported again, it stands for no new hours."""
    checkpoint: Checkpoint | None = None
    asked_at_checkpoint: str | None = None


class DatasetState(OwnModel):
    """A training's snapshot: noted before it is made, so that what was half copied is deleted too."""

    snapshot: SnapshotReference | None = None
    is_asked: bool = False
    is_deleted: bool = False


class Continuation(OwnModel):
    """Everything a continued run goes on with; a first run starts from the defaults."""

    policy: Policy | None = None
    run_number: int = 0
    """1 for a chain's second run, and so on; see `comfyui_temporal.contracts.lives.TaskRun`."""
    record: RecordState = Field(default_factory=RecordState)
    watch: WatchState = Field(default_factory=WatchState)
    clock: ClockState = Field(default_factory=ClockState)
    hold: HoldState = Field(default_factory=HoldState)
    jobs: list[AskedJob] = []
    retry_at: Instant | None = None
    """When the next attempt may begin, of a run that continues as new between two attempts."""
    price: PriceState = Field(default_factory=PriceState)
    dataset: DatasetState = Field(default_factory=DatasetState)


class ImageRun(ImageTask, RunArgument):
    """Argument of `ImageGenerationWorkflow`: the task, and in a continued run what it goes on with."""

    carried: Continuation | None = None


class TrainingRun(TrainingTask, RunArgument):
    """Argument of `TrainingWorkflow`: the task, and in a continued run what it goes on with."""

    carried: Continuation | None = None
