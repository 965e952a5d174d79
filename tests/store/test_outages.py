"""PostgreSQL away, hanging, restarted, locked: one named failure, in time, and recovery by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.tenant_limits import TenantLimits
from store import StoreUnavailable, TaskStore
from store.database import POOL_SIZE, Database
from tests.cable import Cable, cable_to_postgres
from tests.conftest import NewDatabase, unique
from tests.store.facts import claim_of, fact, new_task_id, write_of
from tests.waiting import until


@pytest.fixture
async def on_a_cable(postgres_dsn: str) -> AsyncIterator[tuple[TaskStore, Cable]]:
    """A store whose connection to PostgreSQL can be cut."""
    async with cable_to_postgres(postgres_dsn) as cable:
        store = TaskStore(cable.dsn)
        yield store, cable
        cable.plug_in()
        await store.close()


@pytest.mark.parametrize("fault", ["pull", "hang"])
async def test_an_outage_is_one_named_failure_in_time_and_ends_by_itself(
    on_a_cable: tuple[TaskStore, Cable], fault: str
) -> None:
    store, cable = on_a_cable
    task_id = new_task_id()
    await store.claim(claim_of(task_id))
    getattr(cable, fault)()

    began = time.monotonic()
    writes = [store.write(write_of(task_id, fact(f"k{n}"), version=n)) for n in range(POOL_SIZE * 2)]
    failures = await asyncio.gather(*writes, return_exceptions=True)
    took = time.monotonic() - began

    assert all(isinstance(failure, StoreUnavailable) for failure in failures)
    assert took < 4.0
    assert f"127.0.0.1:{cable.port}" in str(failures[0])
    assert "secret-word" not in " ".join(map(str, failures))
    cable.plug_in()

    async def written() -> bool:
        try:
            await store.write(write_of(task_id, fact("after"), version=99))
        except StoreUnavailable:
            return False
        return True

    await until(written)
    events = await store.events(task_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert (await store.task(task_id)).version == 99  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["start", "stream", "claim"])
async def test_what_is_counted_for_one_tenant_does_not_wait_in_line_while_postgresql_hangs(
    on_a_cable: tuple[TaskStore, Cable], kind: str
) -> None:
    store, cable = on_a_cable
    tenant_id, limits = unique("tenant"), TenantLimits(starts_per_minute=1_000, open_streams=1_000)

    def counted(n: int) -> Coroutine[Any, Any, object]:
        if kind == "start":
            return store.admit_start(tenant_id=tenant_id, task_id=new_task_id(), size=1, limits=limits)
        if kind == "stream":
            return store.admit_stream(tenant_id=tenant_id, process_id=tenant_id, own_open=n, limits=limits)
        return store.claim(claim_of(new_task_id(), tenant_id=tenant_id), limits=limits)

    await counted(0)
    cable.hang()
    began = time.monotonic()
    failures = await asyncio.gather(*(counted(n) for n in range(10)), return_exceptions=True)
    assert all(isinstance(failure, StoreUnavailable) for failure in failures), failures
    assert time.monotonic() - began < 4.0
    cable.plug_in()

    async def is_counted() -> bool:
        try:
            await counted(11)
        except StoreUnavailable:
            return False
        return True

    await until(is_counted)


async def test_a_restart_of_postgresql_is_not_noticed(new_database: NewDatabase) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    task_id = new_task_id()
    await store.claim(claim_of(task_id))
    await asyncio.gather(*(store.task(task_id) for _ in range(POOL_SIZE)))
    admin = await asyncpg.connect(dsn)
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> $1",
        admin.get_server_pid(),
    )

    await store.write(write_of(task_id, fact("after")))

    assert (await store.events(task_id))[-1].seq == 2
    await admin.close()
    await store.close()


async def test_an_internal_error_of_the_driver_is_an_outage(postgres_dsn: str) -> None:
    """Seen in a soak: asyncpg's InternalClientError, where the server's closing message came between two others."""
    database = Database(postgres_dsn)

    async def failing(_connection: AsyncConnection) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    with pytest.raises(StoreUnavailable):
        await database.transaction(failing, doing="testing")
    await database.close()


async def test_a_locked_task_costs_no_more_than_the_statement_timeout(task_store: TaskStore, postgres_dsn: str) -> None:
    locked, free = new_task_id(), new_task_id()
    await task_store.claim(claim_of(locked))
    await task_store.claim(claim_of(free))
    other = await asyncpg.connect(postgres_dsn)
    lock = other.transaction()
    await lock.start()
    await other.execute("SELECT 1 FROM tasks WHERE task_id = $1 FOR UPDATE", locked)

    began = time.monotonic()
    blocked = asyncio.create_task(task_store.write(write_of(locked, fact("a"))))
    await task_store.write(write_of(free, fact("a")))
    with pytest.raises(StoreUnavailable, match="57014"):
        await blocked
    took = time.monotonic() - began
    await lock.rollback()
    await other.close()

    assert took < 4.0
    await task_store.write(write_of(locked, fact("a")))
    assert [event.seq for event in await task_store.events(locked)] == [1, 2]


async def test_missing_tables_are_reported_with_the_command_that_creates_them(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database(migrated=False))
    with pytest.raises(StoreUnavailable, match="python -m store migrate"):
        await store.claim(claim_of(new_task_id()))
    await store.close()


async def test_a_server_that_only_reads_is_left_at_the_first_write_after_the_failover(
    new_database: NewDatabase,
) -> None:
    """As after a failover by name: the pool's connections still lead to the old server, now a standby."""
    dsn = await new_database()
    database = (await _asked(dsn, "SELECT current_database()"))[0][0]
    store, checked = TaskStore(dsn), TaskStore(dsn)
    task_id = new_task_id()
    await store.claim(claim_of(task_id))
    await _asked(dsn, f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
    await _asked(dsn, _END_OTHERS)

    with pytest.raises(StoreUnavailable, match="takes no writes"):
        await store.write(write_of(task_id, fact("standby")))
    for reader in (store, checked):
        with pytest.raises(StoreUnavailable, match="takes no writes"):
            await reader.check()
        # Reading is still possible, and fills the pool.
        assert await asyncio.gather(*(reader.task(task_id) for _ in range(POOL_SIZE)))
    await _asked(dsn, f'SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE; ALTER DATABASE "{database}" RESET ALL')

    await store.write(write_of(task_id, fact("primary")))
    await checked.check()

    assert [event.seq for event in await store.events(task_id)] == [1, 2]
    for one in (store, checked):
        await one.close()


_END_OTHERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid()"
)


async def _asked(dsn: str, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        for part in statement.split("; "):
            rows = await connection.fetch(part)
        return rows
    finally:
        await connection.close()
