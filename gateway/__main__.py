"""`python -m gateway`: serve the gateway with the configured settings."""

from __future__ import annotations

import resource
import secrets
import signal
import sys
from contextlib import AsyncExitStack
from datetime import timedelta

import structlog
import uvloop
from fastapi import FastAPI

from activities.file_lists import FileLists
from activities.upload_files import UploadFiles
from comfyui_temporal.process_end import end_process
from gateway.access import Access
from gateway.app import create_app
from gateway.draining import Draining, DrainingServer, served_beside
from gateway.metrics import Metrics
from gateway.page import PageSettings
from gateway.temporal_refusals import RETRIES, CountRefusals
from gateway.tokens import StreamTokens
from gateway.uploads import UploadSettings
from runtime import temporal_connection
from runtime.door_limits import Door
from runtime.doors import DoorConfig, door_limits_by
from runtime.logs import configure_logs
from runtime.required_settings import CannotStart, caller_tokens_by, database_of, read_settings
from runtime.settings import Settings
from runtime.tracing import traced_process
from store import TaskStore
from store.namespace_check import bound_store

log = structlog.get_logger("gateway")

GRACE_SECONDS = 10


def access_by(settings: Settings) -> Access:
    """How callers' tokens are verified. Raises CannotStart."""
    shared = settings.caller_secret.get_secret_value() if settings.caller_secret else None
    own = settings.stream_token_secret.get_secret_value() if settings.stream_token_secret else shared
    if own is None:
        log.warning("stream_tokens_of_this_process_only", setting="COMFYUI_TEMPORAL_STREAM_TOKEN_SECRET")
    return Access(
        caller_tokens_by(settings),
        StreamTokens(own or secrets.token_urlsafe(32)),
        allowed_origins=settings.allowed_origins,
        own_tasks_only=settings.own_tasks_only,
    )


def upload_settings_by(settings: Settings) -> UploadSettings:
    """Raises ValueError for an unusable address."""
    return UploadSettings(
        files=None if settings.uploads_url is None else UploadFiles.at(settings.uploads_url),
        max_bytes=settings.upload_max_bytes,
        whole_bytes=settings.upload_whole_bytes,
        inline_bytes=settings.upload_inline_bytes,
        kept=timedelta(hours=settings.upload_hours),
    )


async def serve(settings: Settings) -> None:
    """Serve until a signal arrives. Raises CannotStart."""
    dsn = database_of(settings)
    access, draining = access_by(settings), Draining()
    # Lazy: while Temporal is away callbacks are answered with 503, also at the start.
    metrics = Metrics()
    client = await temporal_connection.connect(
        settings, lazy=True, interceptors=[CountRefusals(metrics.temporal_refused)], retries=RETRIES
    )
    try:
        store = TaskStore(dsn)
        callback_secrets = [secret.get_secret_value() for secret in settings.callback_secrets]
        app = create_app(
            temporal=client,
            store=store,
            lists=FileLists.at(settings.object_store_url),
            callback_secrets=callback_secrets,
            access=access,
            task_queue=settings.task_queue,
            allowed_origins=settings.allowed_origins,
            draining=draining,
            public_url=settings.gateway_public_url,
            page=PageSettings(temporal_ui_url=settings.temporal_ui_url, namespace=client.namespace),
            operations_apart=settings.gateway_operations_port is not None,
            limits_of=settings.limits_of,
            short_way=settings.short_way,
            ended_streams_are_kept=settings.ended_streams == "keep",
            status_words={str(status): word for status, word in settings.status_words.items()},
            upload_settings=upload_settings_by(settings),
            metrics=metrics,
        )
    except ValueError as error:
        raise CannotStart(str(error)) from None

    limits = door_limits_by(settings)

    def door() -> Door:
        return Door(limits, lambda refusal: metrics.connections_refused.labels(refusal.value).inc())

    def served_at(port: int, what: FastAPI, door: Door, *, websockets: bool = False) -> DoorConfig:
        host = settings.gateway_host
        return DoorConfig(
            what, door, host=host, port=port, websockets=websockets, timeout_graceful_shutdown=GRACE_SECONDS
        )

    callers = door()
    metrics.connections_open.set_function(lambda: callers.open)
    server = DrainingServer(served_at(settings.gateway_port, app, callers, websockets=True), draining)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again after draining: without a handler it would kill us before we close.
        signal.signal(number, lambda *_: None)

    def leave() -> None:
        server.should_exit = True

    try:
        async with AsyncExitStack() as beside:
            await beside.enter_async_context(bound_store(client, dsn, refused=leave))
            if settings.gateway_operations_port is not None:
                operations = served_at(settings.gateway_operations_port, app.state.operations, door())
                await beside.enter_async_context(served_beside(operations))
            log.info("gateway_serves", host=settings.gateway_host, port=settings.gateway_port, database=store.address)
            await server.serve()
    finally:
        await store.close()


def allow_many_connections() -> None:
    """Raise the limit of open files to its maximum: each stream is one, and a shell's usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    allow_many_connections()
    try:
        settings = read_settings()
        configure_logs(level=settings.log_level, as_json=settings.log_json, hidden=settings.hidden_values)
        with traced_process("gateway", is_on=settings.traces):
            uvloop.run(serve(settings))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    end_process(main())
