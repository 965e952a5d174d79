"""Prometheus metrics of one process. Labels come from our own code, never from a request's text."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfyui_temporal.contracts.permissions import Scene
from gateway.temporal_refusals import OPERATIONS
from store import StoreFailure, TaskStore
from store.figures import StoreFigures
from store.upkeep import QueueState

log = structlog.get_logger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECONDS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUEUES_KEPT_SECONDS: Final = 5.0
FIGURES_KEPT_SECONDS: Final = 15.0
TRIED_AGAIN_SECONDS: Final = 5.0
"""After a reading that failed."""
NO_ROUTE: Final = "none"


class Metrics:
    """What is counted; one in each process, with its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "gateway_request_seconds",
            "From a request's arrival to the head of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.streams_open = Gauge("gateway_streams_open", "Streams open now.", ("kind",), registry=self.registry)
        self.connections_open = Gauge("gateway_connections_open", "Connections open now.", registry=self.registry)
        self.connections_refused = Counter(
            "gateway_connections_refused", "Connections that the door closed.", ("reason",), registry=self.registry
        )
        self.callbacks = Counter(
            "gateway_callbacks", "Callbacks by what became of them.", ("outcome",), registry=self.registry
        )
        self.callbacks_signed = Counter(
            "gateway_callbacks_signed", "Callbacks by the name of their secret.", ("secret",), registry=self.registry
        )
        self.signal_seconds = Histogram(
            "gateway_signal_seconds",
            "How long Temporal took to accept a callback's signal.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.temporal_refused = Counter(
            "gateway_temporal_refused",
            "Requests that Temporal refused because its limits are reached.",
            ("operation",),
            registry=self.registry,
        )
        for operation in OPERATIONS:
            # Shown from the start: Prometheus sees no increase in a counter that begins with 1.
            self.temporal_refused.labels(operation)
        self.queued = Gauge("tasks_queued", "Tasks queued now.", ("priority",), registry=self.registry)
        self.queue_wait = Gauge(
            "tasks_queue_wait_seconds",
            "How long the oldest queued task has waited.",
            ("priority",),
            registry=self.registry,
        )
        self.sla_missed = Gauge(
            "tasks_queue_sla_missed",
            "Tasks that were queued for longer than promised, in the last 24 hours.",
            ("priority",),
            registry=self.registry,
        )

        self._add_figures()

    def _add_figures(self) -> None:
        """Figures of the task store. Every gateway shows the same ones, so queries take the maximum, not the sum."""
        registry = self.registry
        self.store_up = Gauge(
            "task_store_up", "Whether queues and figures could both be read the last time.", registry=registry
        )
        self.figures_age = Gauge(
            "tasks_figures_age_seconds", "Age of the figures of all tasks, NaN before the first.", registry=registry
        )
        self.open = Gauge("tasks_open", "Tasks that have not ended.", ("scene", "status"), registry=registry)
        self.points_held = Gauge("tasks_points_held", "Points that open tasks hold.", ("scene",), registry=registry)
        self.oldest_hold = Gauge(
            "tasks_oldest_hold_seconds", "Age of the oldest open task's hold, 0 without one.", registry=registry
        )
        self.unsettled = Gauge(
            "tasks_unsettled",
            "Ended tasks whose settlement is unknown, by who reads their ledger: the reconciler, then a person.",
            ("read",),
            registry=registry,
        )
        self.points_unknown = Gauge(
            "tasks_points_unknown", "Points that those tasks held.", ("read",), registry=registry
        )
        self.exceptions = Gauge(
            "task_exceptions", "Exception records of the last 24 hours, 1,000 at most.", ("code",), registry=registry
        )
        self.not_looked_at = Gauge(
            "tasks_not_looked_at", "Open tasks whose run the reconciler could not read.", registry=registry
        )

    def show_figures(self, figures: StoreFigures) -> None:
        # Only what is open is reported: a scene without open tasks has 0 again.
        self.open.clear()
        held = dict.fromkeys(Scene, 0)
        for tasks in figures.open:
            self.open.labels(tasks.scene.value, tasks.status.value).set(tasks.tasks)
            held[tasks.scene] += tasks.points_held
        for scene, points in held.items():
            self.points_held.labels(scene.value).set(points)
        self.oldest_hold.set(figures.oldest_hold_seconds)
        for unsettled in figures.unsettled:
            self.unsettled.labels(unsettled.read).set(unsettled.tasks)
            self.points_unknown.labels(unsettled.read).set(unsettled.points)
        for code, records in figures.exceptions.items():
            self.exceptions.labels(code.value).set(records)
        self.not_looked_at.set(figures.not_looked_at)

    def show_queues(self, states: list[QueueState]) -> None:
        for state in states:
            self.queued.labels(state.priority.value).set(state.queued)
            self.queue_wait.labels(state.priority.value).set(state.oldest_seconds)
            self.sla_missed.labels(state.priority.value).set(state.sla_missed)


class _Reading:
    """One reading of the store: made again once its figures are old, after a failure sooner."""

    def __init__(self, read: Callable[[], Awaitable[None]], kept_seconds: float) -> None:
        self._read = read
        self._kept_seconds = kept_seconds
        self._due_at = -math.inf
        self.succeeded = False
        """The newest attempt."""

    async def make_if_due(self, now: float) -> None:
        """Raises StoreFailure."""
        if now < self._due_at:
            return
        # Set before the reading: a page that is read twice at once makes one.
        self._due_at = now + self._kept_seconds
        try:
            await self._read()
        except BaseException:
            self.succeeded = False
            self._due_at = now + TRIED_AGAIN_SECONDS
            raise
        self.succeeded = True


class MetricsPage:
    """`/metrics`: the counters, and what the store says: queues read at most every 5 s, its other figures every 15 s.

    While one of the two cannot be read its figures stay as they were, `task_store_up` is 0, and
    `tasks_figures_age_seconds` grows.
    """

    def __init__(self, metrics: Metrics, store: TaskStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._store = store
        self._clock = clock
        self._figures_at: float | None = None
        self._readings = (
            _Reading(self._read_queues, QUEUES_KEPT_SECONDS),
            _Reading(self._read_figures, FIGURES_KEPT_SECONDS),
        )

    async def text(self) -> bytes:
        now = self._clock()
        try:
            for reading in self._readings:
                await reading.make_if_due(now)
        except StoreFailure as error:
            log.warning("figures_not_read", reason=str(error))
        self._metrics.store_up.set(all(reading.succeeded for reading in self._readings))
        self._metrics.figures_age.set(math.nan if self._figures_at is None else self._clock() - self._figures_at)
        return generate_latest(self._metrics.registry)

    async def _read_queues(self) -> None:
        self._metrics.show_queues(await self._store.queue_states())

    async def _read_figures(self) -> None:
        began = self._clock()
        self._metrics.show_figures(await self._store.figures())
        self._figures_at = began


class CountRequests:
    """ASGI middleware: counts answers by route, method and status, and measures the time until their headers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.request_seconds.labels(_route(scope)).observe(time.perf_counter() - began)
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(_route(scope), _method(scope), str(status)).inc()


def _route(scope: Scope) -> str:
    """The route's pattern, never the path itself: a path may hold any text."""
    return getattr(scope.get("route"), "path", NO_ROUTE)


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in ("GET", "HEAD", "POST", "OPTIONS") else "other"
