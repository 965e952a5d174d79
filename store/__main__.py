"""`python -m store migrate`: bring the tables of the configured database up to date."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from pydantic import ValidationError

from contracts.errors import sentences_of
from settings import Settings
from store.database import address_of
from store.failures import StoreUnavailable
from store.migrate import migrate, revert

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The task store's tables.")


def _dsn() -> str:
    try:
        settings = Settings()
    except ValidationError as error:
        raise typer.BadParameter(f"A setting is wrong: {'; '.join(sentences_of(error))}.") from None
    if settings.database_dsn is None:
        raise typer.BadParameter(
            "No database is set: give COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://user:password@host:port/database."
        )
    return settings.database_dsn.get_secret_value()


@app.command("migrate")
def migrate_command(revision: Annotated[str, typer.Argument(help="The revision to reach.")] = "head") -> None:
    """Bring the tables forward; safe to repeat."""
    _run(_dsn(), revision, forwards=True)


@app.command("revert")
def revert_command(revision: Annotated[str, typer.Argument(help="The revision to go back to, e.g. base.")]) -> None:
    """Take the tables back. What they hold is lost."""
    _run(_dsn(), revision, forwards=False)


def _run(dsn: str, revision: str, *, forwards: bool) -> None:
    try:
        asyncio.run(migrate(dsn, revision=revision) if forwards else revert(dsn, revision=revision))
    except (StoreUnavailable, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"The tables at {address_of(dsn)} stand at {revision}.")


if __name__ == "__main__":
    app()
