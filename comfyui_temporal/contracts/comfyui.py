"""ComfyUI's wire (contract §2, §3): our requests, its answers and callbacks."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.fields import (
    MAX_POINTS,
    Counted,
    Informative,
    Instant,
    Minutes,
    OutsideId,
    OutsideModel,
    OutsideName,
    OutsideText,
    OwnModel,
    Percent,
    Points,
    Sequence,
    Sha256,
    StatedPoints,
    WebAddress,
    first_of,
    in_json_at_most,
    repaired,
    stated,
)
from comfyui_temporal.contracts.size_budget import MAX_ADDRESS_BYTES, MAX_METRICS, MAX_RESULT_URLS


class Resolution(StrEnum):
    SD = "sd"
    HD = "hd"
    UHD = "4k"


class TaskPriority(StrEnum):
    STANDARD = "standard"
    ACCELERATED = "accelerated"


class JobStatus(StrEnum):
    QUEUED = "queued"
    PROCESSING = "processing"
    DELIVERY = "delivery"


class TrainingStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CHECKPOINTING = "checkpointing"
    COMPLETED = "completed"
    FAILED = "failed"


class TrainingStage(StrEnum):
    DATA_INGEST = "data_ingest"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


def _details_from_text(value: Any) -> Any:
    """`error_details` may be a plain text: `internal`, not retried (contract §1)."""
    if isinstance(value, str):
        return {"code": FailureCode.INTERNAL.value, "message": value, "retryable": False}
    return value


def _out_of_range(field: str, limit: str) -> ErrorDetails:
    message = f"The job was delivered, but its {field} is not between 0 and {limit}: its cost is unknown."
    return ErrorDetails(code=FailureCode.REPLY_INVALID.value, message=message)


OutsideDetails = Annotated[ErrorDetails, BeforeValidator(_details_from_text)]
GpuSlots = Annotated[int, Field(ge=0, le=100_000)]
MAX_GPU_HOURS = 1_000_000
GpuHours = Annotated[float, Field(ge=0, le=MAX_GPU_HOURS)]
StatedHours = Annotated[float, stated(0, MAX_GPU_HOURS)]
"""As `GpuHours`; an out-of-range value is kept just outside the range."""


class LoraFile(OwnModel):
    """A trained model that a job uses, as its training's `output` names it."""

    model_path: str
    sha256: str | None = None
    """None where the training's `output` has none."""
    strength: float


class JobRequest(OwnModel):
    """Body of `POST /comfyui/v1/jobs`."""

    task_id: str
    tenant_id: str
    user_id: str
    template_id: str
    prompt: str
    controls: list[dict[str, JsonValue]] = []
    resolution: Resolution
    priority: TaskPriority
    extras: dict[str, JsonValue] = {}
    loras: list[LoraFile] | None = None
    images: int | None = None
    """How many; None: one."""
    callback_url: str


class JobAccepted(OutsideModel):
    """`202` to `POST /comfyui/v1/jobs`. `estimated_time` in minutes, `estimated_cost` in points."""

    job_id: OutsideId
    job_status: JobStatus = JobStatus.QUEUED
    estimated_time: Annotated[Minutes | None, Informative] = None
    gpu_slots: Annotated[GpuSlots | None, Informative] = None
    estimated_cost: Annotated[Points, Field(ge=0)]


class JobState(OutsideModel):
    """`GET /comfyui/v1/jobs/{job_id}`; a callback holds the same fields (`JobCallback`)."""

    job_id: OutsideId
    job_status: JobStatus
    stage_progress: Annotated[Percent | None, Informative] = None
    next_eta: Annotated[Instant | None, Informative] = None
    estimated_time: Annotated[Minutes | None, Informative] = None
    gpu_slots: Annotated[GpuSlots | None, Informative] = None
    queue_position: Annotated[Counted | None, Informative] = None
    result_urls: Annotated[list[WebAddress], Field(max_length=MAX_RESULT_URLS), BeforeValidator(lambda v: v or [])] = []
    error_details: OutsideDetails | None = None
    actual_cost: StatedPoints | None = None
    sequence: Sequence = 0

    def has_succeeded(self) -> bool:
        return self.error_details is None and self.job_status is JobStatus.DELIVERY and bool(self.result_urls)

    def has_ended(self) -> bool:
        return self.error_details is not None or self.has_succeeded()

    def failure(self) -> ErrorDetails | None:
        """How it failed, or None. A delivery with an invalid cost is `reply_invalid`."""
        is_out_of_range = self.actual_cost is not None and abs(self.actual_cost) > MAX_POINTS
        if self.error_details is None and self.has_succeeded() and is_out_of_range:
            return _out_of_range("actual_cost", f"{MAX_POINTS} points")
        return self.error_details


class JobCancelled(OutsideModel):
    """Answer to `POST …/cancel` of a job or a training: its id only, since no code uses its state."""

    job_id: Annotated[OutsideId | None, Informative] = None
    training_id: Annotated[OutsideId | None, Informative] = None


class JobCallback(JobState):
    """Body of ComfyUI's callback for an image job (signal `comfyui_callback`)."""

    task_id: OutsideText = ""
    occurred_at: Annotated[Instant | None, Informative] = None


class DatasetFile(OwnModel):
    """One file of a snapshot; `path` is relative to the snapshot's folder."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str


class DatasetSnapshot(OwnModel):
    """`dataset` of a training request: the snapshot's address and content."""

    dataset_id: str
    snapshot_uri: str
    files: list[DatasetFile]


class ManifestReference(OwnModel):
    """A snapshot's `manifest.json`: its address, the checksum of its bytes, and its counts."""

    uri: str
    sha256: str
    file_count: int = Field(ge=0)
    total_bytes: int = Field(ge=0)


class SnapshotReference(OwnModel):
    """A snapshot as runs, histories and rows hold it: its list of files by reference (pitfall 39)."""

    dataset_id: str
    snapshot_uri: str
    manifest: ManifestReference | None = None
    files: list[DatasetFile] | None = None
    """The list itself: only in data of release 0.1.0, which had no reference."""


class TrainingDraft(OwnModel):
    """A `TrainingRequest` as history holds it. The manifest's checksum fixes the list that is sent with it."""

    task_id: str
    tenant_id: str
    user_id: str
    base_model: str
    dataset: SnapshotReference
    hyperparameters: dict[str, JsonValue]
    priority: TaskPriority
    gpu_type: str | None = None
    resume_from: str | None = None
    callback_url: str

    def request(self, dataset: DatasetSnapshot) -> TrainingRequest:
        """The body that is sent."""
        return TrainingRequest(**self.model_dump(exclude={"dataset"}), dataset=dataset)


class TrainingRequest(OwnModel):
    """Body of `POST /comfyui/v1/training`."""

    task_id: str
    tenant_id: str
    user_id: str
    base_model: str
    dataset: DatasetSnapshot
    hyperparameters: dict[str, JsonValue]
    priority: TaskPriority
    gpu_type: str | None = None
    resume_from: str | None = None
    callback_url: str


class TrainingAccepted(OutsideModel):
    """`202` to `POST /comfyui/v1/training`. `estimated_time` in minutes from `start`."""

    training_id: OutsideId
    training_status: TrainingStatus = TrainingStatus.QUEUED
    estimated_time: Annotated[Minutes | None, Informative] = None
    gpu_hours: GpuHours
    gpu_slots: Annotated[GpuSlots | None, Informative] = None
    gpu_type: Annotated[OutsideName | None, Informative] = None
    dataset_summary: Annotated[OutsideText | None, Informative] = None
    """What is trained on, and what of the dataset is left out, for people."""

    @property
    def job_id(self) -> str:
        """The training's id, by the name that both scenes share."""
        return self.training_id


def _own_checkpoint_address(uri: str) -> str:
    if any(ord(character) <= 0x20 for character in uri):
        raise ValueError("must not hold blanks or control characters")
    return uri


OutsideUri = Annotated[
    str,
    Field(min_length=1, max_length=2048),
    AfterValidator(repaired),
    AfterValidator(_own_checkpoint_address),
    in_json_at_most(MAX_ADDRESS_BYTES),
]


class Checkpoint(OutsideModel):
    """`checkpoint`: the address to resume from, and the GPU hours used by then."""

    uri: OutsideUri
    epoch: Annotated[Counted | None, Informative] = None
    step: Annotated[Counted | None, Informative] = None
    gpu_hours_used: GpuHours = 0.0


class TrainingOutput(OutsideModel):
    """`output` of a completed training. `metrics` is name → number; the first 64 are kept."""

    model_path: OutsideUri | None = None
    version: Annotated[OutsideName | None, Informative] = None
    sha256: Annotated[Sha256 | None, Informative] = None
    """Checksum of the model's bytes."""
    metrics: Annotated[dict[OutsideName, float] | None, first_of(MAX_METRICS), Informative] = None


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _known_level(value: Any) -> Any:
    return value if value in set(LogLevel) else LogLevel.INFO


class TrainingLogLine(OutsideModel):
    """One line of `log` (callbacks only)."""

    ts: Annotated[Instant | None, Informative] = None
    level: Annotated[LogLevel, BeforeValidator(_known_level)] = LogLevel.INFO
    message: OutsideText = ""


class TrainingState(OutsideModel):
    """`GET /comfyui/v1/training/{id}`. GPU hours are the training's, not the task's."""

    training_id: OutsideId
    training_status: TrainingStatus
    training_stage: TrainingStage | None = None
    stage_progress: Annotated[Percent | None, Informative] = None
    next_eta: Annotated[Instant | None, Informative] = None
    estimated_time: Annotated[Minutes | None, Informative] = None
    gpu_hours: Annotated[GpuHours | None, Informative] = None
    gpu_hours_used: StatedHours | None = None
    gpu_slots: Annotated[GpuSlots | None, Informative] = None
    checkpoint: Annotated[Checkpoint | None, Informative] = None
    output: TrainingOutput | None = None
    error_details: OutsideDetails | None = None
    sequence: Sequence = 0

    @property
    def job_id(self) -> str:
        """The training's id, by the name that both scenes share."""
        return self.training_id

    def has_succeeded(self) -> bool:
        return (
            self.error_details is None
            and self.training_status is TrainingStatus.COMPLETED
            and self.output is not None
            and self.output.model_path is not None
        )

    def has_ended(self) -> bool:
        return self.failure() is not None or self.has_succeeded()

    def failure(self) -> ErrorDetails | None:
        """How it failed, or None. `failed` without details is `internal` (contract §1); as `JobState.failure`."""
        if self.error_details is not None:
            return self.error_details
        is_out_of_range = self.gpu_hours_used is not None and not 0 <= self.gpu_hours_used <= MAX_GPU_HOURS
        if self.has_succeeded() and is_out_of_range:
            return _out_of_range("gpu_hours_used", f"{MAX_GPU_HOURS} hours")
        if self.training_status is TrainingStatus.FAILED:
            return ErrorDetails(code=FailureCode.INTERNAL.value, message="The training failed without details.")
        return None


class TrainingCallback(TrainingState):
    """Body of ComfyUI's callback for a training; `log` never enters the workflow (decision 4)."""

    task_id: OutsideText = ""
    occurred_at: Annotated[Instant | None, Informative] = None
    log: Annotated[list[TrainingLogLine], Field(max_length=10_000)] = []


class GpuPool(OutsideModel):
    """One row of `GET /comfyui/v1/gpus`; `accelerated_wait` in minutes."""

    gpu_type: OutsideName
    total: Annotated[int, Field(ge=0)]
    available: Annotated[int, Field(ge=0)]
    accelerated_wait: Annotated[float | None, Informative] = None
