"""Facts become events (contract §6): keyed, in order, gapless, nothing after the end."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import asyncpg
import pytest

from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import TaskException
from comfyui_temporal.contracts.tasks import CreditsSummary, TaskStatus
from store import NotTheClaimant, TaskStore, TaskUnknown
from tests.store.facts import NOON, claim_of, end, fact, new_task_id, write_of


async def claimed(store: TaskStore) -> str:
    task_id = new_task_id()
    await store.claim(claim_of(task_id))
    return task_id


async def history(store: TaskStore, task_id: str) -> list[tuple[int, str | None]]:
    """`seq` and message of each event after the first; tests put the fact's key into the message."""
    return [(event.seq, event.message) for event in await store.events(task_id) if event.seq > 1]


def keyed_fact(key: str, **fields: Any) -> Any:
    return fact(key, message=key, **fields)


async def test_a_fact_becomes_one_event_with_the_next_number(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    held = keyed_fact("held:1", event=EventType.CREDITS, credits_delta=-44, balance_after=956)

    await task_store.write(write_of(task_id, held, version=3, credits=CreditsSummary(held=44)))

    event = (await task_store.events(task_id))[-1]
    assert (event.seq, event.event, event.credits_delta, event.balance_after) == (2, EventType.CREDITS, -44, 956)
    row = await task_store.task(task_id)
    assert row is not None
    assert (row.last_seq, row.version, row.credits.held, row.status) == (2, 3, 44, TaskStatus.RUNNING)


async def test_a_repeated_key_writes_nothing(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, keyed_fact("a"), keyed_fact("a"), keyed_fact("b")))
    await task_store.write(write_of(task_id, keyed_fact("accepted"), keyed_fact("b"), keyed_fact("c"), version=2))

    assert await history(task_store, task_id) == [(2, "a"), (3, "b"), (4, "c")]


async def test_a_lower_sequence_of_the_same_job_is_not_written(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, keyed_fact("j:5", job_id="j", sequence=5)))
    await task_store.write(
        write_of(
            task_id,
            keyed_fact("j:4", job_id="j", sequence=4),
            keyed_fact("k:1", job_id="k", sequence=1),
            keyed_fact("j:5b", job_id="j", sequence=5),
            keyed_fact("j:6", job_id="j", sequence=6),
            version=2,
        )
    )

    assert await history(task_store, task_id) == [(2, "j:5"), (3, "k:1"), (4, "j:5b"), (5, "j:6")]


async def test_a_known_key_writes_nothing_also_with_a_higher_sequence(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, keyed_fact("stage", job_id="j", sequence=5)))
    await task_store.write(write_of(task_id, keyed_fact("stage", job_id="j", sequence=6), version=2))

    assert await history(task_store, task_id) == [(2, "stage")]


@pytest.mark.parametrize(
    "instant",
    [
        datetime(1, 1, 2, tzinfo=UTC),
        datetime(2026, 1, 1, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC),
    ],
)
async def test_extreme_values_of_every_type_are_read_back_unchanged(task_store: TaskStore, instant: datetime) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id, at=datetime(1, 1, 1, 12, tzinfo=UTC)))
    given = {"ts": instant, "next_eta": instant, "progress": 33.333333333333336, "message": 'a "\\u0000" \n é 😀'}
    numbers = {"queue_position": 2**63 - 1, "credits_delta": -(2**63), "balance_after": 0}

    await task_store.write(write_of(task_id, fact("a", **given, **numbers, result_urls=["https://a.example/1"])))

    event = (await task_store.events(task_id))[-1]
    assert event.model_dump(include={*given, *numbers}) == {**given, **numbers}
    assert (event.result_urls, event.output, event.stage) == (["https://a.example/1"], None, None)


async def test_nothing_is_written_after_the_end(task_store: TaskStore) -> None:
    task_id, later = await claimed(task_store), NOON + timedelta(minutes=1)
    await task_store.write(
        write_of(task_id, end(message="end", ts=later), keyed_fact("x"), version=5, status=TaskStatus.COMPLETED)
    )
    await task_store.write(write_of(task_id, keyed_fact("y"), version=9, status=TaskStatus.RUNNING))

    assert await history(task_store, task_id) == [(2, "end")]
    row = await task_store.task(task_id)
    assert row is not None
    assert (row.status, row.version, row.ended_at) == (TaskStatus.COMPLETED, 5, later)


async def test_a_late_repeat_of_an_older_write_changes_nothing(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    old = write_of(task_id, keyed_fact("j:1", job_id="j", sequence=1), version=1, stage="queued")
    await task_store.write(old)
    await task_store.write(write_of(task_id, keyed_fact("j:2", job_id="j", sequence=2), version=2, stage="processing"))
    before = await task_store.task(task_id)

    await task_store.write(old)

    assert await task_store.task(task_id) == before
    assert await history(task_store, task_id) == [(2, "j:1"), (3, "j:2")]


async def test_a_run_that_never_claimed_the_task_writes_nothing(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    before = await task_store.task(task_id)

    with pytest.raises(NotTheClaimant, match=task_id):
        await task_store.write(write_of(task_id, keyed_fact("a"), run_id="run-2", version=7))

    assert await task_store.task(task_id) == before
    assert await history(task_store, task_id) == []


async def test_a_write_without_a_claim_is_refused(task_store: TaskStore) -> None:
    with pytest.raises(TaskUnknown):
        await task_store.write(write_of(new_task_id(), keyed_fact("a")))


async def test_exception_records_are_kept_once_by_key_and_also_after_the_end(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    write = write_of(task_id, end(), version=2)
    write.exceptions = [
        TaskException(key="shortfall", code="shortfall", message="3 points", details={"points": 3}, ts=NOON)
    ]
    await task_store.write(write)
    late = TaskException(key="undo", code="undo_unfinished", message="job", ts=NOON + timedelta(seconds=1))
    write.exceptions = [write.exceptions[0].model_copy(update={"message": "another"}), late]
    await task_store.write(write)

    records = await task_store.exceptions(task_id=task_id)

    assert [(record.key, record.message) for record in records] == [("undo", "job"), ("shortfall", "3 points")]
    assert records[1].details == {"points": 3}
    assert [record.key for record in await task_store.exceptions(task_id=task_id, codes=["shortfall"])] == ["shortfall"]


async def test_text_that_postgresql_refuses_is_repaired_at_any_depth(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    write = write_of(task_id, fact("k\0", message="a\0b", stage="s\ud800"), job_id="j\0")
    write.exceptions = [TaskException(key="k", code="c", message="m\0", details={"d\0": ["\0"]}, ts=NOON)]

    await task_store.write(write)
    await task_store.write(write)

    assert await history(task_store, task_id) == [(2, "a\ufffdb")]
    [record] = await task_store.exceptions(task_id=task_id)
    assert record.details == {"d\ufffd": ["\ufffd"]}


async def test_each_write_notifies_once_with_the_newest_number(task_store: TaskStore, postgres_dsn: str) -> None:
    payloads: asyncio.Queue[str] = asyncio.Queue()
    listener = await asyncpg.connect(postgres_dsn)
    await listener.add_listener("task_events", lambda *arguments: payloads.put_nowait(arguments[-1]))
    task_id = await claimed(task_store)
    write = write_of(task_id, keyed_fact("a"), keyed_fact("b"))

    await task_store.write(write)
    await task_store.write(write)
    await task_store.write(write_of(task_id, end(), version=2))

    notified = [await asyncio.wait_for(payloads.get(), 5) for _ in range(3)]
    await listener.close()
    assert notified == [f"{task_id}:{seq}" for seq in (1, 3, 4)]
    assert payloads.empty()


async def test_concurrent_writers_leave_one_gapless_history(task_store: TaskStore) -> None:
    """Twelve workers that each act as the only one: every key once, no gap, the highest version wins."""
    task_id = await claimed(task_store)
    dice = random.Random(7)
    writes = [
        write_of(task_id, *(keyed_fact(f"k{n}") for n in dice.sample(range(20), 4)), version=version, attempts=version)
        for version in range(1, 13)
    ]

    await asyncio.gather(*(task_store.write(write) for write in dice.sample(writes, len(writes))))

    events = await task_store.events(task_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    keys = [event.message or "" for event in events[1:]]
    assert sorted(keys) == sorted({written.key for write in writes for written in write.facts})
    row = await task_store.task(task_id)
    assert row is not None
    assert (row.version, row.attempts, row.last_seq) == (12, 12, len(events))


async def test_a_stage_that_a_job_enters_again_goes_on_where_it_was(task_store: TaskStore) -> None:
    """ComfyUI may put a job back into its queue, e.g. where its server restarts."""
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    reports = [("processing", 80.0), ("queued", 0.0), ("processing", 5.0), ("processing", 90.0)]
    for sequence, (stage, progress) in enumerate(reports, start=1):
        there: dict[str, Any] = {"stage": stage, "progress": progress}
        given = fact(f"j:{sequence}", job_id="j", sequence=sequence, is_change=sequence < 4, **there)
        await task_store.write(write_of(task_id, given, version=sequence, attempts=1, job_id="j", **there))

    shown = [(event.stage, event.progress) for event in await task_store.events(task_id)][1:]
    assert shown == [("processing", 80.0), ("queued", 0.0), ("processing", 80.0), ("processing", 90.0)]


async def test_progress_within_an_attempt_and_stage_never_goes_back(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    there: dict[str, Any] = {"stage": "processing", "progress": 66.0}
    await task_store.write(write_of(task_id, keyed_fact("j:3", **there), version=8, attempts=1, **there))

    reset: dict[str, Any] = {"stage": "processing", "progress": 0.0}
    await task_store.write(write_of(task_id, keyed_fact("given_back:1", **reset), version=9, attempts=1, **reset))
    next_stage: dict[str, Any] = {"stage": "delivery", "progress": 10.0}
    await task_store.write(write_of(task_id, keyed_fact("j:4", **next_stage), version=10, attempts=1, **next_stage))

    assert [event.progress for event in await task_store.events(task_id)][1:] == [66.0, 66.0, 10.0]
    row = await task_store.task(task_id)
    assert row is not None
    assert (row.stage, row.progress) == ("delivery", 10.0)


async def test_the_end_is_written_to_the_row_also_by_a_run_that_was_reset(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, keyed_fact("j:3"), version=8))
    await task_store.write(write_of(task_id, end(status=TaskStatus.FAILED), version=5, status=TaskStatus.FAILED))

    row = await task_store.task(task_id)
    assert row is not None
    assert row.status is TaskStatus.FAILED
    assert row.ended_at is not None
