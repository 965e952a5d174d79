"""What workflows write to the task store: the claim of an id, and facts that become a task's row, events and log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from pydantic import Field, JsonValue, model_validator

from comfyui_temporal.contracts.comfyui import SnapshotReference, TaskPriority, TrainingLogLine, TrainingOutput
from comfyui_temporal.contracts.credits import PriceOption
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.handed_on import KeptModel
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import Confirmation, CreditsSummary, TaskStatus, with_settlement

PRICE: Final = "price"
"""In the details of a record `settlement_unknown`: the whole price that was to be charged, in points."""
CHARGES: Final = "charges"
"""In the details of a record `settlement_unknown`: how many charges were sent and not refused."""
SHORTFALL_KEY: Final = "shortfall"
SHORTFALL_TEXT: Final = "{points} points of this task's price could not be charged."


class PriceToConfirm(OwnModel):
    """A `Confirmation` as rows, events and runs keep it.

    Here `confirm_by` is always a time: workers and gateways of 0.1.0 cannot read one without.
    """

    estimated_cost: int
    options: list[PriceOption] = []
    current_balance: int | None = None
    suggest_topup: int | None = None
    confirm_by: Instant
    is_running: bool = False
    """The training does not wait until then: it runs on, and stops at its next checkpoint unless it is confirmed."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_time(cls, values: Any) -> Any:
        """For a while null was kept of a training that runs on."""
        if isinstance(values, dict) and values.get("confirm_by", ...) is None:
            return {**values, "confirm_by": datetime.max.replace(tzinfo=UTC), "is_running": True}
        return values

    def shown(self) -> Confirmation:
        return Confirmation.model_validate(self.model_dump())


class Fact(OwnModel):
    """One thing that happened, named by the workflow. The store gives it its `seq` (contract §6).

    `key` is `accepted`, `held:{n}`, `{job_id}:{sequence}`, `settled`, `end` and the like. A known key writes
    nothing. If `job_id` and `sequence` are set, a lower sequence than the job's newest writes nothing, unless the
    fact `is_change`.
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
    confirmation: PriceToConfirm | None = None
    job_id: str | None = None
    sequence: int | None = None
    is_end: bool = False
    """The task's last fact: nothing is written after it."""
    is_change: bool = False
    """A job's new stage, error or result: it is written also after later ticks (contract §6)."""


class TaskException(OwnModel):
    """A record for operators (contract §4, §6). `key` names it within the task, so that a repeat writes nothing."""

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


class TakenReport(OwnModel):
    """What the workflow last took of its current job. A report that differs from it only in figures is a tick."""

    job_id: str
    sequence: int
    digest: str
    """Of everything but the figures (`contracts/ticks.py`)."""


class TaskState(OwnModel):
    """The mutable part of a task's row, written as a whole each time."""

    version: int
    """Increases with every change in the workflow. A lower one never overwrites a higher one."""
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
    confirmation: PriceToConfirm | None = None
    result_urls: list[str] = []
    output: TrainingOutput | None = None
    error: ErrorDetails | None = None
    dataset: SnapshotReference | None = None
    """What a training trains on: the address, checksum and counts of its list of files."""
    taken: TakenReport | None = None
    """None until the current job has reported: then every report is a signal."""

    def has_result_of(self, other: TaskState) -> bool:
        """Whether both report the same end: everything that a task's result holds is equal."""
        return all(getattr(self, name) == getattr(other, name) for name in _IN_RESULTS)


_IN_RESULTS: Final = (
    *("status", "credits", "attempts", "estimated_time", "gpu_slots", "job_id", "result_urls", "output", "error"),
)


class TrainedModel(OwnModel):
    """What a completed training of a tenant has made. `model_id` is the training's task id."""

    model_id: str
    model_path: str
    sha256: str | None = None


class TaskClaim(OwnModel):
    """The first act of a run: it claims the task id for its `first_execution_run_id` (contract §8)."""

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
    input: dict[str, JsonValue] | None = None
    """What was asked for, without ids, to be stored; only the first call of the run has it."""
    model_ids: list[str] = []
    """The models that the task uses, to be looked up; only the first call of the run has them."""
    only_if_known: bool = False
    """Claims nothing where no run of the task has claimed its id: a run that was reset may have been refused before."""


class ClaimOutcome(KeptModel):
    """`claimed` is true for the run that holds the id, also for its repeats. `policy` is the worker's."""

    claimed: bool
    policy: Policy
    earlier_life: EarlierLife | None = None
    input_sha256: str | None = None
    """The hash that the store has, where it is keyed (docs/encryption.md)."""
    refused: str | None = None
    """Which of the tenant's limits is used up, in a sentence; then nothing was claimed."""
    models: list[TrainedModel] = []
    """Of the claim's `model_ids` those that are models of its tenant."""


class LookOrder(OwnModel):
    """The run that asks what the task's row knows."""

    task_id: str
    first_execution_run_id: str
    run_number: int = 0


class RowSeen(OwnModel):
    """What the store knows of a task that one of its runs may have forgotten. `row` is None if there is none."""

    life: EarlierLife
    row: TaskRow | None = None
    told_points: int = 0
    """The sum of `credits_delta` in the events that are written."""
    life_seconds: float | None = None
    """How long the acting run has been the acting one; None if the task's run was never reset."""


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
    """Of the writing run; see `comfyui_temporal.contracts.lives.TaskRun`."""
    written_version: int = 0
    """The newest version that the run knows to be written. An older row comes from a backup."""
    claim: TaskClaim | None = None
    """The run's claim: a store that lost the row creates it again from this."""


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
    """A task as the store returns it: what the claim fixed, and the newest state."""

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
    job_began_at: Instant | None = None
    """When the present job first reported; None before, after the task's end, and where it is not read."""
    run_id: str | None = None
    """The acting run of the task, as the store last saw it; None if none has written since release 0.1.0."""
    lives: int = 0
    """How often the task's run was reset."""
    given_back_by: str | None = None
    hold_ids: list[str] = []
    """Every hold that any run of the task took. `job_ids` is every job or training that any run requested."""
    job_ids: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_release(cls, values: Any) -> Any:
        has_ended = isinstance(values, dict) and values.get("ended_at") is not None
        return with_settlement(values, has_ended=has_ended)


class HeardOrder(OwnModel):
    """Whether the store has heard of a job since."""

    task_id: str
    job_id: str
    digest: str | None = None
    """Of the run's newest report: only ticks that are like it are heard. None: not compared."""
    run_number: int = 0
    first_execution_run_id: str | None = None
    continued_run_id: str | None = None
    """The run that the asking one continues as new. None: it continues none, or an older worker asks."""


class Heard(OwnModel):
    """The newest figures of a job that the store has without the workflow, and how old they are."""

    sequence: int
    progress: float
    next_eta: Instant | None = None
    queue_position: int | None = None
    seconds_ago: float


class UnsettledTask(OwnModel):
    """An ended task whose settlement is unknown: its ledger must be read; with what was published of it."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    priority: TaskPriority
    credits: CreditsSummary
    price: int | None = None
    """What a completed task was to be charged; None where no record names it."""
    lives: int | None = None
    """How often its run was reset; None from a worker that does not say."""
    charges: int = 0
    """How many charges its ledger should show; one that is absent may still be shown."""
    ended_at: Instant | None = None


class Correction(OwnModel):
    """What the ledger now shows of a task: its row's new `credits`, and the exception record for it."""

    task_id: str
    credits: CreditsSummary
    record: TaskException


class TaskExceptionRow(TaskException):
    """An exception record as the store returns it."""

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
