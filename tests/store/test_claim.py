"""The claim of a task id (contract §8)."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import TaskStatus
from store import TaskStore
from tests.store.facts import NOON, claim_of, new_task_id


async def test_first_run_claims_the_id_and_the_history_starts_with_accepted(task_store: TaskStore) -> None:
    task_id = new_task_id()

    assert await task_store.claim(claim_of(task_id))

    [event] = await task_store.events(task_id)
    assert (event.event_id, event.seq, event.event) == (f"{task_id}:1", 1, EventType.ACCEPTED)
    assert (event.status, event.ts, event.task_type) == (TaskStatus.QUEUED, NOON, "image.generate")
    row = await task_store.task(task_id)
    assert row is not None
    assert (row.tenant_id, row.status, row.version, row.last_seq) == ("tenant-a", TaskStatus.QUEUED, 0, 1)


async def test_a_run_that_repeats_its_claim_holds_it_and_writes_nothing(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))

    assert await task_store.claim(claim_of(task_id, at=NOON + timedelta(hours=1)))

    assert len(await task_store.events(task_id)) == 1
    row = await task_store.task(task_id)
    assert row is not None
    assert row.created_at == NOON


async def test_another_run_is_refused_and_touches_nothing(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    before = await task_store.task(task_id)

    assert not await task_store.claim(claim_of(task_id, "run-2", tenant_id="tenant-b"))

    assert await task_store.task(task_id) == before
    assert len(await task_store.events(task_id)) == 1


async def test_of_runs_that_claim_concurrently_exactly_one_wins(task_store: TaskStore) -> None:
    task_id = new_task_id()

    won = await asyncio.gather(*(task_store.claim(claim_of(task_id, f"run-{n % 6}")) for n in range(12)))

    row = await task_store.task(task_id)
    assert row is not None
    assert won == [won[n % 6] for n in range(12)]
    assert sum(won[:6]) == 1
    assert len(await task_store.events(task_id)) == 1


async def test_a_task_id_is_unknown_until_it_is_claimed(task_store: TaskStore) -> None:
    task_id = new_task_id()
    assert not await task_store.is_claimed(task_id)
    assert await task_store.task(task_id) is None

    await task_store.claim(claim_of(task_id))

    assert await task_store.is_claimed(task_id)
