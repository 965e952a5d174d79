"""What the bridge's workflows and activities hand to each other: one job as it was taken, rendered and run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, JsonValue

from bridge.server import ResultFile
from comfyui_temporal.contracts.comfyui import DatasetSnapshot, JobRequest, TaskPriority, TrainingRequest
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import OwnModel

Graph = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id → `class_type`, `inputs`, `_meta`."""


class Upload(OwnModel):
    """A graph input that names a control image, once the image is on the server that runs the graph."""

    node: str
    input: str
    control: int = Field(ge=0)
    """Which of the request's `controls`."""


class ModelChoice(OwnModel):
    """A graph input that takes whichever installed model fits the first of these patterns best."""

    node: str
    input: str
    prefer: list[str]
    """Shell patterns, best first."""


class RenderedGraph(OwnModel):
    """A template with one request's values in it: everything that a server needs to run it."""

    template_id: str
    pool: str
    graph: dict[str, JsonValue]
    uploads: list[Upload] = []
    models: list[ModelChoice] = []
    result_nodes: list[str]
    expected_seconds: float = Field(gt=0)
    """What the manifest says a run takes, until runs were measured."""


class ControlFile(OwnModel):
    """A control image in the bridge's own storage. `size_bytes` and `content_type` were checked."""

    path: str
    content_type: str
    size_bytes: int


class GraphRun(OwnModel):
    """One run of one graph on one server. `run` rises only when the earlier prompt is known to be lost."""

    job_id: str
    tenant_id: str
    task_id: str
    run: int
    prompt_id: str
    graph: RenderedGraph
    controls: list[ControlFile] = []
    callback_url: str
    sequence_base: int
    """Ticks are numbered from here: the base and the whole percent (`TICKS`)."""
    first_percent: int = 0
    """Never less is told: what an earlier run of the job had reached."""
    tick_fields: dict[str, JsonValue] = {}
    """The other fields of the job's state, as a tick tells them."""
    progress_from: float = 0.0
    progress_to: float = 100.0
    """What the run's own 0 and 100 % are in the stage that is told."""
    named_files: list[ResultFile] = []
    """Files that a node writes and tells the history nothing of (`SaveLoRA`)."""
    existing_lora: ExistingLora | None = None


class ExistingLora(OwnModel):
    """A checkpoint in storage to train on from: put on the server under this name, and named in these inputs."""

    path: str
    name: str
    """Below the server's folder of trained LoRAs; it holds `_{steps}_steps_`, which ComfyUI reads the steps from."""
    inputs: list[tuple[str, str]]
    """(node, input) pairs."""


class GraphOutcome(OwnModel):
    """How a run ended. `error` is set where it failed; `seconds` is the time on the server."""

    files: list[ResultFile] = []
    texts: list[str] = []
    error: ErrorDetails | None = None
    seconds: float = 0.0
    percent: int = 0
    loss: float | None = None
    """The last loss that a training's run printed, where the server tells."""


class ServerTaken(OwnModel):
    """Which server took a job: the queue that reaches its worker, and its name for people."""

    server: str
    task_queue: str
    gpu_type: str


class TakeOrder(OwnModel):
    job_id: str
    run: int


class StoredResult(OwnModel):
    """One result in the bridge's storage, below the job's folder."""

    path: str
    content_type: str
    size_bytes: int


class CopyOrder(OwnModel):
    job_id: str
    folder: str = ""
    """Below which to store; default: the job's results."""
    files: list[ResultFile]
    texts: list[str] = []


class Callback(OwnModel):
    """One state of a job, to be told to its task. `body` is fixed when the state is reached."""

    url: str
    webhook_id: str
    body: str


class ImageJob(OwnModel):
    """Input of `ComfyUIJobWorkflow`. `estimated_cost` in points, `estimated_time` in minutes from the submission."""

    job_id: str
    request: JobRequest
    graph: RenderedGraph
    estimated_cost: int
    estimated_time: float
    gpu_slots: int
    queue_position: int | None = None

    @property
    def priority(self) -> TaskPriority:
        return self.request.priority


class JobView(OwnModel):
    """What a job's workflow tells of itself: the fields that the wire shows, and whose they are."""

    tenant_id: str
    task_id: str
    pool: str = ""
    priority: TaskPriority = TaskPriority.STANDARD
    fields: dict[str, JsonValue]
    sequence: int
    tick_base: int | None = None
    """Set while a graph runs: what its heartbeat tells is numbered from here."""
    progress_from: float = 0.0
    progress_to: float = 100.0


class ControlsOrder(OwnModel):
    """Control images to fetch for a job, as the request names them (`image_url`)."""

    job_id: str
    tenant_id: str
    controls: list[dict[str, JsonValue]]


class DatasetOrder(OwnModel):
    """A training's dataset, to be put on the server that trains."""

    training_id: str
    snapshot: DatasetSnapshot
    list_sha256: str | None = None
    """Where the list of files is long it lies in the bridge's storage (`long_list`), and `snapshot` names none."""


def long_list(training_id: str, sha256: str) -> str:
    """The path of a training's list of files in the bridge's storage."""
    return f"datasets/{training_id}/{sha256}.json"


class PublishOrder(OwnModel):
    """A checkpoint that becomes the training's model."""

    source: str
    target: str


Ref = tuple[str, str]
"""(node, input)."""


class TrainingGraph(OwnModel):
    """A training template with the hyperparameters in it, and the inputs that change from chunk to chunk."""

    rendered: RenderedGraph
    save_node: str
    folder: list[Ref]
    steps: list[Ref]
    existing_lora: list[Ref]
    lora_prefix: list[Ref]
    seeds: list[Ref] = []


class TrainingJob(OwnModel):
    """Input of `ComfyUITrainingWorkflow`. Times in minutes from `start`, epochs and steps counted over resumes."""

    training_id: str
    request: TrainingRequest
    list_sha256: str | None = None
    """As `DatasetOrder`'s; then the request's dataset names no files: Temporal takes an input of 2 MiB at most."""
    graph: TrainingGraph
    epochs: int
    steps_per_epoch: int
    epochs_per_chunk: int
    first_epoch: int = 0
    first_step: int = 0
    resume_path: str | None = None
    checkpoint_root: str
    """The storage's own address: `checkpoint.uri` begins with it."""
    seconds_per_step: float
    gpu_hours: float
    estimated_time: float
    gpu_slots: int
    gpu_type: str
