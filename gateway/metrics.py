"""Prometheus metrics of one process. Labels come from our own code, never from a request's text."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from store import QueueState, StoreUnavailable

log = structlog.get_logger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECONDS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUEUES_KEPT_SECONDS: Final = 5.0
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

    def show_queues(self, states: list[QueueState]) -> None:
        for state in states:
            self.queued.labels(state.priority.value).set(state.queued)
            self.queue_wait.labels(state.priority.value).set(state.oldest_seconds)
            self.sla_missed.labels(state.priority.value).set(state.sla_missed)


class MetricsPage:
    """`/metrics`: the counters, and the queues from the store, read at most every 5 s."""

    def __init__(self, metrics: Metrics, queue_states: Callable[[], Awaitable[list[QueueState]]]) -> None:
        self._metrics = metrics
        self._queue_states = queue_states
        self._read_at = -QUEUES_KEPT_SECONDS

    async def text(self) -> bytes:
        now = time.monotonic()
        if now - self._read_at >= QUEUES_KEPT_SECONDS:
            self._read_at = now
            try:
                self._metrics.show_queues(await self._queue_states())
            except StoreUnavailable as error:
                log.warning("queues_not_read", reason=str(error))
        return generate_latest(self._metrics.registry)


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
