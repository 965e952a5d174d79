"""A client of the live streams: follows tasks to their ends, resumes where a stream was cut, keeps what it received."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import httpx

from comfyui_temporal.contracts.task_events import TaskEvent
from proof.site.site import Site

RETRY_SECONDS: Final = 0.5
NOT_FULL_SECONDS: Final = 10.0
"""After this time a stream is opened although it could follow more tasks."""
SILENT_SECONDS: Final = 45.0
"""Three heartbeats: a stream that brings nothing for longer is opened again."""
TIMEOUT: Final = httpx.Timeout(10, read=SILENT_SECONDS)
Received = Mapping[str, list[TaskEvent]]


async def frames(response: httpx.Response) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
    """The cursor and the event of each frame of a stream."""
    frame: dict[str, str] = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if line:
            frame[name] = value
        elif "data" in frame:
            yield frame.get("id"), json.loads(frame["data"])
            frame = {}


class Recorder:
    """Streams of up to `tasks_a_stream` tasks each, opened as tasks are started.

    `on_event` is called with each event, `on_end` with everything that a stream brought, once all its tasks ended.
    """

    def __init__(
        self,
        site: Site,
        *,
        tasks_a_stream: int = 1,
        on_event: Callable[[], None] = lambda: None,
        on_end: Callable[[Received], None] = lambda _received: None,
    ) -> None:
        self._site = site
        self._tasks_a_stream = tasks_a_stream
        self._on_event = on_event
        self._on_end = on_end
        self._waiting: dict[str, list[str]] = {}
        self._streams: set[asyncio.Task[None]] = set()
        self.received: dict[str, list[TaskEvent]] = {}
        """Task → what its stream brought so far."""

    def follow(self, tenant_id: str, task_id: str) -> None:
        """Record this task from its first event on."""
        waiting = self._waiting.setdefault(tenant_id, [])
        waiting.append(task_id)
        if len(waiting) >= self._tasks_a_stream:
            self._open(tenant_id)

    async def run(self, all_started: asyncio.Event) -> None:
        """Open streams that do not fill up. Returns when no task follows any more."""
        while not all_started.is_set():
            try:
                async with asyncio.timeout(NOT_FULL_SECONDS):
                    await all_started.wait()
            except TimeoutError:
                pass
            for tenant_id in list(self._waiting):
                self._open(tenant_id)

    async def finish(self, seconds: float) -> None:
        """Give every open stream this long to end, then close it."""
        if self._streams:
            await asyncio.wait(self._streams, timeout=seconds)
        for stream in list(self._streams):
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def _open(self, tenant_id: str) -> None:
        task_ids = self._waiting.pop(tenant_id, [])
        if task_ids:
            self.received.update({task_id: [] for task_id in task_ids})
            stream = asyncio.create_task(self._record(tenant_id, task_ids))
            self._streams.add(stream)
            stream.add_done_callback(self._streams.discard)

    async def _record(self, tenant_id: str, task_ids: list[str]) -> None:
        cursor: str | None = None
        while True:
            try:
                async with self._stream(tenant_id, task_ids, cursor) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        break  # every event of every task was received
                    if response.status_code == httpx.codes.OK:
                        async for frame_id, event in frames(response):
                            cursor = frame_id or cursor
                            self._take(event)
            except httpx.HTTPError:
                pass
            await asyncio.sleep(RETRY_SECONDS)
        self._on_end({task_id: self.received[task_id] for task_id in task_ids})

    def _take(self, event: dict[str, Any]) -> None:
        if "seq" in event:
            self.received[event["task_id"]].append(TaskEvent.model_validate(event))
            self._on_event()

    def _stream(self, tenant_id: str, task_ids: list[str], cursor: str | None) -> Any:
        """A task's own stream, or one stream of several."""
        headers = {**self._site.bearer(tenant_id), "Accept": "text/event-stream"}
        if cursor:
            headers["Last-Event-ID"] = cursor
        path, params = f"/api/v1/tasks/{task_ids[0]}/events", {}
        if self._tasks_a_stream > 1:
            path, params = "/api/v1/tasks/stream/sse", {"subscribe": ",".join(task_ids)}
        return self._site.gateway.stream("GET", path, params=params, headers=headers, timeout=TIMEOUT)
