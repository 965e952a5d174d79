"""The trace that work belongs to (W3C Trace Context), and spans of our own. Does nothing while no tracing has begun.

Only OpenTelemetry's API is used here, which every process has: `runtime/tracing.py` begins the tracing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.propagators.textmap import CarrierT, Getter, default_getter
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

__all__ = [
    "PROPAGATOR",
    "REQUEST_SPANS",
    "Context",
    "SpanKind",
    "current_context",
    "current_ids",
    "in_context",
    "span",
    "traceparent",
    "with_trace",
]

Value = str | int


class TraceParentOnly(TraceContextTextMapPropagator):
    """Takes over a sender's trace and neither its `tracestate` nor its baggage: both may be kilobytes of anything, and
    each activity's header in Temporal's history would repeat them."""

    def extract(
        self, carrier: CarrierT, context: Context | None = None, getter: Getter[CarrierT] = default_getter
    ) -> Context:
        found = super().extract(carrier, context, getter)
        sent = trace.get_current_span(found).get_span_context()
        if not sent.trace_state:
            return found
        bare = SpanContext(sent.trace_id, sent.span_id, is_remote=True, trace_flags=sent.trace_flags)
        return trace.set_span_in_context(NonRecordingSpan(bare), found)


PROPAGATOR: Final = TraceParentOnly()
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json"})


def _is_quiet(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in _QUIET


REQUEST_SPANS: Final[TelemetryConfig] = {
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
    "exclude": _is_quiet,
}
"""What FastAPI makes of requests once tracing has begun: one span each, none for health and metrics pages.

Never by itself (`auto_configure`): its spans hold addresses with their tokens.
"""


def current_context() -> Context:
    """For work that another asyncio task does later on (`in_context`)."""
    return get_current()


@contextmanager
def in_context(context: Context) -> Iterator[None]:
    token = attach(context)
    try:
        yield
    finally:
        detach(token)


def current_ids() -> tuple[str, str] | None:
    """Trace id and span id of the work at hand, in hexadecimal."""
    context = trace.get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


def traceparent() -> str | None:
    """The W3C header's value for the work at hand."""
    carrier: dict[str, str] = {}
    PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def with_trace(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request that we send, with `traceparent` where there is a trace."""
    found = traceparent()
    return {**headers, "traceparent": found} if found else {**headers}


@contextmanager
def span(name: str, kind: SpanKind, attributes: Mapping[str, Value], *, parent: str | None = None) -> Iterator[Span]:
    """The work inside as a span: part of the trace at hand, or of that of `parent`, a `traceparent`.

    Names and attributes hold ids, names and numbers; never a prompt, a message, an address with a query, a token.
    """
    context = PROPAGATOR.extract({"traceparent": parent}) if parent else None
    tracer = trace.get_tracer("comfyui-temporal")
    with tracer.start_as_current_span(
        name, context, kind, attributes, record_exception=False, set_status_on_exception=False
    ) as begun:
        try:
            yield begun
        except BaseException as error:
            begun.set_attribute("error.type", str(getattr(error, "code", type(error).__name__)))
            begun.set_status(Status(StatusCode.ERROR))
            raise
