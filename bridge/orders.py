"""Models that the bridge's workflows and activities exchange: a job as it is accepted, rendered and run."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from pydantic import Field, JsonValue

from bridge.server import ResultFile
from comfyui_temporal.contracts.comfyui import DatasetSnapshot, JobRequest, TaskPriority, TrainingRequest
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.fields import OwnModel, repaired, shortened
from comfyui_temporal.contracts.uploads import SUFFIXES, InputKind

Graph = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id → `class_type`, `inputs`, `_meta`."""


MOST_REASONS: Final = 8


class Upload(OwnModel):
    """A graph input that names a file of the request. It is filled in once the file is on the server that runs it."""

    node: str
    input: str
    control: int = Field(ge=0)
    """Index in the request's `controls`; from their number on, in the graph's `files`."""


class InputFile(OwnModel):
    """A file that an extra of the request names, and the kind of file that the template takes there."""

    name: str
    """The extra's."""
    kind: InputKind
    address: str


class ModelChoice(OwnModel):
    """A graph input that names a model: the first installed one that fits the first fitting pattern."""

    node: str
    input: str
    prefer: list[str]
    """Shell patterns, best first."""


class LoraInput(OwnModel):
    """A graph input that names a trained model. It is filled in once the model is on the server that runs the graph."""

    node: str
    input: str
    lora: int = Field(ge=0)
    """Index in the request's `loras`."""


class StoredLora(OwnModel):
    """A model in the bridge's own storage."""

    path: str
    sha256: str | None = None
    size_bytes: int
    """0 of one that is still to be fetched."""
    address: str | None = None
    """Where it is fetched from before the job is queued; None: it was trained here."""


class RenderedGraph(OwnModel):
    """A template with one request's values filled in: everything that a server needs to run it."""

    template_id: str
    pool: str
    graph: dict[str, JsonValue]
    uploads: list[Upload] = []
    files: list[InputFile] = []
    """Beside the request's `controls`: what its extras name."""
    models: list[ModelChoice] = []
    lora_inputs: list[LoraInput] = []
    loras: list[StoredLora] = []
    """In the order of the request's `loras`."""
    result_nodes: list[str]
    images: int = 1
    """How many the results must have at least."""
    keep_metadata: bool = False
    """Results keep what ComfyUI writes into them: the graph, with the prompt."""
    expected_seconds: float = Field(gt=0)
    """Run time by the manifest, until runs were measured."""


class ControlFile(OwnModel):
    """A control image, or another file of the request, in the bridge's own storage.

    `size_bytes` and `content_type` are verified.
    """

    path: str
    content_type: str
    size_bytes: int


def control_name(number: int, control: ControlFile) -> str:
    """The file's name on a server."""
    return f"control-{number}{SUFFIXES.get(control.content_type, '.png')}"


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
    """A tick's number is this base plus the whole percent (`TICKS`)."""
    first_percent: int = 0
    """What an earlier run of the job had reached. Published progress never falls."""
    tick_fields: dict[str, JsonValue] = {}
    """The other fields of the job's state, for ticks."""
    progress_from: float = 0.0
    progress_to: float = 100.0
    """The part of the stage's progress that this run covers."""
    named_files: list[ResultFile] = []
    """Files that a node writes without listing them in the history (`SaveLoRA`)."""
    existing_lora: ExistingLora | None = None


class ExistingLora(OwnModel):
    """A checkpoint in storage to continue from: uploaded under this name and named in these inputs."""

    path: str
    name: str
    """Below the server's folder of trained LoRAs. ComfyUI reads the steps from `_{steps}_steps_` in it."""
    inputs: list[tuple[str, str]]
    """(node, input) pairs."""


class RunEstimate(OwnModel):
    """How long a run on a server still takes, as its worker sees it, and its whole percent."""

    left_seconds: float = Field(ge=0, le=86_400 * 30)
    percent: int = Field(ge=0, le=100)


class GraphOutcome(OwnModel):
    """How a run ended. `error` is set if it failed; `seconds` is the time on the server."""

    files: list[ResultFile] = []
    texts: list[str] = []
    error: ErrorDetails | None = None
    seconds: float = 0.0
    percent: int = 0
    loss: float | None = None
    """The last loss in a training's log, if the server offers its log."""
    was_found: bool = False
    """The server knew the prompt at the first look-up, and no attempt of this call had sent it."""


class ServerTaken(OwnModel):
    """The server that took a job: its name, and its worker's task queue."""

    server: str
    task_queue: str
    gpu_type: str


class TakeOrder(OwnModel):
    """A job that waits for a server. `avoid`: the servers that failed it; they leave it to others for a while."""

    job_id: str
    run: int
    avoid: list[str] = []
    template_id: str = ""
    """Empty in the orders of an older version: such a job is never handed over."""
    is_handed_over: bool = False
    """It waits in its template's queue."""


class TemplatePlace(OwnModel):
    """A template, and the pool whose servers run it."""

    pool: str
    template_id: str


class Missing(OwnModel):
    """What a server lacks for a template. `code`: `model_missing` or `workflow_invalid` (contract §1)."""

    code: str
    reasons: list[str]

    @classmethod
    def of(cls, code: FailureCode, reasons: list[str]) -> Missing:
        """With as many and as long reasons as a memo can hold."""
        return cls(code=code.value, reasons=[shortened(repaired(reason), 300) for reason in reasons[:MOST_REASONS]])


class ServerReport(OwnModel):
    """What a server's worker says of it. `identity` is the worker's in Temporal."""

    name: str
    identity: str
    unfit: dict[str, Missing] = {}
    """Template → what is missing."""
    unknown: list[str] = []
    """Templates that wait for the server's lists of nodes and models."""
    templates: list[str] | None = None
    """All templates that the worker has; None: an older worker, which does not say."""
    sick_since: datetime | None = None
    sick_reason: str = ""
    cold: list[str] = []
    """Templates whose warm-up run is still to come."""
    failed_warm_ups: dict[str, str] = {}
    """Template → why its warm-up run failed."""
    has_left: bool = False

    def can_run(self, template_id: str) -> bool:
        return template_id not in self.unfit and template_id not in self.unknown

    def has(self, template_id: str) -> bool:
        return self.templates is None or template_id in self.templates

    def summary(self) -> str:
        """One line for the Temporal UI."""
        if self.has_left:
            return f"{self.name} has left"
        health = f"sick: {self.sick_reason}" if self.sick_since else "well"
        lacks = f", cannot run {', '.join(sorted(self.unfit))}" if self.unfit else ""
        failed = f", warm-up failed: {', '.join(sorted(self.failed_warm_ups))}" if self.failed_warm_ups else ""
        return shortened(f"{self.name} is {health}{lacks}{failed}", 190)


class FailedRun(OwnModel):
    """Details of the failure with which a run leaves its server. A lost heartbeat leaves the first two only."""

    percent: int = 0
    was_sent: bool = False
    """The server had accepted the prompt."""
    is_over: bool = False
    """The prompt has ended there: the next one needs a new id."""
    error: ErrorDetails | None = None
    """What the server said of the run."""


class StoredResult(OwnModel):
    """One result in the bridge's storage, below the job's folder."""

    path: str
    content_type: str
    size_bytes: int
    sha256: str | None = None
    """Of a checkpoint."""


class CopyOrder(OwnModel):
    job_id: str
    folder: str = ""
    """Target folder; default: the job's results."""
    files: list[ResultFile]
    texts: list[str] = []
    keep_metadata: bool = False


class DatasetOrder(OwnModel):
    """A training's dataset, to be uploaded to the server that trains."""

    training_id: str
    snapshot: DatasetSnapshot
    list_sha256: str | None = None
    """Set if the list of files is long: it is in the bridge's storage (`long_list`), and `snapshot` has none."""


class CleanOrder(OwnModel):
    """What a job or training leaves on a server once it is copied, or over: its prompts and its files."""

    job_id: str
    prompts: list[str] = []
    files: list[ResultFile] = []
    """Files that no prompt's history names."""
    dataset: DatasetOrder | None = None


class Callback(OwnModel):
    """One state of a job, for its task. `body` is fixed when the state is reached."""

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
    manifest_seconds: float = 0.0
    """The run time by the manifest alone; 0 in the jobs of an older version. The graph has the expected one."""
    is_for_some: bool = False
    """Not every server of the pool can run it: it waits in its template's queue from the start."""

    @property
    def priority(self) -> TaskPriority:
        return self.request.priority


class JobView(OwnModel):
    """A job's state: the wire's fields, with tenant and task."""

    tenant_id: str
    task_id: str
    pool: str = ""
    priority: TaskPriority = TaskPriority.STANDARD
    fields: dict[str, JsonValue]
    sequence: int
    tick_base: int | None = None
    """Set while a graph runs: the number of a heartbeat's percent counts from here."""
    progress_from: float = 0.0
    progress_to: float = 100.0


class ControlsOrder(OwnModel):
    """Control images to fetch for a job, as the request names them (`image_url`), and then its other files."""

    job_id: str
    tenant_id: str
    controls: list[dict[str, JsonValue]]
    files: list[InputFile] = []


class ModelsOrder(OwnModel):
    """Models to fetch for a job."""

    job_id: str
    loras: list[StoredLora]


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
    """A training template with its hyperparameters filled in, and the inputs that change from chunk to chunk."""

    rendered: RenderedGraph
    save_node: str
    folder: list[Ref]
    steps: list[Ref]
    existing_lora: list[Ref]
    lora_prefix: list[Ref]
    seeds: list[Ref] = []


class TrainingJob(OwnModel):
    """Input of `ComfyUITrainingWorkflow`. Times are minutes from `start`; epochs and steps count over resumes."""

    training_id: str
    request: TrainingRequest
    list_sha256: str | None = None
    """As in `DatasetOrder`. The request's dataset then has no files: Temporal inputs are limited to 2 MiB."""
    graph: TrainingGraph
    epochs: int
    steps_per_epoch: int
    epochs_per_chunk: int
    first_epoch: int = 0
    first_step: int = 0
    resume_path: str | None = None
    checkpoint_root: str
    """The storage's own address, with which `checkpoint.uri` begins."""
    seconds_per_step: float
    gpu_hours: float
    estimated_time: float
    gpu_slots: int
    gpu_type: str
    is_for_some: bool = False
    """As in `ImageJob`."""
    dataset_summary: str = ""
    """What is trained on and what is left out, for people."""
