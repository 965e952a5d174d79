"""From a callback's sending to its event at an SSE client, at 100 callbacks a second, compared with a bare signal.

    python -m proof.benchmarks.callback_latency [--seconds 20] [--per-second 100]

Gateway and worker are processes of their own, Temporal and PostgreSQL real. Each task publishes progress at most once a
second (contract §6), so as many tasks are open as callbacks are sent in 1.2 s. The bare signal, in the same run and at
the same rate: a signal from the client to a workflow that does nothing else, until its worker has it. Aims: p50 ≤ 30
ms, p99 ≤ 150 ms. Needs the test dependencies: it uses the tests' platform.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
from httpx_sse import EventSource
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.service import RPCError

from proof.benchmarks.burst import stack
from proof.benchmarks.servers import seconds_of
from runtime.logs import configure_logs
from runtime.settings import Settings
from tests.conftest import unique
from tests.gateway.serving import GatewayProcess, Wire, bearer, gateway_process, tick, token_for
from tests.workflows.platform import Platform, task_id_of
from worker import make_worker

SECONDS_BETWEEN = 1.2
WIRES = 16
PARTS = {"temporal": "start-dev", "worker": "worker.py", "gateway": "-m gateway"}
"""Part → what its command line holds."""
SETTLING_SECONDS = 15.0
"""Longest wait for the last ones."""
Sent = Callable[[int, int], Coroutine[Any, Any, None]]
"""Sends message number n to target number m."""


@workflow.defn(name="BareSignals")
class BareSignals:
    """Hands each signal to a local activity, which is where this process sees that the worker has it."""

    def __init__(self) -> None:
        self.waiting: list[int] = []

    @workflow.run
    async def run(self) -> None:
        while True:
            await workflow.wait_condition(lambda: bool(self.waiting))
            await workflow.execute_local_activity(
                "arrived", self.waiting.pop(0), schedule_to_close_timeout=timedelta(seconds=5)
            )

    @workflow.signal
    def add(self, number: int) -> None:
        self.waiting.append(number)


async def at_a_rate(send: Sent, *, targets: int, per_second: float, seconds: float) -> None:
    """Sends evenly, to one target after the other, without waiting for the one before."""
    sending = []
    began = time.monotonic()
    for number in range(int(seconds * per_second)):
        if (ahead := number / per_second - (time.monotonic() - began)) > 0:
            await asyncio.sleep(ahead)
        sending.append(asyncio.create_task(send(number, number % targets)))
    await asyncio.gather(*sending)


async def settled(is_over: Callable[[], bool]) -> None:
    """Returns when it is over, or after 15 s at the latest."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SETTLING_SECONDS):
            while not is_over():  # noqa: ASYNC110 - no event reports it
                await asyncio.sleep(0.05)


async def bare_signals(client: Client, *, targets: int, per_second: float, seconds: float) -> list[float]:
    """Seconds from each signal's sending to its arrival at a worker."""
    sent_at: dict[int, float] = {}
    spans: dict[int, float] = {}

    @activity.defn
    async def arrived(number: int) -> None:
        spans.setdefault(number, time.monotonic() - sent_at[number])

    queue = unique("bare")
    async with make_worker(client, Settings(_env_file=None, task_queue=queue), [arrived], [BareSignals]):
        handles = [
            await client.start_workflow("BareSignals", id=unique("bare"), task_queue=queue) for _ in range(targets)
        ]

        async def send(number: int, target: int) -> None:
            sent_at[number] = time.monotonic()
            with suppress(RPCError):  # on a busy machine some time out; what arrives is measured
                await handles[target].signal("add", number)

        await at_a_rate(send, targets=targets, per_second=per_second, seconds=seconds)
        await settled(lambda: len(spans) == len(sent_at))
        for handle in handles:
            await handle.terminate()
    return list(spans.values())


async def waiting_tasks(platform: Platform, count: int) -> list[tuple[str, str]]:
    """Task and job ids of tasks whose jobs send no callbacks by themselves."""
    await platform.simulators.admin.comfyui.set_gpus("rtx4090", count)
    await platform.simulators.admin.comfyui.fault("job_stall", at=0.1, times=None)
    await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
    handles = [await platform.start_image() for _ in range(count)]
    ids = []
    for handle in handles:
        task_id = task_id_of(handle)
        await platform.until_held(task_id)
        [job] = await platform.simulators.admin.comfyui.jobs(task_id)
        ids.append((task_id, job.run_id))
    return ids


@asynccontextmanager
async def arrivals(gateway: GatewayProcess) -> AsyncIterator[dict[tuple[str, int], float]]:
    """The times at which one client of all the tenant's tasks received each task's queue position."""
    at: dict[tuple[str, int], float] = {}
    is_open = asyncio.Event()

    async def read() -> None:
        url = f"http://127.0.0.1:{gateway.port}/api/v1/tasks/stream/sse?subscribe=*"
        async with (
            httpx.AsyncClient(timeout=None) as http,
            http.stream("GET", url, headers=bearer(token_for("tenant-demo", valid_seconds=3_600))) as response,
        ):
            response.raise_for_status()
            is_open.set()
            async for frame in EventSource(response).aiter_sse():
                if frame.data:
                    event: dict[str, Any] = json.loads(frame.data)
                    at.setdefault((event.get("task_id", ""), event.get("queue_position") or 0), time.monotonic())

    reading = asyncio.create_task(read())
    await is_open.wait()
    await asyncio.sleep(1)
    yield at
    reading.cancel()


async def callbacks(
    gateway: GatewayProcess, tasks: Sequence[tuple[str, str]], *, per_second: float, seconds: float
) -> tuple[list[float], int]:
    """Seconds from each callback's sending to its event at the client, and how many never arrived."""
    wires = [await Wire.to(gateway.port) for _ in range(WIRES)]
    sent_at: dict[tuple[str, int], float] = {}
    statuses: Counter[int] = Counter()
    async with arrivals(gateway) as arrived_at:

        async def send(number: int, target: int) -> None:
            task_id, job_id = tasks[target]
            turn = number // len(tasks) + 1
            body = tick(1_000 + turn, 10.0 + turn, job_id=job_id, queue_position=turn)
            sent_at[task_id, turn] = time.monotonic()
            status, _ = await wires[number % WIRES].post(gateway.request(task_id, body))
            statuses[status] += 1

        await at_a_rate(send, targets=len(tasks), per_second=per_second, seconds=seconds)
        await settled(lambda: sent_at.keys() <= arrived_at.keys())
    for wire in wires:
        wire.close()
    if statuses[202] != statuses.total():
        print(f"answers to callbacks: {dict(statuses)}")
    spans = [arrived_at[key] - at for key, at in sent_at.items() if key in arrived_at]
    return spans, len(sent_at) - len(spans)


def processor_seconds() -> dict[str, float]:
    """User and system time so far, by part; PostgreSQL is not among them: it is no child of this process."""
    taken = {"driver": seconds_of(psutil.Process())}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            part = next((part for part, sign in PARTS.items() if sign in command), "other")
            taken[part] = taken.get(part, 0.0) + seconds_of(process)
    return taken


def shown(name: str, spans: Sequence[float]) -> tuple[float, float]:
    """Prints and gives p50 and p99 in milliseconds."""
    p50, p99 = 1000 * statistics.median(spans), 1000 * statistics.quantiles(spans, n=100)[98]
    print(f"{name:<32} {len(spans):>6} measured   p50 {p50:6.1f} ms   p99 {p99:6.1f} ms", flush=True)
    return p50, p99


async def main(per_second: float, seconds: float) -> None:
    configure_logs(level="ERROR")
    targets = math.ceil(per_second * SECONDS_BETWEEN)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - before anything runs
        async with stack(Path(folder)) as platform:
            bare = shown(
                "bare signal to worker",
                await bare_signals(platform.client, targets=targets, per_second=per_second, seconds=seconds),
            )
            tasks = await waiting_tasks(platform, targets)
            environment = {
                "TEMPORAL_ADDRESS": platform.client.service_client.config.target_host,
                "DATABASE_DSN": f"postgresql://postgres:@/postgres?host={folder}/postgres",
                "TASK_QUEUE": platform.task_queue,
                "LOG_LEVEL": "ERROR",
            }
            async with gateway_process(environment) as gateway:
                before = processor_seconds()
                spans, missing = await callbacks(gateway, tasks, per_second=per_second, seconds=seconds)
                spent = processor_seconds()
            whole = shown("callback to event at SSE client", spans)
    each = {part: 1000 * (spent[part] - before.get(part, 0.0)) / (len(spans) + missing) for part in spent}
    print("processor ms a callback: " + ", ".join(f"{part} {ms:.1f}" for part, ms in each.items()))
    print(
        f"ratio of p50 {whole[0] / bare[0]:.1f}, of p99 {whole[1] / bare[1]:.1f}; callbacks without an event {missing}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--per-second", type=float, default=100)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.per_second, arguments.seconds))
