"""A server that is not ComfyUI: everything in memory, for tests of the interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bridge.server import (
    Content,
    FileUse,
    Prompt,
    PromptResult,
    PromptState,
    PromptUpdate,
    QueueState,
    ResultFile,
    ServerDescription,
)
from comfyui_temporal.contracts.errors import ErrorDetails

Graph = Mapping[str, Any]


class MemoryServer:
    """Runs a prompt in two look-ups: running at the first, ended at the second. `failure` is how prompts end."""

    url = "memory://server"

    def __init__(self, content: bytes = b"a picture", failure: ErrorDetails | None = None) -> None:
        self.submitted: dict[str, Graph] = {}
        self.cancelled: list[str] = []
        self._content = content
        self._failure = failure
        self._followers: dict[str, Callable[[PromptUpdate], None]] = {}
        self._running: set[str] = set()
        self._stopped: set[str] = set()

    async def describe(self) -> ServerDescription:
        return ServerDescription(version="1", gpu_type="memory")

    async def node_types(self) -> Mapping[str, Any]:
        return {}

    async def queue(self) -> QueueState:
        return QueueState(running=sorted(self._running), pending=[])

    async def look_up(self, prompt_id: str, result_nodes: Sequence[str]) -> Prompt:
        if prompt_id in self._stopped:
            error = ErrorDetails(code="cancelled", message="It was stopped.", retryable=False)
            return Prompt(PromptState.ENDED, PromptResult(error=error, is_interrupted=True))
        if prompt_id not in self.submitted:
            return Prompt(PromptState.UNKNOWN)
        if prompt_id in self._running:
            self._running.discard(prompt_id)
            self._update(prompt_id, PromptUpdate(shares=dict.fromkeys(self.submitted[prompt_id], 0.5), is_end=True))
            return Prompt(PromptState.RUNNING)
        return Prompt(PromptState.ENDED, self._result(prompt_id, result_nodes))

    async def submit(self, graph: Graph, prompt_id: str, result_nodes: Sequence[str] = ()) -> None:
        self.submitted[prompt_id] = graph
        self._running.add(prompt_id)

    @asynccontextmanager
    async def follow(self, prompt_id: str, on_update: Callable[[PromptUpdate], None]) -> AsyncIterator[None]:
        self._followers[prompt_id] = on_update
        yield
        del self._followers[prompt_id]

    async def cancel(self, prompt_id: str) -> PromptState:
        self.cancelled.append(prompt_id)
        if prompt_id in self._running:
            self._running.discard(prompt_id)
            self._stopped.add(prompt_id)
            return PromptState.RUNNING
        return PromptState.ENDED if prompt_id in self.submitted else PromptState.UNKNOWN

    async def upload(
        self, name: str, content: Content, *, content_type: str, folder: str = "", use: FileUse = FileUse.INPUT
    ) -> str:
        return f"{folder}/{name}"

    @asynccontextmanager
    async def fetch(self, file: ResultFile) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        if not any(file.filename == f"{node}.png" for graph in self.submitted.values() for node in graph):
            raise FileNotFoundError(file.filename)

        async def chunks() -> AsyncIterator[bytes]:
            yield self._content

        yield "image/png", chunks()

    async def produced(self, prompt_id: str) -> list[ResultFile]:
        return []

    async def erase(self, file: ResultFile) -> None:
        return None

    async def forget(self, prompt_id: str) -> None:
        return None

    async def log_lines(self) -> list[str]:
        return []

    def _result(self, prompt_id: str, result_nodes: Sequence[str]) -> PromptResult:
        if self._failure is not None:
            return PromptResult(error=self._failure)
        files = [ResultFile(node=node, kind="images", filename=f"{node}.png") for node in result_nodes]
        return PromptResult(files=files, seconds=1.5)

    def _update(self, prompt_id: str, update: PromptUpdate) -> None:
        if prompt_id in self._followers:
            self._followers[prompt_id](update)
