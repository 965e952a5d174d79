"""Migrate a database's tables to a revision, forwards or back. `python -m store` calls it.

Alembic is imported inside functions: every process loads this package, few migrate, and the import takes half a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from store.database import address_of
from store.failures import StoreUnavailable

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS: Final = Path(__file__).parent / "migrations"
CONNECT_SECONDS: Final = 5.0
_LOCK_KEY: Final = 7_265_481
"""An arbitrary lock number: two processes that migrate concurrently take turns."""
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
    """Migrate the tables forward to `revision`; up-to-date tables stay as they are. Raises StoreUnavailable.

    With all tables up to date `SERVICES_ROLE` gets the rights that it needs, if there is such a role.
    """
    from alembic import command

    def upgraded(config: Config) -> None:
        command.upgrade(config, revision)
        connection: Connection = config.attributes["connection"]
        if revision == "head" and connection.scalar(_SERVICES_EXIST, {"role": SERVICES_ROLE}):
            for statement in _GRANTS:
                connection.execute(text(statement.format(role=SERVICES_ROLE)))

    await _run(dsn, upgraded)


async def revert(dsn: str, *, revision: str) -> None:
    """Migrate the tables back to `revision` (`base`: remove all). Their data is lost. Raises StoreUnavailable."""
    from alembic import command

    await _run(dsn, lambda config: command.downgrade(config, revision))


def _configuration(connection: Connection) -> Config:
    """Alembic's configuration, without a file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


async def _run(dsn: str, step: Callable[[Config], None]) -> None:
    async def connect() -> asyncpg.Connection[Any]:
        return await asyncpg.connect(dsn, timeout=CONNECT_SECONDS)

    def migrated(connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        step(_configuration(connection))

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(migrated)
    except (OSError, TimeoutError, asyncpg.PostgresError, SQLAlchemyError) as error:
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailable(
            f"The tables of PostgreSQL at {address_of(dsn)} could not be migrated: "
            f"{type(cause).__name__}: {cause}. Check that the server runs and that the user may create tables."
        ) from error
    finally:
        await asyncio.shield(engine.dispose())
