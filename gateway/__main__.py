"""`python -m gateway`: serve the gateway by the settings."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog
import uvicorn
from pydantic import ValidationError

import temporal_plugin
from contracts.errors import sentences_of
from gateway.app import create_app
from logs import configure_logs
from settings import Settings
from store import TaskStore

log = structlog.get_logger("gateway")

GRACE_SECONDS = 10
MAX_CONNECTIONS = 2_000


class CannotStart(Exception):
    """A setting is missing or wrong; the text says which and what to do."""


def read_settings() -> Settings:
    """Raises CannotStart."""
    try:
        return Settings()
    except ValidationError as error:
        raise CannotStart(f"A setting is wrong: {'; '.join(sentences_of(error))}.") from None


async def serve(settings: Settings) -> None:
    """Serve until told to stop. Raises CannotStart."""
    if settings.database_dsn is None:
        raise CannotStart(
            "No database is set: give COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://user:password@host:port/database."
        )
    # Lazy: callbacks are answered with 503 while Temporal is away, at the start as at any other time.
    client = await temporal_plugin.connect(settings, lazy=True)
    try:
        store = TaskStore(settings.database_dsn.get_secret_value())
        secrets = [secret.get_secret_value() for secret in settings.callback_secrets]
        app = create_app(temporal=client, store=store, callback_secrets=secrets)
    except ValueError as error:
        raise CannotStart(str(error)) from None
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.gateway_host,
            port=settings.gateway_port,
            access_log=False,
            log_config=None,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    log.info("gateway_serves", host=settings.gateway_host, port=settings.gateway_port, database=store.address)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again once it has drained: without a handler that would kill us before we close.
        signal.signal(number, lambda *_: None)
    try:
        await server.serve()
    finally:
        await store.close()


def main() -> int:
    try:
        settings = read_settings()
        configure_logs(level=settings.log_level, as_json=settings.log_json)
        asyncio.run(serve(settings))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
