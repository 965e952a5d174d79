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
from comfyui_temporal.contracts.ticks import Tick, digest_of, report_taken
from gateway import tick_writer
from gateway.callback_relay import CallbackRelay, Relayed
from gateway.tick_writer import Ticked, TickWriter
from store import TaskStore, TickAnswer
from store.database import STATEMENT_TIMEOUT_SECONDS
from tests.cable import Cable
from tests.gateway.serving import Gateway, tick, training_tick
from tests.store.facts import claim_of, fact, new_task_id, write_of
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

    def has_signalled_like(self, task_id: str, job_id: str, digest: str) -> bool | None:
        return self.has_signalled

    def forget(self, task_id: str, job_id: str) -> None:
        self.has_signalled = None


class Signalled:
    """Keeps the sequence of each signal that the relay sends."""

    def __init__(self) -> None:
        self.sequences: list[int] = []

    async def signal(self, task_id: str, callback: Callback) -> Relayed:
        self.sequences.append(callback.sequence)
        return Relayed.SIGNALLED


class Learning(Signalled):
    """Writes what a signal says as the task's workflow does, where it is newer."""

    def __init__(self, store: TaskStore) -> None:
        super().__init__()
        self._store = store
        self._version = 0
        self._newest = 0

    async def signal(self, task_id: str, callback: Callback) -> Relayed:
        await self.learn(task_id, callback)
        return await super().signal(task_id, callback)

    async def learn(self, task_id: str, callback: Callback) -> None:
        """The workflow takes it, from this gateway's signal, another's or a poll."""
        update = scene_of_callback(callback).update(callback)
        if update.sequence <= self._newest:
            return
        self._newest, self._version = update.sequence, self._version + 1
        figures: dict[str, Any] = {"job_id": update.job_id, "progress": update.progress or 0.0}
        change = fact(f"{update.job_id}:{update.sequence}", sequence=update.sequence, **figures)
        state: dict[str, Any] = {**figures, "attempts": 1, "taken": report_taken(update)}
        await self._store.write(write_of(task_id, change, version=self._version, **state))


async def come(writer: TickWriter, relay: CallbackRelay, callback: Callback) -> Ticked:
    """A callback comes to a gateway."""
    ticked = await writer.take(callback.task_id, callback)
    if ticked is Ticked.LONG_WAY:
        await relay.take(callback.task_id, callback)
    return ticked


@asynccontextmanager
async def writer_on(store: TaskStore, long_way: LongWay | CallbackRelay | None = None) -> AsyncIterator[TickWriter]:
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


async def test_what_the_row_never_learns_is_signalled_although_a_signal_said_the_same(
    task_store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workflow took something else since: another gateway signalled it, or a poll brought it."""
    monkeypatch.setattr(tick_writer, "KNOWN_SOON", 0.01)
    task_id = await known(task_store, **MORE_TIME)
    relay = CallbackRelay(signals := Signalled())
    assert await relay.take(task_id, report(task_id, 2)) is Relayed.SIGNALLED
    async with writer_on(task_store, relay) as writer:
        assert await writer.take(task_id, report(task_id, 3, queue_position=4)) is Ticked.COALESCED
        await comes_true(lambda: 3 in signals.sequences)
    assert signals.sequences == [2, 3]


class CountingStore(TaskStore):
    """Counts how often each task's tick was tried."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.tried: Counter[str] = Counter()
        self.answers = asyncio.Event()
        """Cleared: the statement has been made, and its answer is on the way."""
        self.answers.set()

    async def write_ticks(self, given: Sequence[Tick]) -> dict[str, TickAnswer]:
        answers = await super().write_ticks(given)
        self.tried.update(tick.task_id for tick in given)
        await self.answers.wait()
        return answers


@pytest.fixture
async def counting(postgres_dsn: str) -> AsyncIterator[CountingStore]:
    store = CountingStore(postgres_dsn)
    yield store
    await store.close()


@pytest.mark.parametrize("tries_apart", [2, tick_writer.MAX_TRIES])
async def test_what_the_row_never_learns_is_signalled_however_often_the_job_reports(
    counting: CountingStore, monkeypatch: pytest.MonkeyPatch, tries_apart: int
) -> None:
    """Another gateway signals the job's second report; then the job says again what this one signalled at first."""
    monkeypatch.setattr(tick_writer, "KNOWN_SOON", 0.05)
    await counting.claim(claim_of(task_id := new_task_id()))
    relay, sequence = CallbackRelay(workflow := Learning(counting)), 2

    def is_signalled() -> bool:
        return len(workflow.sequences) > 1

    async with writer_on(counting, relay) as writer:
        assert await relay.take(task_id, report(task_id, 1)) is Relayed.SIGNALLED
        await workflow.learn(task_id, report(task_id, 2, **MORE_TIME))
        for tries in range(0, 2 * tick_writer.MAX_TRIES + 1, tries_apart):
            await comes_true(lambda tries=tries: counting.tried[task_id] >= tries or is_signalled())  # type: ignore[misc]
            if not is_signalled():
                sequence += 1
                await come(writer, relay, report(task_id, sequence, float(sequence)))
        assert is_signalled(), "the job reports, and the workflow never hears it"
        await until(lambda: shows(counting, task_id, float(sequence)))
    row = await counting.task(task_id)
    assert row is not None and row.taken is not None and row.taken.digest == digest()


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


async def test_an_older_report_never_replaces_one_that_is_being_decided(
    counting: CountingStore, postgres_dsn: str
) -> None:
    """A new stage waits for a locked row; a tick of the stage before, which comes late, is none any more."""
    task_id = await known(counting)
    async with writer_on(counting, LongWay()) as writer:
        async with locked(postgres_dsn, task_id):
            counting.answers.clear()
            newer = asyncio.create_task(writer.take(task_id, report(task_id, 11, 40.0, **MORE_TIME)))
            await comes_true(lambda: counting.tried[task_id] > 0)
            older = asyncio.create_task(writer.take(task_id, report(task_id, 10, 30.0)))
            await asyncio.sleep(0)
            counting.answers.set()
            assert await older is Ticked.COALESCED
        assert await newer is Ticked.LONG_WAY


@pytest.mark.parametrize("is_in_flight", [True, False], ids=["being decided", "waiting"])
async def test_a_stale_report_of_an_earlier_job_never_replaces_one_of_the_present_job(
    counting: CountingStore, postgres_dsn: str, is_in_flight: bool
) -> None:
    """A new estimate of the second job waits for a locked row; a report of the first one comes late."""
    task_id = await taken(counting, sequence=1, job_id="job-2", digest=digest(job_id="job-2"))
    new, stale = report(task_id, 5, 40.0, job_id="job-2", **MORE_TIME), report(task_id, 90, 90.0, job_id="job-1")
    relay = CallbackRelay(signals := Signalled())
    async with writer_on(counting, relay) as writer:
        async with locked(postgres_dsn, task_id):
            if is_in_flight:
                counting.answers.clear()
            deciding = asyncio.create_task(come(writer, relay, new))
            await comes_true(lambda: counting.tried[task_id] > 0)
            late = asyncio.create_task(come(writer, relay, stale))
            await asyncio.sleep(0)
            counting.answers.set()
            await comes_true(lambda: late.done() or deciding.done())
        await asyncio.gather(deciding, late)
    assert new.sequence in signals.sequences


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
    relay = CallbackRelay(Signalled())
    assert await relay.take(task_id, first) is Relayed.SIGNALLED
    async with writer_on(task_store, relay) as writer:  # what this process has signalled makes no difference
        assert await writer.take(task_id, changed) is (Ticked.STORED if is_tick else Ticked.LONG_WAY)
