"""One ComfyUI server, over its own HTTP API (0.3.64 to 0.38).

Deliberate departures from what ComfyUI's own page does:
1. A prompt is looked up in `/queue` first, then in `/history`. In the other order, a prompt that ends in between is
   found in neither. WebSocket messages only make us look earlier.
2. We choose the prompt id, and look it up before the submit: ComfyUI would queue and run a duplicate.
3. Prompts are interrupted and deleted only by id.
4. No `Origin` header: ComfyUI refuses requests with a foreign one.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx

from bridge.native.events import followed
from bridge.native.failures import refusal_details
from bridge.native.file_form import FileForm
from bridge.native.history import files_of, result_of
from bridge.server import (
    Content,
    FileUse,
    NotListening,
    Prompt,
    PromptRefused,
    PromptState,
    PromptUpdate,
    QueueState,
    ResultFile,
    ServerDescription,
    ServerUnavailable,
    SubmitRefused,
    UnexpectedAnswer,
    UnsupportedServer,
)
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.fields import repaired, shortened
from runtime.http_transport import OwnsClient, PatientClient

OLDEST: Final = (0, 3, 56)
"""Before it, `/interrupt` ignores the id and stops whatever runs."""
CONNECT_SECONDS: Final = 3.0
READ_SECONDS: Final = 20.0
"""ComfyUI answers from the process whose threads run the graph, so it is slow when busy."""
SLOW_FACTOR: Final = 6
"""`/object_info` of a server with many custom nodes takes minutes, the first time."""
MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""`/object_info` takes tens of megabytes on a server with many custom nodes."""
NOT_OFFERED: Final = frozenset({404, 405, 501})
_VENDORS: Final = re.compile(r"^(cuda|hip|xpu|mps|cpu)(:\d+)?\s+|\s*:.*$|nvidia|geforce|amd|radeon|intel|\(r\)|\(tm\)")


class NativeServer(OwnsClient):
    """A `Server` around one pooled client. Use it as an async context manager."""

    _client: PatientClient

    def __init__(
        self, url: str, *, headers: Mapping[str, str] | None = None, read_seconds: float = READ_SECONDS
    ) -> None:
        """`headers` go with every request, such as a proxy's `Authorization`.

        Raises ValueError if `url` is not an http:// or https:// address, or has a password in it.
        """
        parsed = httpx.URL(url)
        if parsed.userinfo:
            raise ValueError(
                f"the address of the server at {parsed.host} has a password in it, which logs and process lists show: "
                "set COMFYUI_TEMPORAL_GPU_SERVER_LOGIN"
            )
        # Also an empty query: the path of every request would be read as part of it.
        if parsed.scheme not in ("http", "https") or not parsed.host or "?" in url or "#" in url:
            raise ValueError(f"{url!r} is not an http:// or https:// address of a ComfyUI server")
        self.url = str(parsed).rstrip("/")
        self._headers = dict(headers or {})
        self._slow = httpx.Timeout(SLOW_FACTOR * read_seconds, connect=CONNECT_SECONDS)
        self._client = PatientClient(
            timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=16, keepalive_expiry=5),
            follow_redirects=False,
            headers={"accept": "application/json, */*", "user-agent": "comfyui-temporal", **self._headers},
            trust_env=False,
        )

    @property
    def ws_url(self) -> str:
        return "ws" + self.url.removeprefix("http") + "/ws"

    # Reading

    async def describe(self) -> ServerDescription:
        stats = _mapping(await self._json("GET", "/system_stats"), "/system_stats")
        system = stats.get("system")
        version = str(system.get("comfyui_version") or "") if isinstance(system, Mapping) else ""
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        if numbers and numbers < OLDEST:
            needed = ".".join(str(number) for number in OLDEST)
            raise UnsupportedServer(
                f"ComfyUI at {self.url} is {version}: at least {needed} is needed, to stop a job by its id"
            )
        return ServerDescription(version=version, gpu_type=gpu_type_of(stats))

    async def node_types(self) -> Mapping[str, Any]:
        response = await self._request("GET", "/object_info", timeout=self._slow)
        info = _mapping(self._checked(response, "/object_info"), "/object_info")
        return {**{name: {} for name in await self._replaced_types()}, **info}

    async def _replaced_types(self) -> list[str]:
        """Node types that the server does not have, but replaces by ones that it has. None on an older server."""
        response = await self._request("GET", "/node_replacements")
        if response.status_code != 200:
            return []
        try:
            found = json.loads(response.content)
        except (ValueError, RecursionError):
            return []
        return [str(name) for name in found] if isinstance(found, Mapping) else []

    async def queue(self) -> QueueState:
        body = _mapping(await self._json("GET", "/queue"), "/queue")
        running, pending = body.get("queue_running"), body.get("queue_pending")
        if not isinstance(running, list) or not isinstance(pending, list):
            raise UnexpectedAnswer(f"{self.url}/queue gave no queue_running and queue_pending")
        # ComfyUI returns a heap: only its first element is in order.
        waiting = sorted((item for item in pending if _is_item(item)), key=lambda item: float(item[0]))
        return QueueState([str(item[1]) for item in running if _is_item(item)], [str(item[1]) for item in waiting])

    async def look_up(self, prompt_id: str, result_nodes: Sequence[str] = ()) -> Prompt:
        queue = await self.queue()
        if prompt_id in queue.running:
            return Prompt(PromptState.RUNNING)
        if prompt_id in queue.pending:
            return Prompt(PromptState.PENDING)
        history = _mapping(await self._json("GET", f"/history/{quote(prompt_id, safe='')}"), "/history")
        entry = history.get(prompt_id)
        if not isinstance(entry, Mapping):
            return Prompt(PromptState.UNKNOWN)
        return Prompt(PromptState.ENDED, result_of(entry, result_nodes))

    def follow(self, prompt_id: str, on_update: Callable[[PromptUpdate], None]) -> AbstractAsyncContextManager[None]:
        return followed(self.ws_url, _client_id(prompt_id), prompt_id, on_update, self._headers)

    async def log_lines(self) -> list[str]:
        response = await self._request("GET", "/internal/logs/raw")
        if response.status_code != 200:
            return []
        body = self._parsed(response, "/internal/logs/raw")
        entries = body.get("entries") if isinstance(body, Mapping) else None
        lines = [entry.get("m") for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
        return [line for line in lines if isinstance(line, str)]

    # Acting

    async def submit(self, graph: Mapping[str, Any], prompt_id: str, result_nodes: Sequence[str] = ()) -> None:
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": _client_id(prompt_id)}
        if result_nodes:
            # A server that does not know the field runs every output node of the graph.
            body["partial_execution_targets"] = list(result_nodes)
        response = await self._request("POST", "/prompt", json=body)
        if response.status_code == 400:
            raise PromptRefused(refusal_details(self._parsed(response, "/prompt")))
        if 400 < response.status_code < 500:
            raise SubmitRefused(
                f"ComfyUI at {self.url} refused /prompt with HTTP {response.status_code}",
                is_too_large=response.status_code == 413,
            )
        answer = _mapping(self._checked(response, "/prompt"), "/prompt")
        if answer.get("node_errors"):
            # ComfyUI dropped the wrong outputs and queued the rest: a partial result is useless.
            await self.cancel(prompt_id)
            raise PromptRefused(refusal_details(answer))
        if answer.get("prompt_id") != prompt_id:
            raise UnexpectedAnswer(f"{self.url}/prompt answered with another prompt id than the one that was sent")

    async def cancel(self, prompt_id: str) -> PromptState:
        response = await self._request("POST", f"/api/jobs/{quote(prompt_id, safe='')}/cancel", json={})
        state = (await self.look_up(prompt_id)).state
        if response.status_code in NOT_OFFERED:
            if state is PromptState.PENDING:
                self._checked_status(await self._request("POST", "/queue", json={"delete": [prompt_id]}), "/queue")
            elif state is PromptState.RUNNING:
                answer = await self._request("POST", "/interrupt", json={"prompt_id": prompt_id})
                self._checked_status(answer, "/interrupt")
        else:
            self._checked_status(response, "/api/jobs/…/cancel")
        return state

    async def upload(
        self, name: str, content: Content, *, content_type: str, folder: str = "", use: FileUse = FileUse.INPUT
    ) -> str:
        """ComfyUI may store the file under another name than the one requested."""
        is_lora = use is FileUse.LORA
        # Trained LoRAs are in the output folder.
        fields = (
            {"type": "output", "subfolder": f"loras/{folder}"} if is_lora else {"type": "input", "subfolder": folder}
        )
        form = FileForm({**fields, "overwrite": "true"}, name, content, content_type)
        # ComfyUI answers once it has written the whole file.
        response = await self._request(
            "POST", "/upload/image", content=form.body(), headers=form.headers, timeout=self._slow
        )
        if response.status_code == 413:
            message = f"{name} is larger than {self.url} accepts."
            raise PromptRefused(ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=message))
        answer = _mapping(self._checked(response, "/upload/image"), "/upload/image")
        stored = answer.get("name")
        if not isinstance(stored, str):
            raise UnexpectedAnswer(f"{self.url}/upload/image gave no name")
        below = folder if is_lora else answer.get("subfolder")
        return f"{below}/{stored}" if isinstance(below, str) and below else stored

    @asynccontextmanager
    async def fetch(self, file: ResultFile) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        request = self._client.build_request("GET", self.url + "/view", params=query)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._unavailable("/view", error) from None
        try:
            if response.status_code == 404:
                raise FileNotFoundError(file.filename)
            self._checked_status(response, "/view")
            yield response.headers.get("content-type", "application/octet-stream"), self._chunks(response)
        finally:
            await response.aclose()

    async def produced(self, prompt_id: str) -> list[ResultFile]:
        history = _mapping(await self._json("GET", f"/history/{quote(prompt_id, safe='')}"), "/history")
        entry = history.get(prompt_id)
        return files_of(entry) if isinstance(entry, Mapping) else []

    async def erase(self, file: ResultFile) -> None:
        """ComfyUI deletes no file over HTTP, but replaces one by an empty one."""
        try:
            async with self.fetch(file):
                pass
        except FileNotFoundError:
            return
        fields = {"type": file.type, "subfolder": file.subfolder, "overwrite": "true"}
        files = {"image": (file.filename, b"", "application/octet-stream")}
        self._checked_status(await self._request("POST", "/upload/image", data=fields, files=files), "/upload/image")

    async def forget(self, prompt_id: str) -> None:
        self._checked_status(await self._request("POST", "/history", json={"delete": [prompt_id]}), "/history")

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for chunk in response.aiter_bytes():
                yield chunk
        except httpx.HTTPError as error:
            raise self._unavailable("/view", error) from None

    async def _json(self, method: str, path: str) -> Any:
        return self._checked(await self._request(method, path), path)

    async def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return await self._client.request(method, self.url + path, **content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unavailable(path, error) from None

    def _unavailable(self, path: str, error: Exception) -> ServerUnavailable:
        # What h11 says of a request that it cannot send repeats its headers, and so the proxy's secret.
        text = "" if isinstance(error, httpx.LocalProtocolError) else str(error)
        reason = shortened(repaired(text), 200) or type(error).__name__
        kind = NotListening if isinstance(error, httpx.ConnectError) else ServerUnavailable
        return kind(f"ComfyUI at {self.url} did not answer {path}: {reason}")

    def _checked(self, response: httpx.Response, path: str) -> Any:
        self._checked_status(response, path)
        return self._parsed(response, path)

    def _checked_status(self, response: httpx.Response, path: str) -> None:
        if response.status_code >= 500:
            raise ServerUnavailable(f"ComfyUI at {self.url} answered {path} with HTTP {response.status_code}")
        if response.status_code in (401, 407):
            raise UnexpectedAnswer(
                f"{self.url}{path} answered HTTP {response.status_code}: set COMFYUI_TEMPORAL_GPU_SERVER_TOKEN, "
                "_LOGIN or _HEADERS to what its proxy demands"
            )
        if not 200 <= response.status_code < 300:
            raise UnexpectedAnswer(
                f"{self.url}{path} answered HTTP {response.status_code}: is this a ComfyUI server (0.3.64 or later)?"
            )

    def _parsed(self, response: httpx.Response, path: str) -> Any:
        if len(response.content) > MAX_REPLY_BYTES:
            raise UnexpectedAnswer(f"{self.url}{path} answered more than {MAX_REPLY_BYTES} bytes")
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise UnexpectedAnswer(f"{self.url}{path} did not answer with JSON: is this a ComfyUI server?") from None


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnexpectedAnswer(f"{path} did not answer with a JSON object: is this a ComfyUI server?")
    return value


def gpu_type_of(stats: Mapping[str, Any]) -> str:
    """The first device's name in `/system_stats`, shortened: `NVIDIA GeForce RTX 4090` → `rtx-4090`."""
    devices = stats.get("devices")
    device = devices[0] if isinstance(devices, list) and devices else {}
    name = str(device.get("name") or "") if isinstance(device, Mapping) else ""
    kept = re.sub(r"[^a-z0-9]+", "-", _VENDORS.sub("", name.lower())).strip("-")
    return kept[:60] or str(device.get("type") or "gpu")[:60]


def _client_id(prompt_id: str) -> str:
    """The prompt's own id, so that a worker that takes over after a crash still receives its messages."""
    return prompt_id


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) >= 2 and isinstance(item[0], int | float)
