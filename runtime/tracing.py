"""Tracing by OpenTelemetry, off unless the setting `TRACES` is on: spans are sent by OTLP over HTTP.

    request at the gateway ─▶ StartWorkflow ─▶ RunWorkflow ─▶ StartActivity ─▶ RunActivity ─▶ request to a service
                                                   │                                              │ traceparent
                                                   ├── HandleSignal ◀── SignalWorkflow ◀── callback at the gateway
                                                   └── RunActivity:write ─▶ event's row ─▶ event sent to streams

The spans of workflows and activities are those of Temporal's own interceptor, which makes none while a history is
replayed. FastAPI makes those of requests. Where to send them is said by OpenTelemetry's own environment
(`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, …).

Nothing that a caller or a service wrote leaves in a span, but for ids: only the attributes in `SENT`, and of an
exception its type.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import propagate, trace
from temporalio.client import Interceptor

from runtime.required_settings import CannotStart
from runtime.trace_context import PROPAGATOR

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

END_SECONDS: Final = 2.0
"""How long an ending process waits for a collector to take its last spans."""
SENT: Final = frozenset(
    {
        *("temporalWorkflowID", "temporalRunID", "temporalActivityID", "temporalActivityType", "temporalUpdateID"),
        *("http.request.method", "http.response.status_code", "http.route", "url.scheme", "url.template"),
        *("server.address", "server.port", "network.protocol.name", "network.protocol.version"),
        *("error.type", "exception.type"),
        *("comfyui.task_id", "comfyui.event", "comfyui.seq", "comfyui.streams"),
    }
)
_begun = False


def interceptors() -> list[Interceptor]:
    """Temporal's own for this process's client and its workers; none while tracing has not begun."""
    if not _begun:
        return []
    from temporalio.contrib.opentelemetry import TracingInterceptor

    return [TracingInterceptor()]


@contextmanager
def traced_process(name: str, *, is_on: bool) -> Iterator[None]:
    """Inside, this process makes spans and sends them if `is_on`. Once in each process. Raises CannotStart.

    `name`: of the service, unless `OTEL_SERVICE_NAME` has one.
    """
    if not is_on:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise CannotStart(
            "COMFYUI_TEMPORAL_TRACES is on, and OpenTelemetry's exporter is not installed: install "
            "requirements-otel.lock (of the image: --build-arg LOCK=requirements-otel.lock), or turn it off."
        ) from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: f"comfyui-{name}"}
    try:
        processor = BatchSpanProcessor(bare(OTLPSpanExporter()))
        provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    except ValueError as error:
        raise CannotStart(f"OpenTelemetry's settings (OTEL_…) are not valid: {error}.") from None
    provider.add_span_processor(processor)
    _begin(provider)
    try:
        yield
    finally:
        # In a thread: the flush knows no limit of its own, and a collector that is away would hold the process.
        flushing = threading.Thread(target=provider.force_flush, daemon=True)
        flushing.start()
        flushing.join(END_SECONDS)


def _begin(provider: trace.TracerProvider) -> None:
    global _begun  # noqa: PLW0603 - as OpenTelemetry's own provider: one for the process
    propagate.set_global_textmap(PROPAGATOR)
    trace.set_tracer_provider(provider)
    _begun = True


def bare(exporter: SpanExporter) -> SpanExporter:
    """The exporter, which is given spans without anything that others wrote."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Bare(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return exporter.export([stripped(span) for span in spans])

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Bare()


def stripped(span: ReadableSpan) -> ReadableSpan:
    """The span with the attributes in `SENT`, and its status without the exception's text.

    Of a request that arrives, `server.address` is what its sender wrote into `Host`.
    """
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import SpanKind, Status

    def kept(event: Event) -> Event:
        return Event(event.name, _sent(event.attributes), event.timestamp)

    attributes = _sent(span.attributes)
    if span.kind is SpanKind.SERVER:
        attributes = {name: value for name, value in attributes.items() if not name.startswith("server.")}
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        events=[kept(event) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _sent(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if name in SENT}
