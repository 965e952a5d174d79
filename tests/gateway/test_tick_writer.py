"""The short way (decision 4): what a report's sender is answered, and that none is answered before it is decided."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest

from comfyui_temporal.contracts.comfyui import JobCallback, TrainingCallback
from comfyui_temporal.contracts.scenes import Callback, scene_of_callback
from comfyui_temporal.contracts.task_store import TakenReport
from comfyui_temporal.contracts.ticks import Tick, digest_of
from gateway import tick_writer
from gateway.tick_writer import Ticked, TickWriter
from store import TaskStore, TickAnswer
from store.database import STATEMENT_TIMEOUT_SECONDS
from tests.cable import Cable
from tests.gateway.serving import Gateway, tick, training_tick
from tests.store.facts import claim_of, new_task_id, write_of
from tests.store.test_ticks import taken
from tests.waiting import comes_true, until

NOBODY_LISTENS = "postgresql://user:password@127.0.0.1:1/tasks"
MORE_TIME = {"estimated_time": 7.0}
"""A change that the workflow must hear of."""


def report(task_id: str, sequence: int, percent: float = 0.0, **fields: Any) -> JobCallback:
    return JobCallback.model_validate({"task_id": task_id, **tick(sequence, percent, **fields)})


def digest(**fields: Any) -> str:
    callback = report("any", 1, **fields)
    return digest_of(scene_of_callback(callback).update(callback))


async def known(store: TaskStore, **fields: Any) -> str:
    """A task whose workflow has taken its job's first report."""
    return await taken(store, sequence=1, job_id="job-1", digest=digest(**fields))


async def progress_of(store: TaskStore, task_id: str) -> float | None:
    row = await store.task(task_id)
    return None if row is None else row.progress


@dataclass
class LongWay:
    """Keeps what takes the long way. `has_signalled`: what the process that runs it has signalled."""

    has_signalled: bool | None = None
    taken: list[tuple[str, int]] = field(default_factory=list)

    async def take(self, task_id: str, callback: Callback) -> None:
        self.taken.append((task_id, callback.sequence))

    def has_signalled_like(self, task_id: str, callback: Callback) -> bool | None:
        return self.has_signalled


@asynccontextmanager
async def writer_on(store: TaskStore, long_way: LongWay | None = None) -> AsyncIterator[TickWriter]:
    writer = TickWriter(store, long_way or LongWay())
    try:
        yield writer
    finally:
        await writer.close()


async def test_what_is_no_tick_is_never_answered_before_it_is_signalled(
    on_a_cable: tuple[Gateway, Cable], task_store: TaskStore
) -> None:
    """The gateway never signalled the job, and has just written a tick of it."""
    gateway, cable = on_a_cable
    task_id = await known(task_store)
    assert (await gateway.post(task_id, tick(2, 20.0))).json() == {"outcome": "stored"}
    cable.pull()

    assert (await gateway.post(task_id, tick(3, 21.0))).status_code == 202
    answer = await gateway.post(task_id, tick(4, 22.0, **MORE_TIME))

    assert (answer.status_code, answer.headers.get("retry-after")) == (503, "5"), answer.text


async def test_a_report_that_the_row_knows_by_a_poll_is_a_tick_at_once(task_store: TaskStore) -> None:
    task_id = await known(task_store)
    async with writer_on(task_store, long_way := LongWay()) as writer:
        assert await writer.take(task_id, report(task_id, 2, 20.0)) is Ticked.STORED
        polled = TakenReport(job_id="job-1", sequence=3, digest=digest(**MORE_TIME))
        await task_store.write(write_of(task_id, version=2, job_id="job-1", attempts=1, taken=polled))

        assert await writer.take(task_id, report(task_id, 4, 30.0, **MORE_TIME)) is Ticked.STORED
    assert (long_way.taken, await progress_of(task_store, task_id)) == ([], 30.0)


async def shows(store: TaskStore, task_id: str, progress: float) -> bool:
    return await progress_of(store, task_id) == progress


async def test_a_store_that_does_not_answer_means_the_long_way(task_store: TaskStore) -> None:
    away = TaskStore(NOBODY_LISTENS)
    async with writer_on(away) as writer:
        assert await writer.take(task_id := new_task_id(), report(task_id, 2)) is Ticked.LONG_WAY
    await away.close()


async def test_what_was_just_signalled_waits_until_the_row_knows_it(task_store: TaskStore) -> None:
    await task_store.claim(claim_of(task_id := new_task_id()))
    async with writer_on(task_store, long_way := LongWay(has_signalled=True)) as writer:
        assert await writer.take(task_id, report(task_id, 2, 20.0)) is Ticked.COALESCED
        first = TakenReport(job_id="job-1", sequence=1, digest=digest())
        await task_store.write(write_of(task_id, job_id="job-1", attempts=1, taken=first))
        await until(lambda: shows(task_store, task_id, 20.0))
    assert long_way.taken == []


async def test_what_the_row_does_not_learn_in_time_is_signalled_once(
    task_store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick_writer, "KNOWN_SOON", 0.01)
    await task_store.claim(claim_of(task_id := new_task_id()))
    async with writer_on(task_store, long_way := LongWay(has_signalled=True)) as writer:
        assert await writer.take(task_id, report(task_id, 2)) is Ticked.COALESCED
        await comes_true(lambda: bool(long_way.taken))
    assert long_way.taken == [(task_id, 2)]


class CountingStore(TaskStore):
    """Counts how often each task's tick was tried."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.tried: Counter[str] = Counter()

    async def write_ticks(self, given: Sequence[Tick]) -> dict[str, TickAnswer]:
        answers = await super().write_ticks(given)
        self.tried.update(tick.task_id for tick in given)
        return answers


@pytest.fixture
async def counting(postgres_dsn: str) -> AsyncIterator[CountingStore]:
    store = CountingStore(postgres_dsn)
    yield store
    await store.close()


@asynccontextmanager
async def locked(postgres_dsn: str, task_id: str) -> AsyncIterator[asyncpg.Connection]:
    """Another writer has the task's row; it commits at the end."""
    connection = await asyncpg.connect(postgres_dsn)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM tasks WHERE task_id = $1 FOR UPDATE", task_id)
            yield connection
    finally:
        await connection.close()


async def test_a_locked_row_delays_its_own_tick_alone(
    counting: CountingStore, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick_writer, "MAX_TRIES", 2)
    held, others = await known(counting), [await known(counting) for _ in range(2)]
    async with writer_on(counting, long_way := LongWay()) as writer:
        async with locked(postgres_dsn, held):
            began = time.monotonic()
            given = [writer.take(task_id, report(task_id, 2, 20.0)) for task_id in (held, *others)]
            assert await asyncio.gather(*given) == [Ticked.COALESCED, Ticked.STORED, Ticked.STORED]
            assert time.monotonic() - began < STATEMENT_TIMEOUT_SECONDS / 2
            await comes_true(lambda: counting.tried[held] > 3)
            assert await progress_of(counting, held) == 0.0
        await until(lambda: shows(counting, held, 20.0))
    assert long_way.taken == []


async def test_a_write_that_is_just_being_made_may_make_a_report_a_tick(
    counting: CountingStore, postgres_dsn: str
) -> None:
    await counting.claim(claim_of(task_id := new_task_id()))
    first = TakenReport(job_id="job-1", sequence=1, digest=digest())
    async with writer_on(counting, long_way := LongWay()) as writer:
        async with locked(postgres_dsn, task_id) as connection:
            taking = asyncio.create_task(writer.take(task_id, report(task_id, 2, 20.0)))
            await comes_true(lambda: counting.tried[task_id] > 0)
            again = asyncio.create_task(writer.take(task_id, report(task_id, 3, 30.0)))
            await connection.execute("UPDATE tasks SET taken = $2 WHERE task_id = $1", task_id, first.model_dump_json())
            assert not again.done()
        assert (await taking, await again) == (Ticked.COALESCED, Ticked.STORED)
    assert (long_way.taken, await progress_of(counting, task_id)) == ([], 30.0)


async def test_what_may_be_no_tick_waits_a_moment_for_a_locked_row_and_goes_the_long_way(
    counting: CountingStore, postgres_dsn: str
) -> None:
    await counting.claim(claim_of(task_id := new_task_id()))
    async with writer_on(counting) as writer, locked(postgres_dsn, task_id):
        assert await writer.take(task_id, report(task_id, 2)) is Ticked.LONG_WAY
    assert counting.tried[task_id] == tick_writer.MAX_TRIES + 1


async def test_a_writer_that_closes_writes_what_waits_for_its_second(task_store: TaskStore) -> None:
    task_id = await known(task_store)
    async with writer_on(task_store) as writer:
        assert await writer.take(task_id, report(task_id, 2, 20.0)) is Ticked.STORED
        assert await writer.take(task_id, report(task_id, 3, 30.0)) is Ticked.COALESCED
        assert await progress_of(task_store, task_id) == 20.0
    assert await progress_of(task_store, task_id) == 30.0


async def test_beyond_its_limit_a_tick_of_another_task_takes_the_long_way(
    task_store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick_writer, "MAX_WAITING", 1)
    first, second = await known(task_store), await known(task_store)
    async with writer_on(task_store) as writer:
        await writer.take(first, report(first, 2, 20.0))
        await writer.take(first, report(first, 3, 30.0))  # waits for its second
        assert await writer.take(second, report(second, 2)) is Ticked.LONG_WAY
        assert await writer.take(first, report(first, 4, 40.0)) is Ticked.COALESCED
    assert (await progress_of(task_store, first), await progress_of(task_store, second)) == (40.0, 0.0)


@pytest.mark.parametrize(
    ("change", "is_tick"),
    [
        ({"stage_progress": 2.0, "gpu_hours_used": 0.5}, True),
        ({"training_status": "checkpointing"}, True),
        ({"output": {"metrics": {"loss": 0.5}}}, True),
        ({"training_status": "queued"}, False),
        ({"training_stage": "evaluating"}, False),
        ({"gpu_hours": 2.5}, False),
        ({"gpu_slots": 2}, False),
        ({"checkpoint": {"uri": "s3://checkpoints/1", "epoch": 1, "step": 10, "gpu_hours_used": 0.5}}, False),
    ],
)
async def test_a_change_that_no_flow_uses_is_a_tick_and_every_other_one_is_not(
    task_store: TaskStore, change: dict[str, Any], is_tick: bool
) -> None:
    task_id = new_task_id()
    first, changed = (
        TrainingCallback.model_validate({"task_id": task_id, **training_tick(2, **fields)}) for fields in ({}, change)
    )
    before = digest_of(scene_of_callback(first).update(first))
    task_id = await taken(task_store, sequence=1, job_id="training-1", digest=before)
    async with writer_on(task_store) as writer:
        assert await writer.take(task_id, changed) is (Ticked.STORED if is_tick else Ticked.LONG_WAY)
