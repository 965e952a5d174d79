"""A burst of image tasks on one worker process, and callbacks while the credits service hangs for others.

    python -m proof.benchmarks.burst [--tasks 150]

Prints how many workflow tasks timed out (aim: none), tasks per second, and the time from a callback, sent as a signal,
to its event in the store, as p50 and p95, before and while every other task hangs in its call to credits (aim: p95 ≤
0.5 s), with the ratio of the two in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from temporalio.api.enums.v1 import EventType, TimeoutType

from comfyui_temporal.client.submission import WORKFLOW_TASK_TIMEOUT
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, IMAGE_WORKFLOW, TASK_QUEUE, workflow_id_of
from proof.benchmarks import job
from proof.site.parts import OURS, OwnStack
from proof.site.site import Handle, Site
from proof.site.waiting import until
from runtime.logs import configure_logs

PROBES: Final = 20
SPEED: Final = 480.0
SETTINGS: Final = {
    # Work runs 480 times as fast here, but a restart does not.
    "DEADLINE_FACTOR": "100",
    # As in production: polls and the reconciler are part of the load.
    "IMAGE_POLL_AFTER_SECONDS": "30",
    "IMAGE_POLL_AT_MOST_SECONDS": "120",
    "RECONCILE_EVERY_SECONDS": "300",
    "LOG_LEVEL": "ERROR",
}


@asynccontextmanager
async def opened_stack() -> AsyncIterator[tuple[OwnStack, Site]]:
    """The whole stack, each part a process of its own, and its clients. Raises StackFailure."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stack = OwnStack(Path(folder), speed=SPEED, settings=SETTINGS)
        async with stack.running(*OURS) as described, Site.connected(stack.folder, described) as site:
            yield stack, site


async def start_image(site: Site, task_id: str) -> Handle:
    """Start an image task with only id and queue, as a caller without our client does."""
    task = job.image_task(task_id).model_dump(mode="json", exclude_defaults=True)
    return await site.client.start_workflow(
        IMAGE_WORKFLOW, task, id=workflow_id_of(task_id), task_queue=TASK_QUEUE, task_timeout=WORKFLOW_TASK_TIMEOUT
    )


async def until_held(site: Site, task_id: str, *, seconds: float = 30) -> None:
    async def is_held() -> bool:
        return any(hold.phase == "open" for hold in await site.admin.credits.holds(task_id))

    await until(is_held, f"a hold of {task_id}", seconds=seconds)


async def timed_out_workflow_tasks(handles: list[Handle]) -> Counter[str]:
    """Time-outs by what was waited for: a worker (schedule to start, the sticky queue) or its answer."""
    timed_out: Counter[str] = Counter()
    for handle in handles:
        async for event in handle.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_TIMED_OUT:
                kind = event.workflow_task_timed_out_event_attributes.timeout_type
                timed_out[TimeoutType.Name(kind).removeprefix("TIMEOUT_TYPE_").lower()] += 1
    return timed_out


async def burst(site: Site, tasks: int) -> None:
    await site.admin.comfyui.set_gpus("rtx4090", tasks)
    began = time.monotonic()
    handles = await asyncio.gather(*(start_image(site, f"burst-{n}") for n in range(tasks)))
    await asyncio.gather(*(handle.result() for handle in handles))
    took = time.monotonic() - began
    timed_out = await timed_out_workflow_tasks(handles)
    print(f"burst: {tasks} image tasks in {took:.1f} s = {tasks / took:.1f} a second")
    print(f"workflow tasks that timed out: {dict(timed_out) or 0}")


async def callback_to_event(site: Site, task_id: str, first_sequence: int) -> list[float]:
    """Seconds from a callback (as a signal) to its event in the store, for one task that only waits."""
    [run] = await site.admin.comfyui.jobs(task_id)
    seconds = []
    for sequence in range(first_sequence, first_sequence + PROBES):
        body: dict[str, Any] = {"job_id": run.run_id, "job_status": "processing", "sequence": sequence}
        began = time.monotonic()
        await site.handle(task_id).signal(
            CALLBACK_SIGNAL, {**body, "stage_progress": sequence / 10, "queue_position": sequence}
        )
        await until_stored(site, task_id, sequence)
        seconds.append(time.monotonic() - began)
        # Progress is published at most once a second (contract §6): the next probe comes after that.
        await asyncio.sleep(1.1)
    return seconds


async def until_stored(site: Site, task_id: str, sequence: int) -> None:
    async def is_stored() -> bool:
        return any(event.queue_position == sequence for event in (await site.store.events(task_id))[-3:])

    await until(is_stored, f"event {sequence}", seconds=30, look_seconds=0.02)


async def during_an_outage(site: Site) -> None:
    await site.admin.comfyui.fault("job_stall", at=0.1, times=None)
    await site.admin.comfyui.fault("callback_withhold", times=None)
    await start_image(site, "probed")
    await until_held(site, "probed")
    quiet = await callback_to_event(site, "probed", 101)
    await site.admin.credits.fault("delay", route="pre_deduct", seconds=60, times=None)
    for n in range(50):
        await start_image(site, f"hanging-{n}")
    hanging = await callback_to_event(site, "probed", 301)
    for name, sample in (("quiet", quiet), ("50 tasks hang in credits", hanging)):
        p95 = statistics.quantiles(sample, n=20)[-1]
        print(f"callback to event, {name}: p50 {1000 * statistics.median(sample):.0f} ms, p95 {1000 * p95:.0f} ms")
    print(f"ratio of the medians: {statistics.median(hanging) / statistics.median(quiet):.2f}")


async def main(tasks: int) -> None:
    configure_logs(level="ERROR")
    async with opened_stack() as (_, site):
        await burst(site, tasks)
        await during_an_outage(site)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=150)
    asyncio.run(main(parser.parse_args().tasks))
