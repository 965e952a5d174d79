"""One ComfyUI server, as ComfyUI itself speaks (0.3.64 to 0.38): HTTP here, the WebSocket in native_events.py.

Deliberate departures from what its own page does:
1. The truth about a prompt is `/queue`, then `/history`: asked the other way round, one that is just ending is in
   neither. Messages of the WebSocket only make us look earlier.
2. A prompt id is ours, and a prompt is looked up before it is sent: a duplicate would be queued and run twice.
3. Nothing is ever interrupted or deleted but by its id.
4. No `Origin` header: with one, ComfyUI refuses what does not come from its own page.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import httpx

from bridge.native_errors import PromptRefused, ServerConfused, ServerSilent, execution_details, refusal_details
from bridge.orders import NativeFile
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import repaired, shortened
from runtime.http_transport import PatientClient

CONNECT_SECONDS: Final = 3.0
READ_SECONDS: Final = 20.0
"""ComfyUI answers from the process whose threads run the graph: a busy one is slow."""
MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""`/object_info` of a server with many custom nodes has tens of megabytes."""
NOT_OFFERED: Final = frozenset({404, 405, 501})
TEMPORARY: Final = "temp"
FILE_KINDS_TOLD_AS_TEXT: Final = "text"


class Standing(StrEnum):
    """Where a prompt is on its server."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class Found:
    """A prompt as its server has it. `entry` is its history where it has ended."""

    standing: Standing
    entry: Mapping[str, Any] = field(default_factory=dict)

    def error(self) -> ErrorDetails | None:
        """How it failed, or None where it succeeded."""
        status = self.entry.get("status")
        if isinstance(status, Mapping) and status.get("status_str") == "error":
            return execution_details(status.get("messages"))
        return None

    def files(self, result_nodes: list[str]) -> list[NativeFile]:
        """Every kind of file of these nodes, with its subfolder, without temporary ones."""
        return [file for file in _files(self.entry.get("outputs"), result_nodes) if file.type != TEMPORARY]

    def texts(self, result_nodes: list[str]) -> list[str]:
        """What the nodes said in words (`text`), which lies in no file."""
        outputs = self.entry.get("outputs")
        said: list[str] = []
        for node in result_nodes:
            lists = outputs.get(node) if isinstance(outputs, Mapping) else None
            words = lists.get(FILE_KINDS_TOLD_AS_TEXT) if isinstance(lists, Mapping) else None
            said += [repaired(word) for word in words if isinstance(word, str)] if isinstance(words, list) else []
        return said


@dataclass(frozen=True)
class QueueSeen:
    """Prompt ids; pending in the order in which they will run."""

    running: list[str]
    pending: list[str]

    @property
    def is_empty(self) -> bool:
        return not self.running and not self.pending


class NativeServer:
    """An async context manager around one pooled client. Every method raises NativeFailure and nothing else."""

    def __init__(self, url: str, *, read_seconds: float = READ_SECONDS) -> None:
        """Raises ValueError for an address that is no http or https one."""
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise ValueError(f"{url!r} is no http:// or https:// address of a ComfyUI server")
        self.url = str(parsed).rstrip("/")
        self._client = PatientClient(
            timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=16, keepalive_expiry=5),
            follow_redirects=False,
            headers={"accept": "application/json, */*", "user-agent": "comfyui-temporal"},
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    @property
    def ws_url(self) -> str:
        return "ws" + self.url.removeprefix("http") + "/ws"

    # Reading

    async def system_stats(self) -> Mapping[str, Any]:
        """`system` (with `comfyui_version`) and `devices`."""
        return _mapping(await self._json("GET", "/system_stats"), "/system_stats")

    async def object_info(self) -> Mapping[str, Any]:
        return _mapping(await self._json("GET", "/object_info"), "/object_info")

    async def queue(self) -> QueueSeen:
        body = _mapping(await self._json("GET", "/queue"), "/queue")
        running, pending = body.get("queue_running"), body.get("queue_pending")
        if not isinstance(running, list) or not isinstance(pending, list):
            raise ServerConfused(f"{self.url}/queue gave no queue_running and queue_pending")
        # A heap: only its first element is in place.
        waiting = sorted((item for item in pending if _is_item(item)), key=lambda item: float(item[0]))
        return QueueSeen([str(item[1]) for item in running if _is_item(item)], [str(item[1]) for item in waiting])

    async def find(self, prompt_id: str) -> Found:
        """Where a prompt is: `/queue` first, then `/history`."""
        queue = await self.queue()
        if prompt_id in queue.running:
            return Found(Standing.RUNNING)
        if prompt_id in queue.pending:
            return Found(Standing.PENDING)
        history = _mapping(await self._json("GET", f"/history/{quote(prompt_id, safe='')}"), "/history")
        entry = history.get(prompt_id)
        return Found(Standing.ENDED, entry) if isinstance(entry, Mapping) else Found(Standing.UNKNOWN)

    async def log_lines(self) -> list[str]:
        """What the server printed last, or nothing where it does not tell (`/internal/logs/raw`)."""
        response = await self._request("GET", "/internal/logs/raw")
        if response.status_code != 200:
            return []
        body = self._parsed(response, "/internal/logs/raw")
        entries = body.get("entries") if isinstance(body, Mapping) else None
        lines = [entry.get("m") for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
        return [line for line in lines if isinstance(line, str)]

    # Acting

    async def submit(self, graph: Mapping[str, Any], *, prompt_id: str, client_id: str) -> None:
        """Queue a graph. Raises PromptRefused where the graph is, `node_errors` on a 200 among it."""
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": client_id}
        response = await self._request("POST", "/prompt", json=body)
        if response.status_code == 400:
            raise PromptRefused(refusal_details(self._parsed(response, "/prompt")))
        answer = _mapping(self._checked(response, "/prompt"), "/prompt")
        if answer.get("node_errors"):
            # Outputs were dropped, the rest is queued: a half result is none.
            await self.cancel(prompt_id)
            raise PromptRefused(refusal_details(answer))
        if answer.get("prompt_id") != prompt_id:
            raise ServerConfused(f"{self.url}/prompt answered for another prompt than the one that was sent")

    async def cancel(self, prompt_id: str) -> Standing:
        """Ask once that this prompt, and no other, stop or never begin; where it was before that."""
        response = await self._request("POST", f"/api/jobs/{quote(prompt_id, safe='')}/cancel", json={})
        found = await self.find(prompt_id)
        if response.status_code in NOT_OFFERED:
            if found.standing is Standing.PENDING:
                self._checked_status(await self._request("POST", "/queue", json={"delete": [prompt_id]}), "/queue")
            elif found.standing is Standing.RUNNING:
                answer = await self._request("POST", "/interrupt", json={"prompt_id": prompt_id})
                self._checked_status(answer, "/interrupt")
        else:
            self._checked_status(response, "/api/jobs/…/cancel")
        return found.standing

    async def forget(self, prompt_id: str) -> None:
        """Take a prompt out of the history, where its texts would stand for whoever asks the server."""
        await self._request("POST", "/history", json={"delete": [prompt_id]})

    async def upload(
        self, name: str, content: bytes, *, content_type: str, subfolder: str = "", kind: str = "input"
    ) -> str:
        """Put a file on the server; the name that graphs know it by, which may be another than asked for."""
        fields = {"type": kind, "subfolder": subfolder, "overwrite": "true"}
        files = {"image": (name, content, content_type)}
        response = await self._request("POST", "/upload/image", data=fields, files=files)
        if response.status_code == 413:
            raise PromptRefused(
                ErrorDetails(code="workflow_invalid", message=f"{name} is larger than {self.url} takes uploads.")
            )
        answer = _mapping(self._checked(response, "/upload/image"), "/upload/image")
        given = answer.get("name")
        if not isinstance(given, str):
            raise ServerConfused(f"{self.url}/upload/image gave no name")
        below = answer.get("subfolder")
        return f"{below}/{given}" if isinstance(below, str) and below else given

    @asynccontextmanager
    async def view(self, file: NativeFile) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        """A file's content type and its bytes as they come. Raises FileNotFoundError where it is gone."""
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        request = self._client.build_request("GET", self.url + "/view", params=query)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._silent("/view", error) from None
        try:
            if response.status_code == 404:
                raise FileNotFoundError(file.filename)
            self._checked_status(response, "/view")
            yield response.headers.get("content-type", "application/octet-stream"), self._chunks(response)
        finally:
            await response.aclose()

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for chunk in response.aiter_bytes():
                yield chunk
        except httpx.HTTPError as error:
            raise self._silent("/view", error) from None

    async def _json(self, method: str, path: str) -> Any:
        return self._checked(await self._request(method, path), path)

    async def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return await self._client.request(method, self.url + path, **content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(path, error) from None

    def _silent(self, path: str, error: Exception) -> ServerSilent:
        said = shortened(repaired(str(error)), 200) or type(error).__name__
        return ServerSilent(f"ComfyUI at {self.url} did not answer {path}: {said}")

    def _checked(self, response: httpx.Response, path: str) -> Any:
        self._checked_status(response, path)
        return self._parsed(response, path)

    def _checked_status(self, response: httpx.Response, path: str) -> None:
        if response.status_code >= 500:
            raise ServerSilent(f"ComfyUI at {self.url} answered {path} with HTTP {response.status_code}")
        if not 200 <= response.status_code < 300:
            raise ServerConfused(
                f"{self.url}{path} answered HTTP {response.status_code}: is this a ComfyUI server (0.3.64 or later)?"
            )

    def _parsed(self, response: httpx.Response, path: str) -> Any:
        if len(response.content) > MAX_REPLY_BYTES:
            raise ServerConfused(f"{self.url}{path} answered more than {MAX_REPLY_BYTES} bytes")
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise ServerConfused(f"{self.url}{path} answered what is no JSON: is this a ComfyUI server?") from None


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ServerConfused(f"{path} answered no JSON object: is this a ComfyUI server?")
    return value


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) >= 2 and isinstance(item[0], int | float)


def _files(outputs: Any, result_nodes: list[str]) -> list[NativeFile]:
    files: list[NativeFile] = []
    for node in result_nodes:
        lists = outputs.get(node) if isinstance(outputs, Mapping) else None
        for kind, items in lists.items() if isinstance(lists, Mapping) else ():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, Mapping) and isinstance(item.get("filename"), str):
                    files.append(
                        NativeFile(
                            node=node,
                            kind=str(kind),
                            filename=item["filename"],
                            subfolder=str(item.get("subfolder") or ""),
                            type=str(item.get("type") or "output"),
                        )
                    )
    return files
