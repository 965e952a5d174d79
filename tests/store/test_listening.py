"""What streams need from the store: a notification of each write, heads, and the events of many tasks together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest

from store import EventListener, TaskStore
from tests.cable import cable_to_postgres
from tests.conftest import unique
from tests.store.facts import claim_of, end, fact, new_task_id, write_of
from tests.waiting import until


class Notifications:
    def __init__(self) -> None:
        self.writes: list[tuple[str, int]] = []
        self.times_resumed = 0

    def resumed(self) -> None:
        self.times_resumed += 1

    def written(self, task_id: str, seq: int) -> None:
        self.writes.append((task_id, seq))

    async def has_write(self, task_id: str, seq: int) -> bool:
        return (task_id, seq) in self.writes

    async def has_resumed(self, times: int) -> bool:
        return self.times_resumed >= times


@asynccontextmanager
async def running(listener: EventListener) -> AsyncIterator[None]:
    task = asyncio.create_task(listener.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_each_write_is_notified_with_its_newest_seq(task_store: TaskStore) -> None:
    notified = Notifications()
    async with running(task_store.listener(written=notified.written, resumed=notified.resumed)):
        await until(lambda: notified.has_resumed(1))
        task_id = new_task_id()
        await task_store.claim(claim_of(task_id))
        await task_store.write(write_of(task_id, fact("a"), fact("b")))
        await until(lambda: notified.has_write(task_id, 3))
    assert [seq for written_id, seq in notified.writes if written_id == task_id] == [1, 3]


async def test_an_internal_error_of_the_driver_ends_no_listener(
    task_store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in a soak: asyncpg's InternalClientError, where the server's closing message came between two others."""
    notified, connect = Notifications(), asyncpg.connect
    faults = [asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")]

    async def failing(*given: Any, **named: Any) -> Any:
        if faults:
            raise faults.pop()
        return await connect(*given, **named)

    monkeypatch.setattr(asyncpg, "connect", failing)
    async with running(task_store.listener(written=notified.written, resumed=notified.resumed)):
        await until(lambda: notified.has_resumed(1))


@pytest.mark.parametrize("fault", ["pull", "hang"])
async def test_a_lost_connection_is_noticed_and_reopened(task_store: TaskStore, postgres_dsn: str, fault: str) -> None:
    notified = Notifications()
    async with cable_to_postgres(postgres_dsn) as cable:
        store = TaskStore(cable.dsn)
        listener = store.listener(written=notified.written, resumed=notified.resumed)
        async with running(listener):
            await until(lambda: notified.has_resumed(1))
            getattr(cable, fault)()

            async def is_lost() -> bool:
                return not listener.is_listening

            await until(is_lost)
            cable.plug_in()
            await until(lambda: notified.has_resumed(2))
            task_id = new_task_id()
            await task_store.claim(claim_of(task_id))
            await until(lambda: notified.has_write(task_id, 1))


async def test_the_events_of_many_tasks_come_after_each_ones_own_position(task_store: TaskStore) -> None:
    one, two, three = (new_task_id() for _ in range(3))
    for task_id in (one, two, three):
        await task_store.claim(claim_of(task_id))
        await task_store.write(write_of(task_id, *(fact(f"k{n}") for n in range(4))))
    found = await task_store.events_of_each({one: 0, two: 3, unique("none"): 0}, limit_each=4)
    assert [event.seq for event in found if event.task_id == one] == [1, 2, 3, 4]
    assert [event.seq for event in found if event.task_id == two] == [4, 5]
    assert len(found) == 6
    kept = await task_store.events(found[0].task_id)
    assert found[0].model_dump() in [event.model_dump() for event in kept]


async def test_heads_show_how_far_tasks_have_come(task_store: TaskStore) -> None:
    tenant = unique("tenant")
    running_id, ended_id = new_task_id(), new_task_id()
    for task_id in (running_id, ended_id):
        await task_store.claim(claim_of(task_id, tenant_id=tenant))
    await task_store.write(write_of(ended_id, end(), status="completed"))
    heads = await task_store.heads([running_id, ended_id, unique("none")])
    assert {(head.task_id, head.last_seq, head.has_ended) for head in heads.values()} == {
        (running_id, 1, False),
        (ended_id, 2, True),
    }
    assert heads[running_id].tenant_id == tenant
    recent = await task_store.recent_heads(tenant)
    assert [head.task_id for head in recent] == [running_id], "the ended one began long ago"
