"""A client of the live streams: follows every task to its end, resumes where it was cut, remembers what it was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import httpx

from proof.soak.journal import Journal
from proof.soak.site import Site

TASKS_A_STREAM: Final = 5
NEW_STREAM_SECONDS: Final = 10.0
"""A stream that is not full is opened after this all the same."""
AGAIN_SECONDS: Final = 1.0
SILENT_SECONDS: Final = 45.0
"""Three heartbeats: a stream that tells nothing for longer is opened anew."""


class Recorder:
    """Streams of a few tasks each, opened as tasks are started. What a whole stream was told goes to the journal."""

    def __init__(self, site: Site, journal: Journal, on_event: Callable[[], None]) -> None:
        self._site = site
        self._journal = journal
        self._on_event = on_event
        self._waiting: dict[str, list[str]] = {}
        self._streams: set[asyncio.Task[None]] = set()
        self.reopened = 0

    def follow(self, tenant_id: str, task_id: str) -> None:
        """Record this task from its first event on; nothing where it was recorded to its end before."""
        if task_id in self._journal.told:
            return
        waiting = self._waiting.setdefault(tenant_id, [])
        waiting.append(task_id)
        if len(waiting) >= TASKS_A_STREAM:
            self._open(tenant_id)

    async def run(self, all_started: asyncio.Event) -> None:
        """Open streams that do not fill up. Returns when no task follows any more."""
        while not all_started.is_set():
            try:
                async with asyncio.timeout(NEW_STREAM_SECONDS):
                    await all_started.wait()
            except TimeoutError:
                pass
            for tenant_id in list(self._waiting):
                self._open(tenant_id)

    async def finish(self, seconds: float) -> None:
        """Give every open stream that long to be told to its end; the others' tasks count as not recorded."""
        if self._streams:
            await asyncio.wait(self._streams, timeout=seconds)
        for stream in list(self._streams):
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def _open(self, tenant_id: str) -> None:
        task_ids = self._waiting.pop(tenant_id, [])
        if task_ids:
            stream = asyncio.create_task(self._record(tenant_id, task_ids))
            self._streams.add(stream)
            stream.add_done_callback(self._streams.discard)

    async def _record(self, tenant_id: str, task_ids: list[str]) -> None:
        told: dict[str, list[int]] = {task_id: [] for task_id in task_ids}
        cursor: str | None = None
        is_over = False
        while not is_over:
            try:
                async with self._asked(tenant_id, task_ids, cursor) as response:
                    # 204: every event was told before, to the last one of every task.
                    is_over = response.status_code == 204
                    async for frame in _frames(response) if response.status_code == 200 else _nothing():
                        cursor = frame.get("id", cursor)
                        self._take(json.loads(frame["data"]), told)
            except httpx.HTTPError:
                pass
            if not is_over:
                self.reopened += 1
                await asyncio.sleep(AGAIN_SECONDS)
        self._journal.add_told(told)

    def _take(self, event: dict[str, Any], told: dict[str, list[int]]) -> None:
        if "seq" in event:
            told[event["task_id"]].append(event["seq"])
            self._on_event()

    def _asked(self, tenant_id: str, task_ids: list[str], cursor: str | None) -> Any:
        return self._site.gateway.stream(
            "GET",
            "/api/v1/tasks/stream/sse",
            params={"subscribe": ",".join(task_ids)},
            headers={**self._site.bearer(tenant_id), **({"Last-Event-ID": cursor} if cursor else {})},
            timeout=httpx.Timeout(10, read=SILENT_SECONDS),
        )


async def _frames(response: httpx.Response) -> AsyncIterator[dict[str, str]]:
    frame: dict[str, str] = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if line:
            frame[name] = value
        elif "data" in frame:
            yield frame
            frame = {}


async def _nothing() -> AsyncIterator[dict[str, str]]:
    """Its task is not known yet, or the gateway cannot tell now."""
    return
    yield {}
