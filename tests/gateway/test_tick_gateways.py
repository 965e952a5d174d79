"""Gateways beside one task's workflow, two jobs, estimates that return: nothing that a job says is lost (§2, §6)."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

import asyncpg
import pytest

from comfyui_temporal.contracts.scenes import Callback, scene_of_callback
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.ticks import digest_of, report_taken
from gateway import tick_writer
from gateway.callback_relay import CallbackRelay, Relayed
from gateway.tick_writer import Ticked, TickWriter
from store import TaskStore
from tests.gateway.test_tick_writer import report
from tests.store.facts import claim_of, end, fact, new_task_id, write_of
from tests.waiting import until

JOBS: Final = ("job-1", "job-2")
REPORTS: Final = 25
"""Of each job, in any order, with repeats, at any gateway. Then it goes on with its last estimate, at one of them."""
AT_MOST: Final = 150
"""So many more reports may come before its workflow knows that estimate."""


class Workflow:
    """What the task's workflow takes of the signals and polls, and writes."""

    def __init__(self, store: TaskStore, task_id: str) -> None:
        self._store = store
        self._task_id = task_id
        self._version = 0
        self._attempt = 0
        self._newest: dict[str, int] = {}
        self._writing = asyncio.Lock()
        self.has_ended = False

    async def begin(self) -> None:
        """The next attempt's job is submitted; nothing that it says is known yet."""
        async with self._writing:
            self._attempt += 1
            await self._write(fact(f"retry:{self._attempt}", attempt=self._attempt), taken=None)

    async def signal(self, task_id: str, callback: Callback) -> Relayed:
        if self.has_ended:
            return Relayed.TASK_OVER
        await self.take(callback)
        return Relayed.SIGNALLED

    async def take(self, callback: Callback) -> None:
        update = scene_of_callback(callback).update(callback)
        async with self._writing:
            is_present = update.job_id == JOBS[self._attempt - 1]
            if not is_present or update.sequence <= self._newest.get(update.job_id, 0) or self.has_ended:
                return
            self._newest[update.job_id] = update.sequence
            shown = fact(
                f"{update.job_id}:{update.sequence}",
                attempt=self._attempt,
                job_id=update.job_id,
                sequence=update.sequence,
                stage="processing",
                progress=update.progress,
            )
            await self._write(shown, taken=report_taken(update), progress=update.progress or 0.0)

    async def end(self) -> None:
        async with self._writing:
            self.has_ended = True
            await self._write(end(attempt=self._attempt), status=TaskStatus.COMPLETED)

    async def _write(self, *facts: Any, **state: Any) -> None:
        self._version += 1
        here = {"attempts": self._attempt, "job_id": JOBS[self._attempt - 1], "stage": "processing"}
        await self._store.write(write_of(self._task_id, *facts, version=self._version, **{**here, **state}))


class Gateway:
    def __init__(self, store: TaskStore, workflow: Workflow) -> None:
        self._relay = CallbackRelay(workflow)
        self._writer = TickWriter(store, self._relay)

    async def come(self, task_id: str, callback: Callback) -> None:
        if await self._writer.take(task_id, callback) is Ticked.LONG_WAY:
            await self._relay.take(task_id, callback)

    async def close(self) -> None:
        await self._writer.close()
        await self._relay.close()


def said(task_id: str, job_id: str, sequence: int, estimate: float) -> Callback:
    return report(task_id, sequence, sequence / 10, job_id=job_id, estimated_time=estimate)


async def second_over(postgres_dsn: str, task_id: str, done: asyncio.Event) -> None:
    """Let the pace of ticks be no second here."""
    connection = await asyncpg.connect(postgres_dsn)
    try:
        while not done.is_set():
            await connection.execute(
                "UPDATE tasks SET ticked_at = ticked_at - interval '1 second' WHERE task_id = $1", task_id
            )
            await asyncio.sleep(0.05)
    finally:
        await connection.close()


async def jobs_shown(postgres_dsn: str, task_id: str) -> list[tuple[int, str]]:
    """Which attempts have events of which jobs."""
    connection = await asyncpg.connect(postgres_dsn)
    try:
        rows = await connection.fetch(
            "SELECT DISTINCT attempt, job_id FROM task_events WHERE task_id = $1 AND job_id IS NOT NULL ORDER BY 1, 2",
            task_id,
        )
        return [(row["attempt"], row["job_id"]) for row in rows]
    finally:
        await connection.close()


@pytest.mark.parametrize("seed", range(6))
async def test_in_the_end_the_row_has_what_the_job_said_last(
    task_store: TaskStore, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(tick_writer, "KNOWN_SOON", 0.01)
    chosen, task_id, done = random.Random(seed), new_task_id(), asyncio.Event()
    other = TaskStore(postgres_dsn)
    await task_store.claim(claim_of(task_id))
    workflow = Workflow(task_store, task_id)
    gateways = [Gateway(store, workflow) for store in (task_store, other)]
    pace = asyncio.create_task(second_over(postgres_dsn, task_id, done))
    coming: set[asyncio.Task[None]] = set()
    reports: list[Callback] = []

    def comes(gateway: Gateway, callback: Callback) -> None:
        coming.add(asyncio.create_task(gateway.come(task_id, callback)))

    async def knows(callback: Callback) -> bool:
        row = await task_store.task(task_id)
        digest = digest_of(scene_of_callback(callback).update(callback))
        return row is not None and row.taken is not None and row.taken.digest == digest

    async def shows(callback: Callback) -> bool:
        row = await task_store.task(task_id)
        return row is not None and row.progress == callback.stage_progress and await knows(callback)

    last: dict[int, float | None] = {}
    try:
        for attempt, job_id in enumerate(JOBS, start=1):
            earlier = list(reports)
            await workflow.begin()
            for sequence in range(1, REPORTS):
                reports.append(said(task_id, job_id, sequence, chosen.choice((5.0, 7.0))))
                comes(chosen.choice(gateways), reports[-1])
                if chosen.random() < 0.4:
                    comes(chosen.choice(gateways), chosen.choice(reports))
                if chosen.random() < 0.1:
                    await workflow.take(reports[-1])  # a poll
                await asyncio.sleep(chosen.choice((0.0, 0.005, 0.03)))
            estimate, other_estimate = chosen.sample((5.0, 7.0), 2)
            sequence = REPORTS + 2
            await workflow.take(said(task_id, job_id, REPORTS, other_estimate))
            await gateways[0].come(task_id, said(task_id, job_id, REPORTS + 1, estimate))
            await workflow.take(said(task_id, job_id, REPORTS + 2, other_estimate))
            while not await knows(said(task_id, job_id, sequence, estimate)):
                assert sequence < AT_MOST, "the job reports, and its workflow never hears it"
                sequence += 1
                comes(gateways[0], said(task_id, job_id, sequence, estimate))
                await asyncio.sleep(0.02)
            newest = said(task_id, job_id, sequence + 10, estimate)
            await gateways[0].come(task_id, said(task_id, job_id, sequence + 5, estimate))
            comes(gateways[1], newest)
            for _ in range(chosen.randrange(1, 8)):
                await asyncio.sleep(0.0005)
                if earlier:
                    comes(gateways[1], chosen.choice(earlier))
            await until(lambda newest=newest: shows(newest), f"the last report of {job_id}")  # type: ignore[misc]
            last[attempt] = newest.stage_progress
        await workflow.end()
        for gateway in gateways:
            await gateway.come(task_id, chosen.choice(reports))
        await asyncio.gather(*coming)
    finally:
        done.set()
        await pace
        for gateway in gateways:
            await gateway.close()
        await other.close()

    events = await task_store.events(task_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.ts for event in events] == sorted({event.ts for event in events})
    assert events[-1].status is TaskStatus.COMPLETED
    assert await jobs_shown(postgres_dsn, task_id) == [(1, JOBS[0]), (2, JOBS[1])]
    attempts = [event.attempt for event in events]
    assert attempts == sorted(attempts)
    for attempt, reached in last.items():
        progress = [event.progress for event in events if event.attempt == attempt and event.progress is not None]
        assert progress == sorted(progress)
        assert int(progress[-1]) == int(reached or 0.0)
