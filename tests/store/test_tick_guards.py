"""Each guard of the statement that writes ticks is needed: left out, the store does what the guard prevents.

The statement is the short way's only protection (decision 4), so this is its mutation test.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import pytest
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.ticks import Tick
from store import TaskStore, ticks
from tests.store.facts import end, fact, write_of
from tests.store.test_ticks import taken, tick

Prepared = tuple[str, Tick]


async def ended_that_keeps_its_report(store: TaskStore) -> Prepared:
    task_id = await taken(store)
    row = await store.task(task_id)
    assert row is not None
    await store.write(write_of(task_id, end(), version=2, status=TaskStatus.COMPLETED, taken=row.taken))
    return task_id, tick(task_id, 2)


async def another_job(store: TaskStore) -> Prepared:
    task_id = await taken(store)
    return task_id, tick(task_id, 2, job_id="k")


async def another_report(store: TaskStore) -> Prepared:
    task_id = await taken(store)
    return task_id, tick(task_id, 2, digest="another")


async def older_than_a_tick(store: TaskStore) -> Prepared:
    task_id = await taken(store)
    await store.write(write_of(task_id, fact("j:9", job_id="j", sequence=9, is_change=True), version=0))
    return task_id, tick(task_id, 5)


async def older_than_what_was_taken(store: TaskStore) -> Prepared:
    """The workflow took a report that changed nothing to show: it wrote no fact of it."""
    task_id = await taken(store)
    row = await store.task(task_id)
    assert row is not None and row.taken is not None
    later = row.taken.model_copy(update={"sequence": 9})
    await store.write(write_of(task_id, fact("held:1"), version=2, taken=later, attempts=1, stage="processing"))
    return task_id, tick(task_id, 5)


async def within_the_second(store: TaskStore) -> Prepared:
    task_id = await taken(store)
    await store.write_ticks([tick(task_id, 2)])
    return task_id, tick(task_id, 3)


GUARDS: Final[dict[str, Callable[[TaskStore], Awaitable[Prepared]]]] = {
    "AND tasks.ended_at IS NULL\n": ended_that_keeps_its_report,
    "AND tasks.taken ->> 'job_id' = locked.job_id\n": another_job,
    "AND tasks.taken ->> 'digest' = locked.digest\n": another_report,
    "AND coalesce((tasks.job_sequences ->> locked.job_id)::bigint, -1) < locked.sequence\n": older_than_a_tick,
    "AND (tasks.taken ->> 'sequence')::bigint < locked.sequence\n": older_than_what_was_taken,
    "AND (tasks.ticked_at IS NULL OR tasks.ticked_at <= clock_timestamp() - interval '1 second')\n": within_the_second,
}


def test_every_guard_has_its_case() -> None:
    statement = str(ticks._WRITE)
    update = statement[statement.index("WHERE tasks.task_id = locked.task_id") : statement.index("RETURNING")]
    assert update.count("        AND ") == len(GUARDS)
    assert all(update.count(guard) == 1 for guard in GUARDS)


@pytest.mark.parametrize("guard", GUARDS)
async def test_without_the_guard_the_row_changes(
    task_store: TaskStore, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    prepare = GUARDS[guard]
    task_id, given = await prepare(task_store)
    before = await task_store.task(task_id), await task_store.events(task_id)
    await task_store.write_ticks([given])
    assert (await task_store.task(task_id), await task_store.events(task_id)) == before

    task_id, given = await prepare(task_store)
    before = await task_store.task(task_id), await task_store.events(task_id)
    without = text(str(ticks._WRITE).replace(guard, "\n")).bindparams(bindparam("ticks", type_=JSONB))
    monkeypatch.setattr(ticks, "_WRITE", without)
    await task_store.write_ticks([given])
    assert (await task_store.task(task_id), await task_store.events(task_id)) != before
