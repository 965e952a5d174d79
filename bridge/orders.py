"""What the bridge's workflows and activities hand to each other: one job as it was taken, rendered and run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, JsonValue

from contracts.comfyui import JobRequest, TaskPriority
from contracts.errors import ErrorDetails
from contracts.fields import OwnModel

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


class NativeFile(OwnModel):
    """One file that a run left on its server, as `/view` takes it."""

    node: str
    kind: str
    """`images`, `gifs`, `audio`, `text`, … as the history names the list."""
    filename: str
    subfolder: str = ""
    type: str = "output"


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


class GraphOutcome(OwnModel):
    """How a run ended. `error` is set where it failed; `seconds` is the time on the server."""

    files: list[NativeFile] = []
    texts: list[str] = []
    error: ErrorDetails | None = None
    seconds: float = 0.0
    percent: int = 0


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
    tenant_id: str
    files: list[NativeFile]
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
    fields: dict[str, JsonValue]
    sequence: int
    tick_base: int | None = None
    """Set while a graph runs: what its heartbeat tells is numbered from here."""


class ControlsOrder(OwnModel):
    """Control images to fetch for a job, as the request names them (`image_url`)."""

    job_id: str
    tenant_id: str
    controls: list[dict[str, JsonValue]]
