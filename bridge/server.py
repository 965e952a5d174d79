"""What the bridge needs from a ComfyUI server: the interface `Server`, with its models and errors.

A server queues graphs under ids that the bridge chooses, runs them one at a time, keeps the result of each, and stores
files. `bridge/native` implements it for ComfyUI's own API. Another kind of server is another module that implements it;
`gpu_worker.py` is the only place that creates one.

ServerError
├── ServerUnavailable   no answer in time, 5xx: the request may have taken effect
│   └── NotListening    no connection
├── UnexpectedAnswer    an answer that such a server never gives: another program, a proxy
├── UnsupportedServer   from `describe` only: the server cannot be used safely
├── SubmitRefused       from `submit` only: refused, but not because of the graph; nothing was queued
└── PromptRefused       the graph or a file was refused: the job ends with `details`
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import OwnModel

TEMPORARY: Final = "temp"
"""The type of files that are never results."""


@dataclass(frozen=True)
class FileParts:
    """A file that is sent as it is read, so that a large one is never whole in memory."""

    size_bytes: int
    parts: AsyncIterator[bytes]


Content = bytes | FileParts


class ServerError(Exception):
    """A request to a server failed; the text names the server and the reason."""


class ServerUnavailable(ServerError):
    """No usable answer. The request may or may not have taken effect."""


class NotListening(ServerUnavailable):
    """Nothing takes connections at its address: the server's process is gone."""


class UnexpectedAnswer(ServerError):
    """The answer did not come from a server of this kind."""


class UnsupportedServer(ServerError):
    """The server works, but the bridge cannot use it safely."""


class SubmitRefused(ServerError):
    """The server, or a proxy before it, takes no graph now. `is_too_large`: this request was too large for it."""

    def __init__(self, text: str, *, is_too_large: bool = False) -> None:
        super().__init__(text)
        self.is_too_large = is_too_large


class PromptRefused(ServerError):
    """A definite refusal. `details` is the error that the job ends with."""

    def __init__(self, details: ErrorDetails) -> None:
        super().__init__(details.message)
        self.details = details


class PromptState(StrEnum):
    """Where a prompt is on its server."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class ResultFile(OwnModel):
    """One file that a run left on its server. Only the server reads `subfolder` and `type`."""

    node: str
    kind: str
    """The list that the node returned it in: `images`, `gifs`, `audio`, …"""
    filename: str
    subfolder: str = ""
    type: str = "output"


@dataclass(frozen=True)
class PromptResult:
    """How a prompt ended. `error` is None if it succeeded; `seconds` is its run time, 0 if unknown."""

    files: list[ResultFile] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Text outputs, which are in no file."""
    empty_nodes: list[str] = field(default_factory=list)
    """The result nodes that gave neither a file nor a text."""
    error: ErrorDetails | None = None
    seconds: float = 0.0
    is_servers_fault: bool = False
    """The error is of the server, such as a broken GPU: the next prompt would fail there as well."""
    is_interrupted: bool = False
    """Someone stopped the run at the server."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as its server reports it. `result` is set once it has ended."""

    state: PromptState
    result: PromptResult | None = None


@dataclass(frozen=True)
class PromptUpdate:
    """One message about a running prompt: only what changed. Even an empty one shows that the server is at work."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Node id → share of its work that is done, from 0 to 1."""
    cached: frozenset[str] | None = None
    """All nodes whose outputs were cached; None if the message does not say."""
    is_end: bool = False
    """The prompt has ended or is about to end: look it up soon."""
    blocked: str = ""
    """A node let the run go on without what depends on it, for this reason."""
    is_deaf: bool = False
    """The connection for messages broke: until the next message, silence says nothing about the prompt."""


@dataclass(frozen=True)
class QueueState:
    """Prompt ids, of other clients too. `pending` is in the order in which they will run."""

    running: list[str]
    pending: list[str]

    @property
    def is_empty(self) -> bool:
        return not self.running and not self.pending


@dataclass(frozen=True)
class ServerDescription:
    """`version` is empty if unknown; `gpu_type` is a short name such as `rtx-4090`."""

    version: str
    gpu_type: str


class FileUse(StrEnum):
    """What a graph uses an uploaded file for."""

    INPUT = "input"
    LORA = "lora"


class Server(Protocol):
    """One server. Methods raise ServerError, and nothing else unless they say so."""

    @property
    def url(self) -> str:
        """The address, for logs and messages."""

    async def describe(self) -> ServerDescription:
        """Version and GPU. Raises UnsupportedServer."""

    async def node_types(self) -> Mapping[str, Any]:
        """The node types that graphs may use, in the format of ComfyUI's `/object_info` (see graph_check.py)."""

    async def queue(self) -> QueueState:
        """What runs and what waits now."""

    async def look_up(self, prompt_id: str, result_nodes: Sequence[str]) -> Prompt:
        """Where a prompt is; once it has ended, its result has the outputs of `result_nodes`."""

    async def submit(self, graph: Mapping[str, Any], prompt_id: str, result_nodes: Sequence[str] = ()) -> None:
        """Queue a graph (API format) under this id, for these nodes only. Raises PromptRefused, SubmitRefused.

        Callers look the id up first: a server may run a duplicate a second time. A server that cannot limit a run to
        some nodes runs the whole graph.
        """

    def follow(self, prompt_id: str, on_update: Callable[[PromptUpdate], None]) -> AbstractAsyncContextManager[None]:
        """Call `on_update` for each message about the prompt while the body runs. Raises nothing.

        The context is entered before the submit, so that no message is missed. Updates are hints: callers poll as
        well.
        """

    async def cancel(self, prompt_id: str) -> PromptState:
        """Make this prompt stop, or never start, and leave all others alone. Returns where it was before."""

    async def upload(
        self, name: str, content: Content, *, content_type: str, folder: str = "", use: FileUse = FileUse.INPUT
    ) -> str:
        """Store a file on the server, replacing one of the same name. Returns the name to use in graphs.

        Raises PromptRefused if the file is too large, and what reading its parts raises.
        """

    def fetch(self, file: ResultFile) -> AbstractAsyncContextManager[tuple[str, AsyncIterator[bytes]]]:
        """A file's content type and its bytes as they arrive. Raises FileNotFoundError if it is gone."""

    async def produced(self, prompt_id: str) -> list[ResultFile]:
        """Every file that an ended prompt left, of all its nodes, temporary ones too."""

    async def erase(self, file: ResultFile) -> None:
        """Free a file's space, so that nobody reads it again. A missing file is no error; its name may stay."""

    async def forget(self, prompt_id: str) -> None:
        """Drop an ended prompt from the server's history."""

    async def log_lines(self) -> list[str]:
        """The server's latest log lines; empty if it does not offer them."""
