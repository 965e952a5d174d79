"""What users wait for, on the whole local stack: a callback's event, credits held, work going on after a kill.

Measured from outside by one client: orders at the gateway, signed callbacks at the gateway, live streams.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from local_stack.background import start_stack
from local_stack.folder import RunFolder, StackFailure
from local_stack.parts import SETTINGS_PREFIX
from proof.benchmarks.spread import Spread
from proof.site.callbacks import signed_headers
from proof.site.parts import SupervisedParts
from proof.site.recorder import frames
from proof.site.site import Site

TENANT: Final = "tenant-demo"
SPEED: Final = 100.0
SPREAD_SECONDS: Final = 1.1
"""Progress is published at most once a second (contract §6): the next probe comes after that."""
LIMIT_SECONDS: Final = 60.0
OPEN_AT_A_KILL: Final = 50


class Waits(BaseModel):
    """What users wait for."""

    order_to_held: Spread
    """From the order at the gateway to the event that shows that credits are held."""
    callback_to_client: Spread
    """From a callback's sending to its event at the client."""
    kill_to_polling: Spread
    """From the worker's SIGKILL until its successor polls: the start of a process."""
    polling_to_next_event: Spread
    """From then to the next event that a client receives."""


async def measure(probes: int, kills: int) -> Waits:
    """Start a stack, measure, end it. Raises StackFailure."""
    os.environ.setdefault(f"{SETTINGS_PREFIX}LOG_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = RunFolder(Path(name))
        stack = await asyncio.to_thread(start_stack, folder, SPEED, print, has_lifeline=True)
        description = folder.description()
        if stack is None or description is None:
            raise StackFailure("The stack did not start.")
        try:
            async with Site.connected(folder, description) as site:
                return await _waits(site, probes, kills)
        finally:
            await asyncio.to_thread(stack.end)


async def _waits(site: Site, probes: int, kills: int) -> Waits:
    await site.admin.comfyui.set_gpus("rtx4090", 2 * OPEN_AT_A_KILL)
    async with received_events(site) as events:
        await site.admin.comfyui.fault("job_stall", at=0.1, times=None)
        await site.admin.comfyui.fault("callback_withhold", times=None)
        held, task_ids = await _orders(site, events, probes)
        received = await _callbacks(site, events, task_ids[0], probes)
        for task_id in task_ids:
            await site.gateway.post(f"/api/v1/tasks/{task_id}/cancel", headers=site.bearer(TENANT))
        await site.admin.remove_faults()
        back, next_event = await _kills(site, events, kills)
    return Waits(
        order_to_held=Spread.of(held),
        callback_to_client=Spread.of(received),
        kill_to_polling=Spread.of(back),
        polling_to_next_event=Spread.of(next_event),
    )


class Events:
    """Every event that one stream of all tasks brought, with its time by `time.monotonic`."""

    def __init__(self) -> None:
        self.received: list[tuple[float, dict[str, Any]]] = []
        self._more = asyncio.Event()

    def add(self, event: dict[str, Any]) -> None:
        self.received.append((time.monotonic(), event))
        self._more.set()

    async def arrival(self, what: Callable[[dict[str, Any]], bool], *, after: float = 0.0) -> float:
        """When the first such event after a time arrived; waits for it."""
        seen = 0
        async with asyncio.timeout(LIMIT_SECONDS):
            while True:
                for at, event in self.received[seen:]:
                    if at > after and what(event):
                        return at
                seen = len(self.received)
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def received_events(site: Site) -> AsyncIterator[Events]:
    """The events of all of the tenant's tasks, from now on."""
    events, is_open = Events(), asyncio.Event()

    async def read() -> None:
        params, headers = {"subscribe": "*"}, site.bearer(TENANT)
        async with site.gateway.stream(
            "GET", "/api/v1/tasks/stream/sse", params=params, headers=headers, timeout=None
        ) as response:
            is_open.set()
            async for _, event in frames(response):
                events.add(event)

    reading = asyncio.create_task(read())
    await is_open.wait()
    try:
        yield events
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _orders(site: Site, events: Events, count: int) -> tuple[list[float], list[str]]:
    """Tasks that are ordered one after another, and how long each waited until credits were held."""
    seconds, task_ids = [], []
    for n in range(count):
        task_id = f"held-{n}"
        began = time.monotonic()
        await _order(site, task_id)
        received = await events.arrival(lambda e, t=task_id: e.get("task_id") == t and e["event"] == "credits.updated")  # type: ignore[misc]
        seconds.append(received - began)
        task_ids.append(task_id)
    return seconds, task_ids


async def _callbacks(site: Site, events: Events, task_id: str, count: int) -> list[float]:
    """Callbacks of a stalled job, sent by us, and how long each took to reach the client."""
    [run] = await site.admin.comfyui.jobs(task_id)
    seconds = []
    for sequence in range(101, 101 + count):
        progress = {"stage_progress": (sequence - 100) * 100 / (count + 1), "queue_position": sequence}
        named = {"job_id": run.run_id, "task_id": task_id, "job_status": "processing", "sequence": sequence}
        body = {**named, **progress, "occurred_at": datetime.now(UTC).isoformat()}
        began = time.monotonic()
        await _signed_post(site, task_id, body)
        received = await events.arrival(lambda e, n=sequence: e.get("queue_position") == n)  # type: ignore[misc]
        seconds.append(received - began)
        await asyncio.sleep(SPREAD_SECONDS)
    return seconds


async def _kills(site: Site, events: Events, count: int) -> tuple[list[float], list[float]]:
    """The worker killed among many open tasks, several times."""
    parts, back, next_event = SupervisedParts(site), list[float](), list[float]()
    for number in range(count):
        for n in range(OPEN_AT_A_KILL):
            await _order(site, f"kill-{number}-{n}")
        killed = time.monotonic()
        await parts.restart("worker")
        polls = time.monotonic()
        received = await events.arrival(lambda event: "seq" in event, after=polls)
        back.append(polls - killed)
        next_event.append(received - polls)
        await asyncio.gather(*(_ended(events, f"kill-{number}-{n}") for n in range(OPEN_AT_A_KILL)))
    return back, next_event


async def _ended(events: Events, task_id: str) -> None:
    await events.arrival(lambda event: event.get("task_id") == task_id and event.get("status") == "completed")


async def _order(site: Site, task_id: str) -> None:
    order = {"task_id": task_id, "template_id": "text-to-image", "prompt": "a lighthouse at dusk"}
    answer = await site.gateway.post("/api/v1/tasks/images", json=order, headers=site.bearer(TENANT))
    answer.raise_for_status()


async def _signed_post(site: Site, task_id: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = signed_headers(content, site.stack.callback_secret)
    answer = await site.gateway.post(f"/callbacks/comfyui/{task_id}", content=content, headers=headers)
    answer.raise_for_status()
