"""One task is one trace, on the real protocol: our own processes send their spans to a collector on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx
import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as ServedRoute
from temporalio.testing import WorkflowEnvironment

from activities.credits import CREDITS
from activities.outside_http import OutsideHttp, Route
from proof.simulators.serving import running_simulators
from proof.simulators.tokens import Tokens
from runtime import trace_context, tracing
from runtime.required_settings import CannotStart
from runtime.settings import Settings
from runtime.trace_context import PROPAGATOR, SpanKind, in_context, traceparent, with_trace
from tests.activities.loopback import Seen, http_bytes, serving
from tests.bridge.native import NativeServer
from tests.conftest import NewDatabase, unique
from tests.our_processes import CALLBACK_SECRET, CALLER_SECRET, SERVICE_SECRET, Stack, new_stack
from tests.served_app import served_app
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)
READY_SECONDS: Final = 120.0
END_SECONDS: Final = 120.0
"""Limits for a machine that runs other tests beside: alone each takes a few seconds."""
STREAM: Final = "/api/v1/tasks/stream/sse?subscribe=*"
PROMPT: Final = "the-prompt-that-no-span-may-show"
TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
CALLERS_SPAN: Final = "b7ad6b7169203331"
CALLERS: Final = Tokens(CALLER_SECRET, "comfyui-temporal", "comfyui-platform")


@dataclass
class SpanSeen:
    """A span as the collector got it; ids in hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    attributes: dict[str, Any]


@dataclass
class Collector:
    """Takes OTLP over HTTP as a collector does."""

    bodies: list[bytes] = field(default_factory=list)
    spans: list[SpanSeen] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        body = await request.body()
        self.bodies.append(body)
        message = ExportTraceServiceRequest.FromString(body)
        self.spans.extend(_spans(message))
        return Response(b"", media_type="application/x-protobuf")

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with served_app(Starlette(routes=[ServedRoute("/v1/traces", self.take, methods=["POST"])])) as port:
            yield f"http://127.0.0.1:{port}"

    def of_trace(self, trace_id: str = TRACE) -> list[SpanSeen]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def named(self, name: str, service: str | None = None) -> list[SpanSeen]:
        return [span for span in self.of_trace() if span.name == name and service in (None, span.service)]

    def way_to(self, span: SpanSeen) -> list[str]:
        """The names from the trace's first span to this one."""
        by_id = {span.span_id: span for span in self.of_trace()}
        way = [span.name]
        while (above := by_id.get(span.parent_id)) is not None:
            way.append(above.name)
            span = above
        return way[::-1]


def _spans(message: ExportTraceServiceRequest) -> Iterator[SpanSeen]:
    for resource in message.resource_spans:
        named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            values = {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}
            ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
            yield SpanSeen(named["service.name"], span.name, *ids, span.kind, values)


@dataclass
class Traced:
    """One image, run to its end by four processes of ours that send their spans."""

    collector: Collector
    stack: Stack
    task_id: str
    token: str
    rows: list[str | None]
    """The `traceparent` of each of its events' rows."""
    frames: str
    """What the stream sent."""


@pytest_asyncio.fixture(scope="module")
async def traced(
    temporal_env: WorkflowEnvironment, new_database: NewDatabase, tmp_path_factory: Any
) -> AsyncIterator[Traced]:
    folder: Path = tmp_path_factory.mktemp("traced")
    collector, dsn, task_id = Collector(), await new_database(), unique("traced")
    async with AsyncExitStack() as opened:
        address = await opened.enter_async_context(collector.listening())
        credits_ = await opened.enter_async_context(
            running_simulators(folder / "simulators", token_secret=SERVICE_SECRET, callback_secrets=[CALLBACK_SECRET])
        )
        native = await opened.enter_async_context(NativeServer(folder / "native"))
        stack = new_stack(
            folder / "stack",
            temporal=temporal_env.client.service_client.config.target_host,
            dsn=dsn,
            queue=unique("queue"),
            CREDITS_URL=credits_.credits_url,
            MAX_CACHED_WORKFLOWS="0",
            TRACES="true",
            OTEL_EXPORTER_OTLP_ENDPOINT=address,
            OTEL_BSP_SCHEDULE_DELAY="200",
        )
        http = await opened.enter_async_context(httpx.AsyncClient(base_url=stack.url("gateway"), trust_env=False))
        token = CALLERS.made_for("tenant-demo", "user-demo")
        http.headers["authorization"] = f"Bearer {token}"
        async with stack.running(native.url):
            await until(lambda: _is_ready(http, stack), within_seconds=READY_SECONDS)
            frames = await _followed(http, task_id)
        # Each process has sent its last spans before it ended.
        connection = await asyncpg.connect(dsn)
        rows = await connection.fetch("SELECT traceparent FROM task_events WHERE task_id = $1 ORDER BY seq", task_id)
        await connection.close()
        yield Traced(collector, stack, task_id, token, [row["traceparent"] for row in rows], frames)


async def _is_ready(http: httpx.AsyncClient, stack: Stack) -> bool:
    pages = [f"{stack.url('gateway')}/readyz", f"{stack.url('worker-health')}/readyz"]
    pages += [f"{stack.url('bridge')}/readyz", f"{stack.url('gpu-health')}/readyz"]
    try:
        return all([(await http.get(page)).status_code == 200 for page in pages])
    except httpx.TransportError:
        return False


async def _followed(http: httpx.AsyncClient, task_id: str) -> str:
    """Start an image in a trace of the caller's own, with a stream open; what the stream sent up to its end."""
    frames = ""
    async with asyncio.timeout(END_SECONDS), http.stream("GET", STREAM, timeout=END_SECONDS) as stream:
        assert stream.status_code == 200
        image = {"task_id": task_id, "template_id": "test-pattern", "prompt": PROMPT}
        sent = {
            "traceparent": f"00-{TRACE}-{CALLERS_SPAN}-01",
            "tracestate": "vendor=of-the-callers-own",
            "baggage": "who=the-caller",
            "host": "written-by-the-caller",
        }
        started = await http.post("/api/v1/tasks/images", json=image, headers=sent, timeout=END_SECONDS)
        assert started.status_code == 202, started.text
        async for line in stream.aiter_lines():
            frames += f"{line}\n"
            if not line and re.search(r"^event: task\.(completed|failed)", frames, re.MULTILINE):
                break
    assert "task.completed" in frames, frames
    return frames


def test_one_trace_goes_from_the_request_to_the_event_that_the_stream_sends(traced: Traced) -> None:
    collector = traced.collector
    request = ["POST /api/v1/tasks/images", "StartWorkflow:ImageGenerationWorkflow"]
    submitted = [*request, "StartActivity:submit_job", "RunActivity:submit_job", "POST /comfyui/v1/jobs"]
    bridge = [*submitted, "POST /comfyui/v1/jobs", "StartWorkflow:ComfyUIJobWorkflow"]
    ways = {
        "RunWorkflow:ImageGenerationWorkflow": [*request, "RunWorkflow:ImageGenerationWorkflow"],
        "POST /api/v1/credits/pre-deduct": [
            *(*request, "StartActivity:pre_deduct", "RunActivity:pre_deduct", "POST /api/v1/credits/pre-deduct")
        ],
        "RunWorkflow:ComfyUIJobWorkflow": [*bridge, "RunWorkflow:ComfyUIJobWorkflow"],
        "HandleSignal:comfyui_callback": [*request, "HandleSignal:comfyui_callback"],
    }
    for name, way in ways.items():
        assert way in [collector.way_to(span) for span in collector.named(name)], name
    first = collector.named("POST /api/v1/tasks/images")
    assert [span.parent_id for span in first] == [CALLERS_SPAN], "the caller's own trace goes on"
    callbacks = [collector.way_to(span) for span in collector.named("SignalWorkflow:comfyui_callback")]
    assert callbacks, "the bridge's callbacks bring their trace with them"
    for way in callbacks:
        assert way[: len(bridge)] == bridge
        assert way[-2] == "POST /callbacks/comfyui/{task_id}"
    sent = collector.named("SendEvent", "comfyui-gateway")
    assert [span.attributes["comfyui.seq"] for span in sent] == list(range(1, len(traced.rows) + 1))
    for span in sent:
        way = collector.way_to(span)
        assert way[:2] == request
        # A tick is stored without the workflow.
        assert way[-2] in ("RunActivity:claim", "RunActivity:write", "POST /callbacks/comfyui/{task_id}")
    assert sent[-1].attributes["comfyui.event"] == "task.completed"


def test_replays_make_no_span(traced: Traced) -> None:
    """The worker keeps no run in memory: each workflow task replays the whole history."""
    times = Counter(span.name for span in traced.collector.of_trace() if span.service == "comfyui-worker")
    once = ("RunWorkflow:ImageGenerationWorkflow", "CompleteWorkflow:ImageGenerationWorkflow")
    for name in (*once, "StartActivity:submit_job", "StartActivity:pre_deduct", "StartActivity:commit"):
        assert times[name] == 1, name
    ids = [span.span_id for span in traced.collector.spans]
    assert len(ids) == len(set(ids))


def test_each_event_has_its_trace_in_its_row_and_not_on_the_wire(traced: Traced) -> None:
    assert traced.rows
    assert all(row is not None and row.split("-")[1] == TRACE for row in traced.rows), traced.rows
    assert "traceparent" not in traced.frames
    assert TRACE not in traced.frames


def test_logs_have_the_trace(traced: Traced) -> None:
    lines = [json.loads(line) for line in traced.stack.log_of("gateway").read_text().splitlines()]
    started = [line for line in lines if line["event"] == "audit" and line["task_id"] == traced.task_id]
    assert [line["trace_id"] for line in started] == [TRACE]
    assert "trace_id" not in next(line for line in lines if line["event"] == "gateway_serves")


def test_no_span_holds_a_prompt_a_token_or_what_else_the_caller_sent(traced: Traced) -> None:
    everything = b"".join(traced.collector.bodies)
    assert traced.task_id.encode() in everything
    for hidden in (
        PROMPT,
        traced.token,
        SERVICE_SECRET,
        CALLER_SECRET,
        CALLBACK_SECRET,
        "eyJ",
        "whsec_",
        "the-callers-own",
        "who=",
        "written-by",
    ):
        assert hidden.encode() not in everything, hidden
    assert b"subscribe" not in everything, "addresses' queries may hold a stream token"


def test_health_and_metrics_pages_make_no_span(traced: Traced) -> None:
    assert not [span for span in traced.collector.spans if "/readyz" in span.name or "/metrics" in span.name]


def test_without_the_setting_nothing_is_traced() -> None:
    with tracing.traced_process("worker", is_on=False):
        assert tracing.interceptors() == []
        assert with_trace({"accept": "*/*"}) == {"accept": "*/*"}
        with trace_context.span("of nobody", SpanKind.INTERNAL, {}) as begun:
            assert not begun.is_recording()
            assert traceparent() is None
    assert Settings.model_fields["traces"].default is False


def test_a_process_that_cannot_send_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with (
        pytest.raises(CannotStart, match=r"requirements-otel\.lock"),
        tracing.traced_process("worker", is_on=True),
    ):
        pytest.fail("it began")


async def test_both_services_are_told_the_trace() -> None:
    async def answer(_seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(http_bytes(200, b"{}"))

    async with serving(answer) as server:
        client = OutsideHttp(CREDITS, server.url)
        arrived = PROPAGATOR.extract({"traceparent": f"00-{TRACE}-{CALLERS_SPAN}-01", "tracestate": "vendor=1"})
        async with client:
            with in_context(arrived):
                await client.send(Route("GET", "/api/v1/credits/balance"), token="a-token")
    [request] = server.seen
    assert request.headers["traceparent"].split("-")[1] == TRACE
    assert "tracestate" not in request.headers


def test_of_an_exception_only_its_type_leaves() -> None:
    sent = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(tracing.bare(sent)))
    with suppress(ValueError), provider.get_tracer("a test").start_as_current_span("work", attributes={"x": PROMPT}):
        raise ValueError(PROMPT)
    [left] = sent.get_finished_spans()
    assert [event.attributes for event in left.events] == [{"exception.type": "ValueError"}]
    assert left.status.status_code is StatusCode.ERROR
    assert PROMPT not in left.to_json()
