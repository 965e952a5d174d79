"""The gateway's application, made of explicitly given parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from temporalio.client import Client

from activities.file_lists import FileLists
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from gateway.access import Access
from gateway.audit import AuditLog
from gateway.body_memory import BodyMemory
from gateway.callback_relay import CallbackRelay
from gateway.callbacks import CallbackReceiver, callback_routes
from gateway.dataset_routes import Datasets, dataset_routes
from gateway.draining import Draining
from gateway.metrics import CountRequests, Metrics, MetricsPage
from gateway.openapi import DocumentedApp
from gateway.operations_routes import health_routes, metrics_routes
from gateway.page import PageSettings, page_routes
from gateway.problems import answer_with_problems
from gateway.request_limits import RequestLimits
from gateway.request_log import RequestLog
from gateway.rollback import Rollback
from gateway.runs_without_row import view_of_run
from gateway.safe_answers import SafeAnswers
from gateway.signatures import CallbackSignatures
from gateway.start_waits import APPLIED, REPLAYED, StartWaits
from gateway.streams import WaitingTasks, stream_routes, task_event_stream
from gateway.streams_hub import EventHub
from gateway.task_routes import task_routes
from gateway.task_runs import TaskRuns
from gateway.task_uploads import TaskUploads
from gateway.tasks import Tasks
from gateway.template_routes import Templates, template_routes
from gateway.tenant_limits import LEFT_HEADER, POLICY_HEADER, TenantDoor
from gateway.tenant_routes import tenant_routes
from gateway.tick_writer import TickWriter
from gateway.training_log_writer import TrainingLogWriter
from gateway.upload_routes import ANSWERED_HEADERS, SENT_HEADERS, upload_routes
from gateway.uploads import Uploads, UploadSettings
from runtime.trace_context import REQUEST_SPANS
from store import TaskStore

DESCRIPTION: Final = (
    "Image generation and model training: start, read, follow and cancel tasks; receive ComfyUI's callbacks. "
    "Every error is `application/problem+json` with a stable `code`."
)


ALLOWED_HEADERS: Final = (
    *("Authorization", "Cache-Control", "Content-Type", "Last-Event-ID"),
    *("Prefer", "X-Idempotency-Key", "X-Request-Id"),
    *SENT_HEADERS,
)
"""What pages of allowed origins may send, beside what browsers always allow."""


def create_app(
    *,
    temporal: Client,
    store: TaskStore,
    lists: FileLists,
    callback_secrets: Sequence[str],
    access: Access | None = None,
    task_queue: str = TASK_QUEUE,
    allowed_origins: Sequence[str] = (),
    draining: Draining | None = None,
    public_url: str | None = None,
    page: PageSettings | None = None,
    operations_apart: bool = False,
    limits_of: Callable[[str], TenantLimits] = lambda _tenant_id: NO_LIMITS,
    short_way: bool = True,
    ended_streams_are_kept: bool = False,
    status_words: Mapping[str, str] = MappingProxyType({}),
    upload_settings: UploadSettings | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The application. It closes what it opens; the caller closes client and store.

    Without `access` callers cannot be authenticated: then callbacks are served and the tasks API is not.
    `lists` is where long lists of files are stored for the workers.
    `short_way`: ticks are stored here and are no signals (decision 4).
    `limits_of` gives a tenant's limits. `ended_streams_are_kept`: a stream whose tasks have all ended stays open.
    `status_words`: other words for ends in events. `upload_settings`: default: nothing can be uploaded.
    `metrics`: those that the client counts in; default: new ones.
    `public_url` is the address under which clients reach it; default: the address of their request.
    `operations_apart`: `/metrics` and `/openapi.json` are served by `app.state.operations` alone, an application for a
    port of its own. `app.state.callbacks.outcomes` counts callbacks by outcome. Raises ValueError for unusable secrets.
    """
    metrics = metrics or Metrics()
    draining = draining or Draining()
    relay = CallbackRelay(TaskRuns(temporal, store, metrics))
    log_writer = TrainingLogWriter(store)
    ticks = TickWriter(store, relay) if short_way else None
    receiver = CallbackReceiver(CallbackSignatures(callback_secrets), relay, log_writer, metrics, ticks)

    hub = EventHub(store, draining, keeps_ended=ended_streams_are_kept, status_words=status_words)
    door, memory = TenantDoor(store, limits_of), BodyMemory()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with hub.running(), door.reporting():
            yield
        if ticks is not None:
            await ticks.close()
        await relay.close()
        await log_writer.close()

    app = DocumentedApp(
        title="comfyui-temporal gateway",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None if operations_apart else "/openapi.json",
        # Those pages load scripts from elsewhere, on the origin where the live page keeps its token.
        docs_url=None,
        redoc_url=None,
        telemetry=REQUEST_SPANS,
    )
    answer_with_problems(app)
    app.state.metrics = metrics
    app.state.callbacks = receiver
    app.state.streams = hub
    for kind in ("sse", "ws"):
        metrics.streams_open.labels(kind).set_function(partial(hub.open_of, kind))
    app.include_router(callback_routes(receiver))
    health = health_routes(temporal, store, draining)
    metrics_page = metrics_routes(MetricsPage(metrics, store))
    app.include_router(health)
    if operations_apart:
        app.state.operations = _operations(app, health, metrics_page)
    else:
        app.include_router(metrics_page)
    if access is not None:
        waits = StartWaits(temporal, store, draining, task_queue=task_queue)
        uploads = Uploads(store, upload_settings or UploadSettings(), limits_of, memory)
        files = TaskUploads(uploads, templates := Templates(temporal, task_queue=task_queue))
        tasks = Tasks(temporal, store, lists, files, task_queue=task_queue, door=door, waits=waits)
        rollback = Rollback(temporal, tasks, task_queue=task_queue)
        waiting = WaitingTasks(partial(view_of_run, temporal))
        streams = task_event_stream(hub, door, waiting)
        app.include_router(stream_routes(hub, door, access, public_url=public_url, waiting=waiting))
        app.include_router(
            task_routes(tasks, access, roll_back=rollback.roll_back, event_stream=streams, status_words=status_words)
        )
        for router in (
            upload_routes(uploads, access),
            tenant_routes(store, access),
            template_routes(templates, access),
            dataset_routes(Datasets(temporal, task_queue=task_queue), access),
            page_routes(page or PageSettings()),
        ):
            app.include_router(router)
    app.add_middleware(AuditLog, store)
    app.add_middleware(
        RequestLimits, access, memory, inline_bytes=upload_settings.inline_bytes if upload_settings else 0
    )
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_credentials=True,
            allow_methods=["GET", "POST", "HEAD", "PATCH", "DELETE"],
            allow_headers=list(ALLOWED_HEADERS),
            expose_headers=[
                *("Location", "Retry-After", APPLIED, REPLAYED, POLICY_HEADER, LEFT_HEADER),
                *ANSWERED_HEADERS,
            ],
        )
    app.add_middleware(CountRequests, metrics)
    app.add_middleware(RequestLog)
    app.add_middleware(SafeAnswers)
    return app


def _operations(gateway: FastAPI, *routers: APIRouter) -> FastAPI:
    """What operators and not callers need: health, metrics, the OpenAPI document of `gateway`."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, telemetry=REQUEST_SPANS)
    answer_with_problems(app)
    for router in routers:
        app.include_router(router)

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> dict[str, Any]:
        return gateway.openapi()

    app.add_middleware(SafeAnswers)
    return app
