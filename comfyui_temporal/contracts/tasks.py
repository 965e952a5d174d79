"""The workflow interface (contract §8): what clients send, and what they get. Events are in task_events.py."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, model_validator

from comfyui_temporal.contracts.comfyui import Resolution, TaskPriority, TrainingOutput
from comfyui_temporal.contracts.credits import PriceOption
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import (
    WRITTEN_BY_US,
    CallerId,
    CallerMessage,
    CallerModel,
    CallerPoints,
    CallerText,
    CleanJson,
    Instant,
    OwnModel,
    Sha256,
    TaskPrompt,
    check_json,
)
from comfyui_temporal.contracts.loras import Loras
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.size_budget import MAX_EXTRAS_BYTES, MAX_IMAGES, MAX_STORED_INPUT_BYTES
from comfyui_temporal.contracts.uploads import is_upload, upload_id_of

TASK_QUEUE: Final = "comfyui"
WORKFLOW_ID_PREFIX: Final = "task-"
IMAGE_WORKFLOW: Final = "ImageGenerationWorkflow"
TRAINING_WORKFLOW: Final = "TrainingWorkflow"
CALLBACK_SIGNAL: Final = "comfyui_callback"
CANCEL_SIGNAL: Final = "cancel_task"
CONFIRM_SIGNAL: Final = "confirm_price"
"""As the updates of these names, without an answer: for callers that are workflows, which cannot send updates."""
PRIORITY_KEYS: Final = {TaskPriority.ACCELERATED: 1, TaskPriority.STANDARD: 3}
"""Temporal's priority keys: 1 goes first, 3 is its default."""
INPUT_MEMO: Final = "input_sha256"
SEARCH_ATTRIBUTES: Final = (
    "TaskId",
    "TenantId",
    "UserId",
    "Scene",
    "TemplateId",
    "TaskPriority",
    "TaskStatus",
    "TaskStage",
)
"""All of type Keyword; the last two change while the task runs (contract §8)."""


def workflow_id_of(task_id: str) -> str:
    """The only workflow id of a task (contract §8)."""
    return WORKFLOW_ID_PREFIX + task_id


class TaskStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def is_end(self) -> bool:
        return self in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)


class Control(CallerModel):
    """One control image and how strongly it steers the result."""

    image_url: Annotated[CallerText, Field(min_length=1, max_length=2048)]
    strength: Annotated[float, Field(ge=0, le=10)] = 1.0
    kind: Annotated[CallerText, Field(max_length=64)] | None = None


Images = Annotated[int, Field(ge=1, le=MAX_IMAGES, strict=True, exclude_if=lambda images: images == 1)]
"""How many images a task makes. One is not sent, for the same reason."""
_PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]
_PositiveFactor = Annotated[float, Field(gt=0, le=1_000)]


class ImageOptions(CallerModel):
    """Limits that a caller may set below the worker's policy. A higher value counts as the policy's."""

    poll_after_seconds: _PositiveSeconds | None = None
    deadline_factor: _PositiveFactor | None = None


class TrainingOptions(ImageOptions):
    """As `ImageOptions`, and the time limit of the price confirmation, in seconds."""

    confirm_within_seconds: _PositiveSeconds | None = None


def bounded_extras(extras: dict[str, CleanJson]) -> dict[str, CleanJson]:
    """The same extras. Raises ValueError where they are too large for a run."""
    if len(repr(extras).encode("utf-8", "surrogatepass")) > MAX_EXTRAS_BYTES:
        raise ValueError(f"must not be larger than {MAX_EXTRAS_BYTES} bytes")
    return extras


ExtraName = Annotated[CallerText, Field(min_length=1, max_length=128)]
Extras = Annotated[dict[ExtraName, CleanJson], Field(max_length=64), AfterValidator(bounded_extras)]


class TaskInput(CallerModel):
    """The fields that the inputs of all scenes share."""

    task_id: CallerId
    tenant_id: CallerId
    user_id: CallerId
    template_id: CallerId
    priority: TaskPriority = TaskPriority.STANDARD

    @property
    @abstractmethod
    def scene(self) -> Scene: ...

    @property
    def models(self) -> dict[str, str]:
        """Field → id of each model of the tenant that the task uses."""
        return {}

    @property
    def uploads(self) -> dict[str, str]:
        """Field → address of each upload that the task names, rightly or not."""
        return {}


class ImageTask(TaskInput):
    """Input of `ImageGenerationWorkflow`. `max_credits` in points: the most this task may cost its payer."""

    prompt: TaskPrompt
    controls: Annotated[list[Control], Field(max_length=16)] = []
    resolution: Resolution = Resolution.HD
    extras: Extras = {}
    loras: Loras = []
    images: Images = 1
    max_credits: CallerPoints | None = None
    options: ImageOptions = ImageOptions()

    @property
    def scene(self) -> Scene:
        return Scene.IMAGE_GENERATE

    @property
    def models(self) -> dict[str, str]:
        named = {f"loras.{number}.model_id": lora.model_id for number, lora in enumerate(self.loras)}
        return {field: model_id for field, model_id in named.items() if model_id is not None}

    @property
    def uploads(self) -> dict[str, str]:
        given = {f"controls.{number}.image_url": each.image_url for number, each in enumerate(self.controls)}
        named = {field: address for field, address in given.items() if is_upload(address)}
        # Of a text that only begins so no upload is meant.
        texts = {name: value for name, value in self.extras.items() if isinstance(value, str)}
        return named | {f"extras.{name}": text for name, text in texts.items() if upload_id_of(text) is not None}


def _relative_path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or not parts or any(part in ("..", ".") for part in parts):
        raise ValueError("must be a relative path without '..'")
    return path


FilePath = Annotated[CallerText, Field(min_length=1, max_length=1024), AfterValidator(_relative_path)]
"""A dataset's file, relative to its folder."""
FileList = Annotated[list[FilePath], Field(min_length=1, max_length=10_000)]
_Address = Annotated[CallerText, Field(min_length=1, max_length=2048)]


class DatasetManifest(CallerModel):
    """A caller's own list of files: a JSON array of paths at `uri`, under the tenant's own prefix, at most 4 MiB."""

    uri: _Address
    sha256: Sha256
    """Checksum of the array's bytes: the list cannot change after the order."""


class DatasetSource(CallerModel):
    """The dataset to train on: `files` below `source_uri`, those in `manifest`, or all of them."""

    dataset_id: CallerId
    source_uri: _Address
    files: FileList | None = None
    manifest: DatasetManifest | None = None

    @property
    def names_files_twice(self) -> bool:
        """Whether files are named in more than one way: a caller's mistake, which the task's first step rejects."""
        return self.files is not None and self.manifest is not None


class TakenDataset(DatasetSource):
    """A dataset as the workflow takes it."""

    files_sha256: Sha256 | None = None
    """Checksum of a list that the gateway stored in temporary object storage. It takes precedence."""


class Hyperparameters(BaseModel):
    """`epochs`, `batch_size`, `learning_rate`; others are passed on unchanged."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, CleanJson]

    epochs: Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
    batch_size: Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
    learning_rate: Annotated[float, Field(gt=0, le=1_000)]

    @model_validator(mode="after")
    def _bounded(self, info: ValidationInfo) -> Hyperparameters:
        if info.context != WRITTEN_BY_US:
            for name in self.__pydantic_extra__:
                check_json(name)
        bounded_extras(self.__pydantic_extra__)
        return self


class GpuWindow(CallerModel):
    """The GPU scheduling window: `start` is called inside it or not at all."""

    not_before: Instant | None = None
    not_after: Instant | None = None

    @model_validator(mode="after")
    def _in_order(self) -> GpuWindow:
        if self.not_before and self.not_after and self.not_after <= self.not_before:
            raise ValueError("not_after must be after not_before")
        return self


class TrainingTask(TaskInput):
    """Input of `TrainingWorkflow`. `max_credits` in points confirms every price up to it beforehand."""

    base_model: CallerId = "base"
    dataset: TakenDataset
    hyperparameters: Hyperparameters
    gpu_type: CallerId | None = None
    max_credits: CallerPoints | None = None
    resume_from: Annotated[CallerText, Field(min_length=1, max_length=2048)] | None = None
    window: GpuWindow | None = None
    options: TrainingOptions = TrainingOptions()

    @property
    def scene(self) -> Scene:
        return Scene.MODEL_TRAIN


def input_sha256_of(task: TaskInput) -> str:
    """Hash of a task's input, in hex: equal for inputs with the same meaning (contract §8 `input_sha256`).

    Fields with their default value do not count, so that a new field changes no existing hash.
    """
    canonical = json.dumps(task.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def input_document(task: TaskInput) -> dict[str, JsonValue] | None:
    """What was asked for, as it is stored and served: the input without ids and without what was not given.

    None where it is larger than `MAX_STORED_INPUT_BYTES`: half of an order would look like another one.
    """
    document = task.model_dump(mode="json", exclude={"task_id", "tenant_id", "user_id"})
    document["options"] = {name: value for name, value in document["options"].items() if value is not None} or None
    document = {name: value for name, value in document.items() if value is not None}
    return document if len(json.dumps(document).encode()) <= MAX_STORED_INPUT_BYTES else None


class SettlementState(StrEnum):
    """`settlement` of a task's credits.

    `open`: the task continues. `settled`: the amounts are final. `unknown`: it is unknown whether it was charged.
    """

    OPEN = "open"
    SETTLED = "settled"
    UNKNOWN = "unknown"


class CreditsSummary(OwnModel):
    """`credits` of results and of the query, in points. `held` is the last hold's amount.

    `charged` and `returned` are null only if `settlement` is `unknown`.
    """

    estimated: int = 0
    held: int = 0
    charged: int | None = 0
    returned: int | None = 0
    shortfall: int = 0
    settlement: SettlementState = SettlementState.OPEN
    pre_deduct_ids: list[str] = []
    """The newest 64."""
    pre_deduct_count: int = 0
    """How many there were in all."""

    def settled(self, *, charged: int, returned: int, price: int | None) -> CreditsSummary:
        """These credits once it is known how they ended. What a task was not charged of its `price` is its shortfall.

        `price` None: the task owes nothing, or its price is not known.
        """
        shortfall = self.shortfall if price is None else max(0, price - charged)
        known = {"charged": charged, "returned": returned, "shortfall": shortfall}
        return self.model_copy(update={**known, "settlement": SettlementState.SETTLED})


def with_settlement(values: Any, *, has_ended: bool) -> Any:
    """A result or row as data: `credits` of an ended task without a settlement (release 0.1.0) were settled."""
    credits = values.get("credits") if isinstance(values, dict) else None
    if not has_ended or not isinstance(credits, dict) or "settlement" in credits:
        return values
    return {**values, "credits": {**credits, "settlement": SettlementState.SETTLED.value}}


class TaskResult(OwnModel):
    """What both results share. A failed run's details are the same object; without an input that can be read, none."""

    task_id: str
    status: TaskStatus
    estimated_time: float | None = None
    """Minutes."""
    gpu_slots: int | None = None
    error_details: ErrorDetails | None = None
    attempts: int = 0
    credits: CreditsSummary = CreditsSummary()

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_release(cls, values: Any) -> Any:
        return with_settlement(values, has_ended=True)


class ImageResult(TaskResult):
    """Result of `ImageGenerationWorkflow`."""

    job_id: str | None = None
    result_urls: list[str] = []


class TrainingResult(TaskResult):
    """Result of `TrainingWorkflow`."""

    training_id: str | None = None
    output: TrainingOutput | None = None


class ImageProgress(OwnModel):
    """Answer to the query `progress`. `estimated_time` in minutes, `progress` 0 to 100."""

    task_id: str
    status: TaskStatus
    stage: str | None = None
    progress: float = 0.0
    next_eta: Instant | None = None
    estimated_time: float | None = None
    gpu_slots: int | None = None
    queue_position: int | None = None
    as_of: Instant | None = None
    """When these figures were news; None before the attempt's job has reported. The store may have newer ones."""
    job_id: str | None = None
    attempts: int = 0
    error_details: ErrorDetails | None = None
    callbacks_refused: int = 0


class Confirmation(OwnModel):
    """The price of a training that is to be confirmed, in points, and the time until which the training waits for that.

    Without `confirm_by` it does not wait: it runs on, and stops at its next checkpoint unless the price is confirmed.
    """

    estimated_cost: int
    options: list[PriceOption] = []
    current_balance: int | None = None
    suggest_topup: int | None = None
    confirm_by: Instant | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_what_is_kept(cls, values: Any) -> Any:
        """A `PriceToConfirm` as data."""
        is_running = isinstance(values, dict) and values.get("is_running")
        return {**values, "confirm_by": None} if is_running else values


class TrainingProgress(ImageProgress):
    """As `ImageProgress` (`job_id` holds the training's id), and `confirmation` while it waits."""

    confirmation: Confirmation | None = None


class TaskDelay(OwnModel):
    """Why a task makes no progress now: a call that is being retried, a pause, a run that is not given back yet."""

    code: str
    """The failure's code of contract §1, `terminated` or `paused`."""
    sentence: str
    """The cause, and what to do about it."""
    call: str | None = None
    """The call that is retried, e.g. `pre_deduct`."""
    tries: int = 0
    """How often it failed."""
    since: Instant | None = None
    until: Instant | None = None
    """When the task gives up; null: see `limit`."""
    limit: str | None = None
    """What ends the retries if `until` is null."""
    next_try_at: Instant | None = None


class CancelTask(CallerModel):
    """Argument of the update and of the signal `cancel_task`."""

    reason: CallerMessage = ""


class CancelTaskOutcome(OwnModel):
    """`accepted`: the task ends cancelled. `too_late`: it was delivered or ended first."""

    outcome: Literal["accepted", "too_late"]


class ConfirmPrice(CallerModel):
    """Argument of the update and of the signal `confirm_price`: the ceiling in points. It can only be raised."""

    max_credits: CallerPoints


class ConfirmPriceOutcome(OwnModel):
    """The ceiling in force after the update, in points."""

    max_credits: int
