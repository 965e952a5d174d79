"""Migrate a database's tables to a revision, forwards or back. `python -m store` calls it.

Alembic is imported inside functions: every process loads this package, few migrate, and the import takes half a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from store.database import address_of
from store.failures import StoreUnavailable

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

MIGRATIONS: Final = Path(__file__).parent / "migrations"
CONNECT_SECONDS: Final = 5.0
_LOCK_KEY: Final = 7_265_481
"""An arbitrary lock number: two processes that migrate concurrently take turns."""
LOCK_MILLISECONDS: Final = 2_000
PAUSE_SECONDS: Final = 3.0
TRIES: Final = 20
_TRIED_AGAIN: Final = ("55P03", "40P01")
"""SQLSTATE: a lock was not given in time; a deadlock."""
_HOLDERS: Final = text(
    """
    SELECT pid, usename, application_name, state, min(xact_start) AT TIME ZONE 'UTC'
    FROM pg_stat_activity JOIN pg_locks USING (pid) JOIN pg_class ON pg_class.oid = relation
    WHERE granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND relnamespace = 'public'::regnamespace AND pid <> pg_backend_pid()
    GROUP BY 1, 2, 3, 4 ORDER BY 5 LIMIT 3
    """
)
"""Of the transactions that use a table."""
SERVICES_ROLE: Final = "comfyui_temporal_services"
"""The database user of workers and gateways, if the operator created it. It owns nothing and changes no table."""
_SERVICES_EXIST: Final = text("SELECT 1 FROM pg_roles WHERE rolname = :role AND rolname <> current_user")
_GRANTS: Final = (
    "GRANT USAGE ON SCHEMA public TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
    "REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM {role}",
    "REVOKE UPDATE, DELETE ON audit_log FROM {role}",
)


async def migrate(dsn: str, *, revision: str = "head") -> None:
    """Migrate the tables forward to `revision`; up-to-date tables stay as they are.

    With all tables up to date `SERVICES_ROLE` gets the rights that it needs, if there is such a role. Raises
    StoreUnavailable, and ValueError for a revision that there is not.
    """

    def granted(connection: Connection) -> None:
        if revision == "head" and connection.scalar(_SERVICES_EXIST, {"role": SERVICES_ROLE}):
            for statement in _GRANTS:
                connection.execute(text(statement.format(role=SERVICES_ROLE)))

    await _run(dsn, _Way(revision, forwards=True), granted)


async def revert(dsn: str, *, revision: str) -> None:
    """Migrate the tables back to `revision` (`base`: remove all). Their data is lost. Raises as `migrate` does."""
    await _run(dsn, _Way(revision, forwards=False), lambda _connection: None)


class _Way:
    """From where the tables are to a revision, one step at a time."""

    def __init__(self, target: str, *, forwards: bool) -> None:
        self._target = target
        self._forwards = forwards

    def step(self, connection: Connection) -> bool:
        """Make the next step. False if there is none left."""
        from alembic import command
        from alembic.script import ScriptDirectory

        config = _configuration(connection)
        left = self._left(ScriptDirectory.from_config(config), connection)
        if not left:
            return False
        # From now on absolute: a target like `+1` counts from where the first step begins.
        self._target = left[-1]
        (command.upgrade if self._forwards else command.downgrade)(config, left[0])
        return True

    def _left(self, script: ScriptDirectory, connection: Connection) -> list[str]:
        """The revisions on the way, the target last."""
        from alembic.migration import MigrationContext
        from alembic.script.revision import RevisionError

        current = MigrationContext.configure(connection).get_current_revision()
        try:
            if self._forwards:
                way = script.iterate_revisions(self._target, current, implicit_base=True)
                return [each.revision for each in way][::-1]
            way = script.iterate_revisions(current, self._target, select_for_downgrade=True)
            return [str(each.down_revision or "base") for each in way]
        except RevisionError as error:
            raise ValueError(f"There is no way from revision {current} to {self._target}: {error}.") from None


def _configuration(connection: Connection) -> Config:
    """Alembic's configuration, without a file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


async def _run(dsn: str, way: _Way, last: Callable[[Connection], None]) -> None:
    """A transaction for each revision, then one for `last`. No table is locked for longer than its own revision."""

    async def connect() -> asyncpg.Connection[Any]:
        return await asyncpg.connect(dsn, timeout=CONNECT_SECONDS)

    def stepped(connection: Connection) -> bool:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}"))
        if way.step(connection):
            return True
        last(connection)
        return False

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        while await _until_unlocked(engine, stepped):
            pass
    except (OSError, TimeoutError, asyncpg.PostgresError, SQLAlchemyError) as error:
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailable(
            f"The tables of PostgreSQL at {address_of(dsn)} could not be migrated: "
            f"{type(cause).__name__}: {cause}. Check that the server runs and that the user may create tables."
        ) from error
    except _Locked as locked:
        raise StoreUnavailable(
            f"The tables of PostgreSQL at {address_of(dsn)} could not be migrated: a table was in use each of {TRIES} "
            f"times. The oldest transactions are of {locked}. End them and repeat: what is done stays, and nothing "
            "waits meanwhile."
        ) from None
    finally:
        await asyncio.shield(engine.dispose())


class _Locked(Exception):
    """Who has used the tables the longest."""


async def _until_unlocked(engine: AsyncEngine, step: Callable[[Connection], bool]) -> bool:
    """Do `step` in one transaction. Raises _Locked.

    A statement that waits for a table's lock holds up everybody who comes after it. So it waits for a moment only, and
    is repeated after a pause in which the others get through.
    """
    for left in reversed(range(TRIES)):
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(step)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in _TRIED_AGAIN:
                raise
        if left:
            await asyncio.sleep(PAUSE_SECONDS)
    async with engine.begin() as connection:
        rows = (await connection.execute(_HOLDERS)).all()
    raise _Locked("; ".join(_holder(*row) for row in rows) or "nobody any more")


def _holder(pid: int, user: str, application: str, state: str, began: datetime) -> str:
    named = f", {application}" if application else ""
    return f"process {pid} (user {user}{named}, {state} since {began:%Y-%m-%d %H:%M:%S} UTC)"
