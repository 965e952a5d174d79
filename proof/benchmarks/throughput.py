"""Tasks a second: the same job three ways, by tasks under way and by callbacks; ours by open tasks and by workers.

The rate is that of commits between the 30th and the 80th percent of the tasks, while a fixed number is under way:
neither the start nor the end of a measurement counts.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final

import asyncpg
from pydantic import BaseModel

from comfyui_temporal.contracts.tasks import workflow_id_of
from proof.benchmarks.contestants import Bare, Contestant, OnDbos, Ours
from proof.benchmarks.party import CALLBACK_PAUSE_SECONDS, CALLBACKS, WAITING, Party
from proof.benchmarks.servers import Servers, file_backed_servers
from proof.benchmarks.spread import Spread

UNDER_WAY: Final = 120
"""Enough for both processors to be busy: a task alone takes six seconds, so that 60 gave ten a second at the most."""
FROM, TO = 0.3, 0.8
FILLINGS: Final = 4
"""Tasks of a measurement by load, in multiples of those under way."""
STARTING_AT_ONCE: Final = 16
STALLED_SECONDS: Final = 300.0
SAMPLED: Final = 20


class Rate(BaseModel):
    """One measurement. Processor seconds are per task, by part."""

    name: str
    workers: int = 1
    open_tasks: int = 0
    """Tasks that wait while the measured ones run."""
    callbacks: int = len(CALLBACKS)
    """Of each job."""
    under_way: int = UNDER_WAY
    """Tasks at a time."""
    tasks: int
    tasks_per_second: float
    stored_events: float | None = None
    """Per task."""
    history_events: float | None = None
    """Per task, in Temporal; median of a sample."""
    processor_seconds: dict[str, float] = {}
    beyond_job: Spread | None = None
    """Seconds from a task's start to its commit, without those in which its job only waits."""


class Comparison(BaseModel):
    """The three compared, each on servers of its own, in turn."""

    rounds: list[Rate]
    to_bare: float
    """Ours to bare Temporal, of the medians."""
    to_dbos: float


async def compare(tasks: int, rounds: int) -> Comparison:
    """Rounds of all three, so that other load of the machine affects them equally."""
    measured = []
    for _ in range(rounds):
        for kind in (Ours, Bare, OnDbos):
            async with contest() as (servers, party):
                async with aclosing(_contestant(kind, servers)) as contestant:
                    await contestant.run_workers(1, towards(party))
                    measured.append(await measure(contestant, servers, party, tasks))
                print(_line(measured[-1]), flush=True)
    medians = {
        name: statistics.median(rate.tasks_per_second for rate in measured if rate.name == name)
        for name in {rate.name for rate in measured}
    }
    ours = medians[Ours.name]
    return Comparison(rounds=measured, to_bare=ours / medians[Bare.name], to_dbos=ours / medians[OnDbos.name])


async def by_load(loads: Sequence[int]) -> list[Rate]:
    """All three by how many tasks are under way."""
    measured = []
    for load in loads:
        for kind in (Ours, Bare, OnDbos):
            async with contest() as (servers, party), aclosing(_contestant(kind, servers)) as contestant:
                await contestant.run_workers(1, towards(party))
                measured.append(await measure(contestant, servers, party, FILLINGS * load, under_way=load))
                print(f"{load} under way: {_line(measured[-1])}", flush=True)
    return measured


async def by_callbacks(tasks: int, counts: Sequence[int]) -> list[Rate]:
    """All three by how often a job calls back."""
    measured = []
    for count in counts:
        for kind in (Ours, Bare, OnDbos):
            async with contest(count) as (servers, party), aclosing(_contestant(kind, servers)) as contestant:
                await contestant.run_workers(1, towards(party))
                measured.append(await measure(contestant, servers, party, tasks))
                print(f"{count} callbacks: {_line(measured[-1])}", flush=True)
    return measured


def _contestant(kind: Callable[[Servers], Contestant], servers: Servers) -> Contestant:
    return kind(servers)


async def by_open_tasks(tasks: int, opened: Sequence[int]) -> list[Rate]:
    """Ours while this many further tasks wait for ComfyUI."""
    measured = []
    async with contest() as (servers, party):
        contestant = Ours(servers)
        await contestant.run_workers(1, towards(party))
        waiting = 0
        for count in opened:
            await _open(contestant, party, range(waiting, count))
            waiting = count
            rate = await measure(contestant, servers, party, tasks)
            measured.append(rate.model_copy(update={"open_tasks": count}))
            print(_line(measured[-1]), flush=True)
    return measured


async def by_workers(tasks: int, counts: Sequence[int]) -> list[Rate]:
    """Ours on this many worker processes."""
    measured = []
    for count in counts:
        async with contest() as (servers, party):
            contestant = Ours(servers)
            await contestant.run_workers(count, towards(party))
            rate = await measure(contestant, servers, party, tasks)
            measured.append(rate.model_copy(update={"workers": count}))
            print(_line(measured[-1]), flush=True)
    return measured


@asynccontextmanager
async def contest(callbacks: int = len(CALLBACKS)) -> AsyncIterator[tuple[Servers, Party]]:
    """Empty servers and a party whose jobs call back so often."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with Party(callbacks).served() as party, file_backed_servers(Path(folder)) as servers:
            yield servers, party


async def measure(
    contestant: Contestant, servers: Servers, party: Party, tasks: int, *, under_way: int = UNDER_WAY
) -> Rate:
    """Run this many tasks to their end, `under_way` at a time."""
    party.forget()
    party.call_back = contestant.call_back
    room = asyncio.Semaphore(under_way)
    moved = asyncio.Event()

    def committed(_task_id: str) -> None:
        room.release()
        moved.set()

    party.on_commit = committed
    before = servers.processor_seconds()
    stem = f"rate-{time.monotonic_ns()}"
    started: dict[str, float] = {}
    for n in range(tasks):
        await room.acquire()
        started[f"{stem}-{n}"] = time.monotonic()
        await contestant.start(f"{stem}-{n}")
    while len(party.committed) < tasks:
        moved.clear()
        async with asyncio.timeout(STALLED_SECONDS):
            await moved.wait()
    after = servers.processor_seconds()
    in_order = sorted(party.committed, key=party.committed.__getitem__)
    at = [party.committed[task_id] for task_id in in_order]
    low, high = int(FROM * tasks), int(TO * tasks) - 1
    steady = in_order[low : high + 1]
    job_seconds = CALLBACK_PAUSE_SECONDS * len(party.callbacks)
    return Rate(
        name=contestant.name,
        callbacks=len(party.callbacks),
        under_way=under_way,
        tasks=tasks,
        beyond_job=Spread.of([party.committed[name] - started[name] - job_seconds for name in steady]),
        tasks_per_second=(high - low) / (at[high] - at[low]),
        stored_events=await _stored_events(servers, stem),
        history_events=await _history_events(servers, stem, tasks) if isinstance(contestant, Ours) else None,
        processor_seconds={part: (after[part] - before.get(part, 0.0)) / tasks for part in after},
    )


async def _open(contestant: Contestant, party: Party, numbers: range) -> None:
    """Start tasks and wait until each holds its credits and waits."""
    party.call_back = contestant.call_back
    gate = asyncio.Semaphore(STARTING_AT_ONCE)

    async def start(task_id: str) -> None:
        async with gate:
            await contestant.start(task_id)

    names = [f"{WAITING}{n}" for n in numbers]
    await asyncio.gather(*(start(name) for name in names))
    last, since = 0, time.monotonic()
    while (held := sum(name in party.held for name in names)) < len(names):
        if held != last:
            last, since = held, time.monotonic()
        if time.monotonic() - since > STALLED_SECONDS:
            raise TimeoutError(f"only {held} of {len(names)} tasks hold their credits")
        await asyncio.sleep(0.5)


async def _stored_events(servers: Servers, stem: str) -> float | None:
    """Per task, once every stored task has ended; None where nothing is stored."""
    connection = await asyncpg.connect(servers.database_dsn)
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            while await connection.fetchval(  # noqa: ASYNC110 - another process's progress
                "SELECT count(*) FROM tasks WHERE task_id LIKE $1 AND ended_at IS NULL", f"{stem}%"
            ):
                await asyncio.sleep(0.2)
        stored = "SELECT count(*)::float8 / nullif(count(DISTINCT task_id), 0) FROM task_events WHERE task_id LIKE $1"
        found: float | None = await connection.fetchval(stored, f"{stem}%")
        return found
    finally:
        await connection.close()


async def _history_events(servers: Servers, stem: str, tasks: int) -> float:
    lengths = []
    for n in range(0, tasks, max(1, tasks // SAMPLED)):
        handle = servers.client.get_workflow_handle(workflow_id_of(f"{stem}-{n}"))
        await handle.result()
        lengths.append((await handle.describe()).history_length)
    return statistics.median(lengths)


def towards(party: Party) -> dict[str, str]:
    """Settings of a worker. Nothing of the waiting tasks is due while others are measured: neither poll nor SLA."""
    seldom = {"IMAGE_POLL_AFTER_SECONDS": "7200", "IMAGE_POLL_AT_MOST_SECONDS": "7200"}
    seldom |= {"QUEUE_SLA_STANDARD_MINUTES": "7200", "QUEUE_SLA_ACCELERATED_MINUTES": "7200"}
    return {"COMFYUI_URL": party.url, "CREDITS_URL": party.url, **seldom}


def _line(rate: Rate) -> str:
    spent = ", ".join(f"{part} {1000 * seconds:.0f}" for part, seconds in rate.processor_seconds.items())
    return f"  {rate.name:<14} {rate.tasks_per_second:5.2f} tasks/s   processor ms a task: {spent}"
