"""The gateway's application, made of explicitly given parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from temporalio.client import Client

from gateway.access import Access
from gateway.callback_relay import CallbackRelay
from gateway.callbacks import CallbackReceiver, callback_routes
from gateway.problems import answer_with_problems
from gateway.signatures import CallbackSignatures
from gateway.task_runs import TaskRuns
from gateway.training_log_writer import TrainingLogWriter
from store import TaskStore


def create_app(
    *, temporal: Client, store: TaskStore, callback_secrets: Sequence[str], access: Access | None = None
) -> FastAPI:
    """The application. It closes what it opens; client and store remain their opener's.

    Without `access` nobody can be told from anybody: then callbacks are served and nothing else.

    `app.state.callbacks.outcomes` counts what became of callbacks. Raises ValueError for unusable secrets.
    """
    relay = CallbackRelay(TaskRuns(temporal, store))
    log_writer = TrainingLogWriter(store)
    receiver = CallbackReceiver(CallbackSignatures(callback_secrets), relay, log_writer)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await relay.close()
        await log_writer.close()

    app = FastAPI(title="comfyui-temporal gateway", lifespan=lifespan)
    answer_with_problems(app)
    app.state.callbacks = receiver
    app.include_router(callback_routes(receiver))

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process is alive; says nothing of what it depends on."""
        return {"status": "ok"}

    return app
