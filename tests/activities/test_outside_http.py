"""The HTTP client: every error of httpx has a name, limits are kept, and no secret is shown."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from random import Random

import httpx
import jwt
import pytest
import pytest_asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from temporalio.api.common.v1 import Payload

from activities.comfyui import COMFYUI, GET_JOB, LIST_GPUS, ComfyUIClient
from activities.credits import CreditsClient
from activities.outside_http import (
    CONNECTION_FAILURES,
    OutsideFailure,
    OutsideHttp,
    RawReply,
    current_time_limit_seconds,
    only_if_answering,
    time_limit,
)
from activities.tokens import ServiceToken, SignedTokens
from comfyui_temporal.contracts.calls import LedgerQuery, Post
from comfyui_temporal.contracts.comfyui import JobRequest
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.permissions import Scene, Scope
from comfyui_temporal.plugin import DATA_CONVERTER
from tests.activities.calls import (
    PROMPT,
    SECRET,
    call_for,
    commit_post,
    estimate_post,
    job_call,
    job_post,
    pre_deduct_post,
    tokens,
)
from tests.activities.conftest import Facing
from tests.activities.loopback import Seen, always, error_body, http_bytes, serving

HTTPX_EXCEPTIONS = [
    kind
    for _, kind in inspect.getmembers(httpx, inspect.isclass)
    if issubclass(kind, Exception) and not issubclass(kind, Warning)
]


COMFYUI_URL = "http://comfyui.test:8188"
FailingWith = Callable[[Exception], Awaitable[RawReply]]


@pytest_asyncio.fixture(scope="module")
async def failing_with() -> AsyncIterator[FailingWith]:
    """`await failing_with(error)`: a request whose transport raises that error."""
    async with OutsideHttp(COMFYUI, COMFYUI_URL) as http:

        async def send(error: Exception) -> RawReply:
            def fail(request: httpx.Request) -> httpx.Response:
                raise error

            http._client._transport = httpx.MockTransport(fail)
            return await http.send(LIST_GPUS, token="t")

        yield send


@pytest.mark.parametrize("kind", HTTPX_EXCEPTIONS, ids=lambda kind: kind.__name__)
async def test_every_exception_of_httpx_is_one_named_failure(failing_with: FailingWith, kind: type[Exception]) -> None:
    assert kind in CONNECTION_FAILURES, "a new exception of httpx: give it a reason"

    with pytest.raises(OutsideFailure) as raised:
        await failing_with(kind.__new__(kind))
    assert raised.value.code in (FailureCode.COMFYUI_UNAVAILABLE, FailureCode.REPLY_INVALID)
    assert raised.value.may_be_retried
    assert raised.value.sentence.startswith(
        {
            FailureCode.COMFYUI_UNAVAILABLE: f"ComfyUI at {COMFYUI_URL} did not answer GET /comfyui/v1/gpus: ",
            FailureCode.REPLY_INVALID: f"ComfyUI at {COMFYUI_URL} answered GET /comfyui/v1/gpus in a way that the "
            "contract does not know: ",
        }[raised.value.code]
        + f"{CONNECTION_FAILURES[kind]}. It is retried; check that "
    )
    assert str(raised.value) == raised.value.sentence


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("", "no connection. "),
        ("connection", "no connection. "),
        ("All connection attempts failed", "no connection (All connection attempts failed). "),
        ("nul \0 and surrogate \ud800", "no connection (nul \ufffd and surrogate \ufffd). "),
    ],
)
async def test_what_httpx_says_is_part_of_the_reason_where_it_adds_something(
    failing_with: FailingWith, message: str, reason: str
) -> None:
    with pytest.raises(OutsideFailure) as raised:
        await failing_with(httpx.ConnectError(message))
    assert f"GET /comfyui/v1/gpus: {reason}It is retried" in raised.value.sentence


async def test_a_very_long_error_is_shortened(failing_with: FailingWith) -> None:
    with pytest.raises(OutsideFailure) as raised:
        await failing_with(httpx.ConnectError("x" * 10_000))
    assert len(raised.value.sentence) < 800


async def test_an_unexpected_error_has_a_name_too(failing_with: FailingWith) -> None:
    with pytest.raises(OutsideFailure) as raised:
        await failing_with(ZeroDivisionError())
    assert raised.value.code is FailureCode.COMFYUI_UNAVAILABLE


async def test_a_refused_connection_is_reported_with_address_and_advice() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with CreditsClient(url, tokens()) as client:
            with pytest.raises(OutsideFailure) as raised:
                await client.estimate(estimate_post())
    assert raised.value.code is FailureCode.CREDITS_UNAVAILABLE
    for part in (url, "POST /api/v1/credits/estimate", "no connection", "COMFYUI_TEMPORAL_CREDITS_URL"):
        assert part in raised.value.sentence


async def test_a_connection_closed_before_the_answer_is_retried(facing: Facing) -> None:
    async def hang_up(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with facing(hang_up) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["submit_job"]()
    assert raised.value.code is FailureCode.COMFYUI_UNAVAILABLE


async def test_a_body_cut_short_is_retried(facing: Facing) -> None:
    async def half(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()

    async with facing(half) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["submit_job"]()
    assert raised.value.code is FailureCode.COMFYUI_UNAVAILABLE


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"],
)
async def test_a_non_http_answer_is_an_invalid_reply(facing: Facing, answer: bytes) -> None:
    async def reply(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with facing(reply) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["estimate"]()
    assert raised.value.code is FailureCode.REPLY_INVALID


@pytest.mark.parametrize("where", ["head", "body"])
async def test_a_slow_trickle_of_bytes_does_not_hold_a_request_open(where: str) -> None:
    """No single read takes long, so only the limit of the whole request ends it; and no connection is lost."""

    async def drip(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"content-length: 9999\r\n\r\n" if where == "body" else b""))
        while not writer.is_closing():
            writer.write(b"x" if where == "body" else b"a: b\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with serving(drip) as server, ComfyUIClient(server.url, tokens(), pool_size=2) as client:
        for _ in range(3):
            began = time.monotonic()
            with time_limit(0.15):
                outcomes = await asyncio.gather(
                    client.submit_job(job_post()), client.get_job(job_call()), return_exceptions=True
                )
            assert time.monotonic() - began < 1
            assert [getattr(outcome, "code", outcome) for outcome in outcomes] == [FailureCode.COMFYUI_UNAVAILABLE] * 2
            for route, outcome in zip(
                ("POST /comfyui/v1/jobs", "GET /comfyui/v1/jobs/{job_id}"), outcomes, strict=True
            ):
                assert f"did not answer {route}: no whole answer within 0.15 s. It is retried" in str(outcome)
        server.answer = always(202, {"job_id": "job-1", "estimated_cost": 24})
        assert (await client.submit_job(job_post())).reply is not None


async def test_requests_cut_at_any_instant_leave_the_pool_whole() -> None:
    """A plain client of httpx 0.28 loses all 5 connections here within a second."""
    random = Random(7)

    async def dawdle(request: Seen, writer: asyncio.StreamWriter) -> None:
        raw = http_bytes(202, b'{"job_id": "job-1", "estimated_cost": 24}' + b" " * random.choice([0, 100, 200_000]))
        cut = random.randrange(len(raw))
        await asyncio.sleep(random.uniform(0, 0.02))
        writer.write(raw[:cut])
        await asyncio.sleep(random.uniform(0, 0.004))
        writer.write(raw[cut:])

    async def submit_repeatedly() -> None:
        for _ in range(40):
            with time_limit(random.uniform(0.002, 0.03)), suppress(OutsideFailure):
                await client.submit_job(job_post())

    async with serving(dawdle) as server, ComfyUIClient(server.url, tokens(), pool_size=5) as client:
        await asyncio.gather(*(submit_repeatedly() for _ in range(8)))
        server.answer = always(202, {"job_id": "job-1", "estimated_cost": 24})
        with time_limit(5):
            answers = await asyncio.gather(*(client.submit_job(job_post()) for _ in range(10)))
    assert all(answer.reply for answer in answers)


async def test_a_silent_server_is_left_after_the_read_limit() -> None:
    async def silent(request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with serving(silent) as server, ComfyUIClient(server.url, tokens(), read_seconds=0.1) as client:
        with pytest.raises(OutsideFailure) as raised:
            await client.get_job(job_call())
    assert "sent nothing for too long" in raised.value.sentence


async def test_short_tries_are_not_sent_while_the_party_hangs_and_others_are() -> None:
    async def silent(request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def failure() -> str:
        with pytest.raises(OutsideFailure) as raised:
            await client.get_job(job_call())
        assert raised.value.code is FailureCode.COMFYUI_UNAVAILABLE
        return raised.value.sentence

    async with serving(silent) as server, ComfyUIClient(server.url, tokens(), read_seconds=0.3) as client:
        with only_if_answering():
            await failure()
            assert "/jobs/{job_id}: another request to it timed out a moment ago. It is retried" in await failure()
        assert len(server.seen) == 1
        await failure()
        assert len(server.seen) == 2


def test_a_time_limit_shortens_the_usual_one_and_ends_with_its_block() -> None:
    usual = current_time_limit_seconds()
    with time_limit(0.5):
        assert current_time_limit_seconds() == 0.5
        with time_limit(1_000):
            assert current_time_limit_seconds() == usual
        assert current_time_limit_seconds() == 0.5
    assert current_time_limit_seconds() == usual


@pytest.mark.parametrize("extra_bytes", [0, 1])
async def test_a_body_of_exactly_the_limit_is_read_whole(extra_bytes: int) -> None:
    body = b"x" * (100 + extra_bytes)
    async with serving(always(200, body)) as server, OutsideHttp(COMFYUI, server.url, max_reply_bytes=100) as http:
        if not extra_bytes:
            assert (await http.send(LIST_GPUS, token="t")).body == body
            return
        with pytest.raises(OutsideFailure) as raised:
            await http.send(LIST_GPUS, token="t")
    assert raised.value.code is FailureCode.REPLY_INVALID
    assert "know: HTTP 200 with a body of more than 100 bytes. It is retried" in raised.value.sentence


async def test_a_full_pool_is_reported() -> None:
    async def silent(request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with (
        serving(silent) as server,
        ComfyUIClient(server.url, tokens(), connect_seconds=0.1, read_seconds=0.5, pool_size=1) as client,
    ):
        outcomes = await asyncio.gather(client.get_job(job_call()), client.get_job(job_call()), return_exceptions=True)
    assert sum("all of our connections" in str(outcome) for outcome in outcomes) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://name:password@credits.test",
        "ftp://credits.test",
        "credits.test:8190",
        "http://",
        "http://credits.test/?key=1",
        "http://credits.test/#part",
        "http://credits.test?",
        "http://credits.test#",
        "http://[::1",
        "",
    ],
)
def test_an_unusable_address_is_refused_at_once_without_its_credentials(url: str) -> None:
    with pytest.raises(ValueError, match="COMFYUI_TEMPORAL_CREDITS_URL") as raised:
        CreditsClient(url, tokens())
    assert "password" not in str(raised.value).replace("user and password", "")


async def test_what_a_request_carries(facing: Facing) -> None:
    async with facing(always(202, {"job_id": "job-1", "estimated_cost": 24})) as (server, calls):
        await calls["submit_job"]()
    [seen] = server.seen
    assert (seen.method, seen.target) == ("POST", "/comfyui/v1/jobs")
    assert seen.headers["x-idempotency-key"] == "task-1:submit:1"
    assert seen.headers["content-type"] == "application/json"
    assert json.loads(seen.body) == {
        "task_id": "task-1",
        "tenant_id": "tenant-demo",
        "user_id": "user-demo",
        "template_id": "text-to-image",
        "prompt": PROMPT,
        "controls": [],
        "resolution": "hd",
        "priority": "standard",
        "extras": {"seed": None},
        "callback_url": "http://127.0.0.1:1/callbacks/comfyui/task-1",
    }, "what was not asked for is left out"
    claims = jwt.decode(
        seen.headers["authorization"].removeprefix("Bearer "),
        SECRET,
        algorithms=["HS256"],
        audience="comfyui-platform",
        issuer="comfyui-temporal",
    )
    assert (claims["tenant_id"], claims["user_id"]) == ("tenant-demo", "user-demo")
    assert 290 < claims["exp"] - time.time() <= 301
    assert claims["iat"] < time.time() - 20, "a service whose clock is a little slow takes it too"


async def test_a_call_is_a_span_that_names_its_route_and_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(left))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    async with serving(always(404)) as server, OutsideHttp(COMFYUI, server.url) as http:
        await http.send(GET_JOB, token="t", ids={"job_id": "job-1"})
        with pytest.raises(OutsideFailure):
            await http.send(GET_JOB, token="t", ids={"job_id": "\ud800"})

    named = {
        "http.request.method": "GET",
        "url.template": "/comfyui/v1/jobs/{job_id}",
        "server.address": "127.0.0.1",
    }
    answered, failed = left.get_finished_spans()
    assert {(span.name, span.kind) for span in (answered, failed)} == {
        ("GET /comfyui/v1/jobs/{job_id}", SpanKind.CLIENT)
    }
    assert answered.attributes == named | {"http.response.status_code": 404}
    assert failed.attributes == named | {"error.type": "comfyui_unavailable"}


SCOPES = {
    "submit_job": Scope.IMAGE_GENERATE,
    "get_job": Scope.TASK_READ,
    "cancel_job": Scope.TASK_CANCEL,
    "create_training": Scope.MODEL_TRAIN,
    "start_training": Scope.MODEL_TRAIN,
    "get_training": Scope.TASK_READ,
    "cancel_training": Scope.TASK_CANCEL,
    "list_gpus": Scope.TASK_READ,
    "list_templates": Scope.TASK_READ,
    **dict.fromkeys(("estimate", "pre_deduct", "commit", "cancel_hold", "charge", "balance", "ledger"), "scene"),
}


@pytest.mark.parametrize("call", SCOPES)
async def test_each_token_has_the_scope_that_the_call_needs_and_no_other(facing: Facing, call: str) -> None:
    async with facing(always(422, error_body("payload_invalid"))) as (server, calls):
        await calls[call]()
    token = server.seen[0].headers["authorization"].removeprefix("Bearer ")
    scope = SCOPES[call] if SCOPES[call] != "scene" else Scope.IMAGE_GENERATE
    assert jwt.decode(token, options={"verify_signature": False})["scopes"] == [scope]


@pytest.mark.parametrize(
    ("scene", "is_rollback", "scope"),
    [
        (Scene.MODEL_TRAIN, False, Scope.MODEL_TRAIN),
        (Scene.IMAGE_GENERATE, True, Scope.CREDITS_ROLLBACK),
        (Scene.MODEL_TRAIN, True, Scope.CREDITS_ROLLBACK),
    ],
)
async def test_credits_are_called_with_the_scenes_scope_or_rollbacks(
    scene: Scene, is_rollback: bool, scope: Scope
) -> None:
    async with (
        serving(always(200, {"balance": 1, "frozen": 0})) as server,
        CreditsClient(server.url, tokens()) as client,
    ):
        await client.balance(call_for(scene=scene, is_rollback=is_rollback))
        token = server.seen[0].headers["authorization"].removeprefix("Bearer ")
        assert server.seen[0].target == "/api/v1/credits/balance?tenant_id=tenant-demo&user_id=user-demo"
    assert jwt.decode(token, options={"verify_signature": False})["scopes"] == [scope]


async def test_a_service_token_is_sent_as_it_is() -> None:
    async with (
        serving(always(200, [])) as server,
        ComfyUIClient(server.url, ServiceToken("opaque-token")) as client,
    ):
        await client.list_gpus(call_for())
        assert server.seen[0].headers["authorization"] == "Bearer opaque-token"


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "tökén"])
def test_a_service_token_that_no_header_can_hold_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        ServiceToken(token)


def test_the_shortest_secret_and_a_token_of_every_printable_character_are_taken() -> None:
    assert jwt.decode(
        SignedTokens("s" * 32, "issuer", "audience")(tenant_id="t", user_id="u", scope=Scope.TASK_READ),
        "s" * 32,
        algorithms=["HS256"],
        audience="audience",
    )
    printable = "".join(map(chr, range(0x21, 0x7F)))
    assert ServiceToken(printable)(tenant_id="t", user_id="u", scope=Scope.TASK_READ) == printable


def test_secrets_are_long_and_never_shown() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SignedTokens("short", "issuer", "audience")
    assert SECRET not in repr(tokens())
    assert "opaque" not in repr(ServiceToken("opaque"))


async def test_an_id_is_percent_encoded_in_a_path(facing: Facing) -> None:
    async with (
        serving(always(404, error_body("job_not_found", "40401"))) as server,
        ComfyUIClient(server.url, tokens()) as client,
    ):
        await client.get_job(job_call("a:b/../c?d#e%2f"))
        assert server.seen[0].target == "/comfyui/v1/jobs/a%3Ab%2F..%2Fc%3Fd%23e%252f"


async def test_an_id_that_no_address_can_hold_is_a_named_failure(facing: Facing) -> None:
    async with facing(always(200, {})) as (server, _), OutsideHttp(COMFYUI, server.url) as http:
        for job_id in ("\ud800", "x" * 100_000):
            with pytest.raises(OutsideFailure) as raised:
                await http.send(GET_JOB, token="t", ids={"job_id": job_id})
            assert "did not answer GET /comfyui/v1/jobs/{job_id}: the " in raised.value.sentence
            assert len(raised.value.sentence) < 1_000
        assert server.seen == []


@pytest.mark.parametrize("key", ["task-1:submit:1\r\nx-admin: yes", "tásk:submit:1", "", "k" * 256])
async def test_a_key_that_no_header_can_hold_is_not_sent(key: str) -> None:
    async with serving(always(200, {})) as server, CreditsClient(server.url, tokens()) as client:
        with pytest.raises(OutsideFailure) as raised:
            await client.pre_deduct(Post(call_for=call_for(), key=key, body=pre_deduct_post().body))
        assert server.seen == []
    assert (raised.value.code, raised.value.may_be_retried) == (FailureCode.INPUT_INVALID, False)


async def test_a_body_that_json_cannot_carry_is_not_sent() -> None:
    body = commit_post().body.model_copy(update={"task_id": "\ud800"})
    async with serving(always(200, {})) as server, CreditsClient(server.url, tokens()) as client:
        with pytest.raises(OutsideFailure) as raised:
            await client.commit(Post(call_for=call_for(), key="k", body=body))
        assert server.seen == []
    assert (raised.value.code, raised.value.may_be_retried) == (FailureCode.INPUT_INVALID, False)


async def test_a_repeated_post_sends_the_same_bytes(facing: Facing) -> None:
    async with facing(always(503)) as (server, calls):
        for _ in range(2):
            with pytest.raises(OutsideFailure):
                await calls["submit_job"]()
    first, second = server.seen
    assert (first.body, first.headers["x-idempotency-key"]) == (second.body, second.headers["x-idempotency-key"])


async def test_a_proxy_of_the_environment_is_not_used_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with serving(always(200, [])) as server, ComfyUIClient(server.url, tokens()) as client:
        assert (await client.list_gpus(call_for())).reply == []


def entry(number: int, **more: object) -> dict[str, object]:
    return {"ledger_id": f"l-{number}", "change": -1, "task_id": "task-1", "created_at": "2026-01-01T00:00:00Z"} | more


async def test_a_ledger_is_read_to_its_last_page_and_narrowed_to_the_task() -> None:
    """Also where the service ignores `task_id`, and where a cancel repeats only the hold's id."""
    pages = {
        None: {"entries": [entry(5, task_id=None, pre_deduct_id="h-1", kind="cancel")], "cursor": "p2"},
        "p2": {"entries": [entry(4, task_id="task-2"), entry(3, kind="words of tomorrow")], "cursor": "p3"},
        "p3": {"entries": [entry(2, pre_deduct_id="h-1"), entry(1, task_id=None, pre_deduct_id="h-9")], "cursor": None},
    }

    async def page(request: Seen, writer: asyncio.StreamWriter) -> None:
        await always(200, pages[httpx.URL(request.target).params.get("cursor")])(request, writer)

    async with serving(page) as server, CreditsClient(server.url, tokens()) as client:
        answer = await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1", limit=2))
        assert all("task_id=task-1" in seen.target and "limit=2" in seen.target for seen in server.seen)
    assert answer.reply is not None
    assert [found.ledger_id for found in answer.reply.entries] == ["l-5", "l-3", "l-2"]
    assert answer.reply.cursor is None


@pytest.mark.parametrize(("entries", "is_whole"), [(999, True), (1000, False)])
async def test_a_full_page_of_a_ledger_without_pages_is_requested_once_more_at_its_longest(
    entries: int, is_whole: bool
) -> None:
    async def page(request: Seen, writer: asyncio.StreamWriter) -> None:
        limit = int(httpx.URL(request.target).params["limit"])
        await always(200, {"entries": [entry(n) for n in range(entries)][:limit]})(request, writer)

    async with serving(page) as server, CreditsClient(server.url, tokens()) as client:
        answer = await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1"))
        assert len(server.seen) == 2
    assert answer.reply is not None
    assert (len(answer.reply.entries), answer.reply.cursor is None) == (entries, is_whole)


async def test_a_longer_page_that_is_refused_leaves_the_ledger_cut_off() -> None:
    async def page(request: Seen, writer: asyncio.StreamWriter) -> None:
        is_short = "limit=200" in request.target
        reply = {"entries": [entry(n) for n in range(200)]} if is_short else {"detail": "limit: at most 200"}
        await always(200 if is_short else 422, reply)(request, writer)

    async with serving(page) as server, CreditsClient(server.url, tokens()) as client:
        answer = await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1"))
    assert answer.reply is not None
    assert (len(answer.reply.entries), answer.reply.cursor is None) == (200, False)


async def test_a_ledger_with_a_repeated_cursor_is_an_invalid_reply() -> None:
    async with (
        serving(always(200, {"entries": [], "cursor": "again"})) as server,
        CreditsClient(server.url, tokens()) as client,
    ):
        with pytest.raises(OutsideFailure, match=r"GET /api/v1/credits/ledger .* leads in a circle") as raised:
            await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1"))
    assert raised.value.code is FailureCode.REPLY_INVALID


async def test_an_endless_ledger_is_left_with_its_last_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("activities.credits.MAX_LEDGER_PAGES", 3)

    async def page(request: Seen, writer: asyncio.StreamWriter) -> None:
        last = int(httpx.URL(request.target).params.get("cursor", "0"))
        await always(200, {"entries": [entry(last)], "cursor": str(last + 1)})(request, writer)

    async with serving(page) as server, CreditsClient(server.url, tokens()) as client:
        answer = await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1"))
    assert answer.reply is not None
    assert (len(answer.reply.entries), answer.reply.cursor) == (3, "3")


async def test_a_newer_workers_request_is_sent_unchanged() -> None:
    """The same key goes with the same body: a repeat that left out a field would be another request."""
    post = job_post()
    document = json.loads(post.model_dump_json())
    document["body"] |= {"style": "etching", "upscaling": None, "controls": [{"image_url": "https://a.example/"}]}
    document["of_tomorrow"] = 1
    payload = Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(document).encode())
    [newer] = DATA_CONVERTER.payload_converter.from_payloads([payload], [Post[JobRequest]])
    answer = {"job_id": "job-1", "job_status": "queued", "estimated_time": 1, "gpu_slots": 1, "estimated_cost": 24}
    async with serving(always(202, answer)) as server, ComfyUIClient(server.url, tokens()) as comfyui:
        assert (await comfyui.submit_job(newer)).reply is not None
    sent = json.loads(server.seen[0].body)
    wanted = {name: value for name, value in document["body"].items() if value is not None}
    assert sent == wanted and sent["style"] == "etching"
