"""Which open tasks could not be looked at, and which namespace the store belongs to."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg

from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from store import StoreHome, TaskStore, UnseenTask
from tests.conftest import NewDatabase
from tests.store.facts import claim_of, end, new_task_id, write_of


async def test_what_could_not_be_looked_at_is_kept_until_it_could(task_store: TaskStore) -> None:
    first, second, purged = new_task_id(), new_task_id(), new_task_id()
    for task_id in (first, second):
        await task_store.claim(claim_of(task_id))

    async def kept() -> dict[str, tuple[str, int]]:
        rows = await task_store.unseen_tasks()
        return {row.task_id: (row.reason, row.times) for row in rows if row.task_id in (first, second, purged)}

    unseen = [UnseenTask(task_id=task_id, reason="a reason\x00") for task_id in (first, second, purged)]
    await task_store.note_looks(unseen_tasks=unseen)
    assert await kept() == {first: ("a reason\ufffd", 1), second: ("a reason\ufffd", 1)}, (
        "a task that is gone is not kept"
    )
    await task_store.note_looks(unseen_tasks=[UnseenTask(task_id=first, reason="x" * 2_000)], seen=[second])
    [(reason, times)] = (await kept()).values()
    assert (len(reason.encode()), times) == (500, 2)
    await task_store.write(write_of(first, end()))
    assert await kept() == {}, "what has ended needs no look"


async def test_a_store_is_bound_once_and_to_another_namespace_only_by_hand(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database())
    ours, theirs = StoreHome(namespace="ours", namespace_id="1"), StoreHome(namespace="theirs", namespace_id="2")
    assert await store.home() is None
    bound = await asyncio.gather(*(store.bind(home) for home in (ours, theirs) * 3))
    assert len({home.namespace for home in bound}) == 1, "the first process decides"
    await store.rebind(StoreHome(namespace="ours"))
    assert await store.home() == StoreHome(namespace="ours")
    assert await store.bind(theirs) == StoreHome(namespace="ours")
    assert await store.bind(ours) == ours, "the first process sets the namespace's id"
    assert await store.bind(StoreHome(namespace="ours", namespace_id="3")) == ours
    await store.close()


def test_two_namespaces_of_one_name_are_distinguished_by_their_ids() -> None:
    by_name, first, second = (StoreHome(namespace="default", namespace_id=id_) for id_ in (None, "1", "2"))
    assert by_name.is_same(first) and first.is_same(by_name) and first.is_same(first)
    assert not first.is_same(second)
    assert not by_name.is_same(StoreHome(namespace="other"))


async def test_rows_that_stay_unsettled_keep_no_other_one_out(new_database: NewDatabase) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    unknown = CreditsSummary(settlement=SettlementState.UNKNOWN, charged=None, returned=None)
    task_ids = [new_task_id() for _ in range(3)]
    for task_id in task_ids:
        await store.claim(claim_of(task_id))
        await store.write(write_of(task_id, end(), credits=unknown, status=TaskStatus.COMPLETED))
    connection = await asyncpg.connect(dsn)
    for hours, task_id in zip((3, 2, 1), task_ids, strict=True):
        await connection.execute(
            "UPDATE tasks SET ended_at = now() - make_interval(hours => $2) WHERE task_id = $1", task_id, hours
        )
    await connection.close()
    looks = [await store.take_unsettled(every=timedelta(0), limit=2) for _ in range(2)]
    assert [task.task_id for look in looks for task in look].count(task_ids[2]) == 1
    assert task_ids[2] in {task.task_id for task in looks[1]}, "the others are due again, and were looked at before"
    await store.close()


async def test_an_unsettled_row_that_cannot_be_read_hides_no_other(new_database: NewDatabase) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    readable, unreadable = new_task_id(), new_task_id()
    unknown = CreditsSummary(settlement=SettlementState.UNKNOWN, charged=None, returned=None)
    for task_id in (readable, unreadable):
        await store.claim(claim_of(task_id))
        await store.write(write_of(task_id, end(), credits=unknown, status=TaskStatus.COMPLETED))
    connection = await asyncpg.connect(dsn)
    await connection.execute("UPDATE tasks SET priority = 'urgent' WHERE task_id = $1", unreadable)
    await connection.execute("UPDATE tasks SET ended_at = now()")  # a day after its end no row is looked at any more
    await connection.close()
    taken = await store.take_unsettled(every=timedelta(0), limit=10)
    assert [task.task_id for task in taken] == [readable]
    await store.close()
