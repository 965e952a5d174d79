"""A client of the live streams: one stream a task, resumed where it was cut, remembering every event it was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

import httpx

from comfyui_temporal.contracts.tasks import TaskEvent
from proof.kill_points.site import Site

AGAIN_SECONDS: Final = 0.3


class Recorder:
    """Follows tasks from their first event to their last."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.told: dict[str, list[TaskEvent]] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}

    def follow(self, task_id: str) -> None:
        self.told[task_id] = []
        self._streams[task_id] = asyncio.create_task(self._record(task_id))

    async def finish(self, *, seconds: float) -> None:
        """Give every stream that long to come to its end; what it was not told by then it was not told."""
        if self._streams:
            await asyncio.wait(self._streams.values(), timeout=seconds)
        for stream in self._streams.values():
            stream.cancel()
        await asyncio.gather(*self._streams.values(), return_exceptions=True)

    async def _record(self, task_id: str) -> None:
        while True:
            try:
                async for event in self._events(task_id):
                    self.told[task_id].append(event)
            except httpx.HTTPError:
                pass
            except _Over:
                return
            await asyncio.sleep(AGAIN_SECONDS)

    async def _events(self, task_id: str) -> AsyncIterator[TaskEvent]:
        """What one stream tells. Raises _Over where nothing is left to tell."""
        told = self.told[task_id]
        resumed = {"Last-Event-ID": told[-1].cursor} if told else {}
        async with self._site.gateway.stream(
            "GET",
            f"/api/v1/tasks/{task_id}/events",
            headers={**self._site.bearer, "Accept": "text/event-stream", **resumed},
        ) as response:
            if response.status_code == httpx.codes.NO_CONTENT:
                raise _Over
            if response.status_code != httpx.codes.OK:
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    if "seq" in data:
                        yield TaskEvent.model_validate(data)


class _Over(Exception):
    """204: every event was told before, up to the task's end."""
