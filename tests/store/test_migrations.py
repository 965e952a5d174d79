"""The tables, forwards and back."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from store import StoreUnavailable, TaskStore, migrate
from store.migrate import revert
from store.tables import metadata
from tests.conftest import NewDatabase
from tests.store.facts import claim_of, new_task_id


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
