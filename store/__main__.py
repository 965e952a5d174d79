"""`python -m store`: the tables of the configured database.

Migrate them, bind them to a Temporal namespace, purge what is older than the retention.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from pydantic import ValidationError

from comfyui_temporal.contracts.errors import sentences_of
from runtime.settings import Settings
from store.database import address_of
from store.failures import StoreFailure, StoreUnavailable
from store.home import StoreHome
from store.migrate import migrate, revert
from store.task_store import TaskStore

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The task store's tables.")


def _settings() -> tuple[Settings, str]:
    """The settings and the database's DSN."""
    try:
        settings = Settings()
    except ValidationError as error:
        raise typer.BadParameter(f"A setting is invalid: {'; '.join(sentences_of(error))}.") from None
    if settings.database_dsn is None:
        raise typer.BadParameter(
            "No database is set: set COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://user:password@host:port/database."
        )
    return settings, settings.database_dsn.get_secret_value()


@app.command("migrate")
def migrate_command(revision: Annotated[str, typer.Argument(help="The revision to migrate to.")] = "head") -> None:
    """Migrate the tables forward. Safe to repeat."""
    _run(_settings()[1], revision, forwards=True)


@app.command("revert")
def revert_command(revision: Annotated[str, typer.Argument(help="The revision to go back to, e.g. base.")]) -> None:
    """Migrate the tables back. Their data is lost."""
    _run(_settings()[1], revision, forwards=False)


@app.command("bind")
def bind_command(
    namespace: Annotated[str, typer.Option(help="The Temporal namespace that the tasks run in.")],
) -> None:
    """Bind the store to a Temporal namespace, even if it belonged to another one.

    Use it only if the store's tasks really run there, for example after a move: the reconciler gives back every open
    task that the namespace does not know. Stop workers and gateways of the other namespace first.
    """
    dsn = _settings()[1]
    try:
        before = asyncio.run(_bind(dsn, namespace))
    except (StoreFailure, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    was = f"it belonged to {before}" if before else "it was not bound before"
    typer.echo(f"The task store at {address_of(dsn)} now belongs to Temporal namespace {namespace!r}; {was}.")


async def _bind(dsn: str, namespace: str) -> StoreHome | None:
    """The previous binding. The first process that starts in the namespace adds the namespace's id."""
    store = TaskStore(dsn, pool_size=1)
    try:
        before = await store.home()
        await store.rebind(StoreHome(namespace=namespace))
        return before
    finally:
        await store.close()


@app.command("purge")
def purge_command() -> None:
    """Delete tasks that ended longer ago than RETENTION_DAYS, with events and logs. Safe to repeat.

    The claims of their ids are kept: no id is ever used twice.
    """
    settings, dsn = _settings()
    before = datetime.now(UTC) - timedelta(days=settings.retention_days)
    try:
        count = asyncio.run(_purge(dsn, before))
    except (StoreFailure, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{count} tasks that ended before {before:%Y-%m-%d %H:%M} UTC were deleted.")


async def _purge(dsn: str, before: datetime) -> int:
    """In many short transactions, so that other processes do not wait for it."""
    store, total = TaskStore(dsn, pool_size=1), 0
    try:
        while not (step := await store.purge(before)).is_done:
            total += step.tasks
    finally:
        await store.close()
    return total


def _run(dsn: str, revision: str, *, forwards: bool) -> None:
    try:
        asyncio.run(migrate(dsn, revision=revision) if forwards else revert(dsn, revision=revision))
    except (StoreUnavailable, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"The tables at {address_of(dsn)} are at revision {revision}.")


if __name__ == "__main__":
    app()
