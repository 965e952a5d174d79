"""From a callback's sending to its event at an SSE client, at 100 callbacks a second, compared with a bare signal.

    python -m proof.benchmarks.callback_latency [--seconds 20] [--per-second 100]

Each callback is a tick: the gateway stores it without the workflow (decision 4).
On a whole stack, each part a process of its own. Each task publishes progress at most once a second (contract §6), so
as many tasks are open as callbacks are sent in 1.2 s. The bare signal, in the same run and at the same rate: a signal
from the client to a workflow that does nothing else, until its worker has it. The bare insert: one statement that
stores an event and notifies, until a client that listens has it. Aims: p50 ≤ 10 ms, p99 ≤ 60 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.service import RPCError

from proof.benchmarks.bare_notifications import bare_notifications
from proof.benchmarks.burst import opened_stack, start_image, until_held
from proof.benchmarks.rate import at_a_rate, settled
from proof.benchmarks.whole_stack import Events, received_events
from proof.site.callbacks import Wire, signed_request
from proof.site.parts import OwnStack
from proof.site.site import Site
from runtime.logs import configure_logs
from runtime.settings import Settings
from worker import make_worker

SECONDS_BETWEEN = 1.2
WIRES = 16
STARTING_SECONDS = 600.0
"""Longest wait for the tasks, which all start at once."""


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


async def bare_signals(client: Client, *, targets: int, per_second: float, seconds: float) -> list[float]:
    """Seconds from each signal's sending to its arrival at a worker."""
    sent_at: dict[int, float] = {}
    spans: dict[int, float] = {}

    @activity.defn
    async def arrived(number: int) -> None:
        spans.setdefault(number, time.monotonic() - sent_at[number])

    async with make_worker(client, Settings(_env_file=None, task_queue="bare"), [arrived], [BareSignals]):
        handles = [
            await client.start_workflow("BareSignals", id=f"bare-{n}", task_queue="bare") for n in range(targets)
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


async def waiting_tasks(site: Site, count: int) -> list[tuple[str, str]]:
    """Task and job ids of tasks whose jobs send no callbacks by themselves."""
    await site.admin.comfyui.set_gpus("rtx4090", count)
    await site.admin.comfyui.fault("job_stall", at=0.1, times=None)
    await site.admin.comfyui.fault("callback_withhold", times=None)
    task_ids = [f"waiting-{n}" for n in range(count)]
    for task_id in task_ids:
        await start_image(site, task_id)
    ids = []
    for task_id in task_ids:
        await until_held(site, task_id, seconds=STARTING_SECONDS)
        [run] = await site.admin.comfyui.jobs(task_id)
        ids.append((task_id, run.run_id))
    return ids


def arrivals(events: Events) -> dict[tuple[str, int], float]:
    """Task and queue position → when its event arrived."""
    at: dict[tuple[str, int], float] = {}
    for arrived, event in events.received:
        at.setdefault((event.get("task_id", ""), event.get("queue_position") or 0), arrived)
    return at


def report(job_id: str, turn: int) -> dict[str, Any]:
    """What a job reports in its n-th turn."""
    said = {"job_id": job_id, "job_status": "processing", "sequence": 1_000 + turn, "queue_position": turn}
    return {**said, "stage_progress": 10.0 + turn / 10}


async def first_reports(site: Site, tasks: Sequence[tuple[str, str]]) -> None:
    """Each job's first report is a signal. Once the rows know it, the next ones are ticks."""
    wire = await Wire.to(site.gateway.base_url.port or 80)
    for task_id, job_id in tasks:
        await wire.post(signed_request(task_id, report(job_id, 0), site.stack.callback_secret))
    wire.close()
    async with asyncio.timeout(STARTING_SECONDS):
        for task_id, _ in tasks:
            while (row := await site.store.task(task_id)) is None or row.stage != "processing":  # noqa: ASYNC110
                await asyncio.sleep(0.2)


async def callbacks(
    site: Site, tasks: Sequence[tuple[str, str]], *, per_second: float, seconds: float
) -> tuple[list[float], int]:
    """Seconds from each callback's sending to its event at the client, and how many never arrived."""
    await first_reports(site, tasks)
    # Opened only now: the gateway closes a connection that sends nothing for ten seconds.
    wires = [await Wire.to(site.gateway.base_url.port or 80) for _ in range(WIRES)]
    sent_at: dict[tuple[str, int], float] = {}
    statuses: Counter[int] = Counter()
    async with received_events(site) as events:

        async def send(number: int, target: int) -> None:
            task_id, job_id = tasks[target]
            turn = number // len(tasks) + 1
            sent_at[task_id, turn] = time.monotonic()
            request = signed_request(task_id, report(job_id, turn), site.stack.callback_secret)
            status, _ = await wires[number % WIRES].post(request)
            statuses[status] += 1

        await at_a_rate(send, targets=len(tasks), per_second=per_second, seconds=seconds)
        await settled(lambda: sent_at.keys() <= arrivals(events).keys())
    for wire in wires:
        wire.close()
    if statuses[202] != statuses.total():
        print(f"answers to callbacks: {dict(statuses)}")
    arrived_at = arrivals(events)
    spans = [arrived_at[key] - at for key, at in sent_at.items() if key in arrived_at]
    return spans, len(sent_at) - len(spans)


def shown(name: str, spans: Sequence[float]) -> tuple[float, float]:
    """Prints and gives p50 and p99 in milliseconds."""
    p50, p99 = 1000 * statistics.median(spans), 1000 * statistics.quantiles(spans, n=100)[98]
    print(f"{name:<32} {len(spans):>6} measured   p50 {p50:6.1f} ms   p99 {p99:6.1f} ms", flush=True)
    return p50, p99


def processor_ms(stack: OwnStack, before: Mapping[str, float], count: int) -> str:
    """What each part has taken since `before`, for each of `count`."""
    spent = stack.processor_seconds()
    each = {part: 1000 * (spent[part] - before.get(part, 0.0)) / count for part in spent}
    return "processor ms each: " + ", ".join(f"{part} {ms:.1f}" for part, ms in each.items())


async def main(per_second: float, seconds: float, *, alone: bool) -> None:
    configure_logs(level="ERROR")
    targets = math.ceil(per_second * SECONDS_BETWEEN)
    async with opened_stack() as (stack, site):
        bare: tuple[float, float] | None = None
        if not alone:
            signals = await bare_signals(site.client, targets=targets, per_second=per_second, seconds=seconds)
            bare = shown("bare signal to worker", signals)
        before = stack.processor_seconds()
        rows, unseen = await bare_notifications(
            stack.owner_dsn, targets=targets, per_second=per_second, seconds=seconds
        )
        shown("bare insert and notify", rows)
        print(f"bare inserts without a notification {unseen}, {processor_ms(stack, before, len(rows) + unseen)}")
        tasks = await waiting_tasks(site, targets)
        before = stack.processor_seconds()
        spans, missing = await callbacks(site, tasks, per_second=per_second, seconds=seconds)
        spent = processor_ms(stack, before, len(spans) + missing)
        whole = shown("callback to event at SSE client", spans)
    print(f"callbacks without an event {missing}, {spent}")
    if bare is not None:
        print(f"ratio of p50 {whole[0] / bare[0]:.1f}, of p99 {whole[1] / bare[1]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--per-second", type=float, default=100)
    parser.add_argument("--alone", action="store_true", help="without the bare signals, where they need all processors")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.per_second, arguments.seconds, alone=arguments.alone))
