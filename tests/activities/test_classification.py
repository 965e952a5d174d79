"""Each answer of ComfyUI or the credits service becomes exactly one named outcome (contract §2, §4)."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from activities.comfyui import COMFYUI, LIST_GPUS
from activities.credits import CreditsClient
from activities.outside_http import OutsideFailure, OutsideHttp, RawReply
from activities.replies import read_answer, read_error_body
from comfyui_temporal.contracts.errors import COMFYUI_ERRORS, CREDITS_ERRORS, FailureCode
from tests.activities.calls import estimate_post, tokens
from tests.activities.conftest import Facing
from tests.activities.loopback import Seen, always, error_body, http_bytes, serving
from workflows.failures import TaskFailed

COMFYUI_CALLS = [
    "submit_job",
    "get_job",
    "cancel_job",
    "create_training",
    "start_training",
    "get_training",
    "cancel_training",
    "list_gpus",
    "list_templates",
]
CREDITS_CALLS = ["estimate", "pre_deduct", "commit", "cancel_hold", "charge", "balance", "ledger"]
LISTS = {"list_gpus", "list_templates"}
OURS = {"cancel_job", "start_training", "cancel_training", *LISTS}
F = FailureCode

# Contract §2 and §4, row by row: call, message, number, HTTP status, outcome.
DEFINITE: list[tuple[str, str, str, int, FailureCode]] = [
    ("submit_job", "payload_invalid", "42201", 422, F.INPUT_INVALID),
    ("submit_job", "template_not_found", "40402", 404, F.INPUT_INVALID),
    ("submit_job", "authorization_missing", "40302", 403, F.NOT_AUTHORIZED),
    ("submit_job", "idempotency_conflict", "40901", 409, F.TASK_CONFLICT),
    ("get_job", "job_not_found", "40401", 404, F.LOST),
    ("cancel_job", "job_not_found", "40401", 404, F.LOST),
    ("create_training", "payload_invalid", "42201", 422, F.INPUT_INVALID),
    ("get_training", "training_not_found", "40401", 404, F.LOST),
    ("start_training", "training_not_found", "40401", 404, F.LOST),
    ("cancel_training", "training_not_found", "40401", 404, F.LOST),
    ("estimate", "payload_invalid", "42201", 422, F.INPUT_INVALID),
    ("estimate", "authorization_missing", "40302", 403, F.NOT_AUTHORIZED),
    ("estimate", "template_not_found", "40401", 404, F.INPUT_INVALID),
    ("estimate", "scope_denied", "40301", 403, F.NOT_AUTHORIZED),
    ("pre_deduct", "scope_denied", "40301", 403, F.NOT_AUTHORIZED),
    ("pre_deduct", "authorization_daily_limit", "40302", 403, F.QUOTA_EXCEEDED),
    ("pre_deduct", "daily_quota_exceeded", "40303", 403, F.QUOTA_EXCEEDED),
    ("pre_deduct", "insufficient_balance", "40302", 403, F.INSUFFICIENT_BALANCE),
    ("pre_deduct", "insufficient_balance", "40201", 402, F.INSUFFICIENT_BALANCE),
    ("pre_deduct", "authorization_not_found", "40302", 403, F.NOT_AUTHORIZED),
    ("pre_deduct", "authorization_not_found", "40401", 404, F.NOT_AUTHORIZED),
    ("pre_deduct", "authorization_revoked", "40302", 403, F.NOT_AUTHORIZED),
    ("pre_deduct", "authorization_expired", "40401", 404, F.NOT_AUTHORIZED),
    ("pre_deduct", "authorization_quota_exceeded", "40302", 403, F.QUOTA_EXCEEDED),
    ("pre_deduct", "idempotency_conflict", "40901", 409, F.TASK_CONFLICT),
    ("commit", "pre_deduct_not_found", "40401", 404, F.REPLY_INVALID),
    ("commit", "pre_deduct_already_processed", "40901", 409, F.REPLY_INVALID),
    ("commit", "hold_insufficient", "40902", 409, F.REPLY_INVALID),
    ("commit", "amount_invalid", "42200", 422, F.REPLY_INVALID),
    ("cancel_hold", "pre_deduct_not_found", "40401", 404, F.REPLY_INVALID),
    ("cancel_hold", "pre_deduct_already_processed", "40901", 409, F.REPLY_INVALID),
    ("charge", "insufficient_balance", "40201", 402, F.INSUFFICIENT_BALANCE),
    ("charge", "insufficient_balance", "40302", 403, F.INSUFFICIENT_BALANCE),
    ("charge", "amount_limit_exceeded", "42201", 422, F.REPLY_INVALID),
    ("charge", "idempotency_conflict", "40901", 409, F.TASK_CONFLICT),
    ("balance", "account_not_found", "40401", 404, F.NOT_AUTHORIZED),
    ("ledger", "account_not_found", "40401", 404, F.NOT_AUTHORIZED),
]
RETRIED: list[tuple[str, str, str, int, FailureCode]] = [
    ("submit_job", "rate_limited", "42901", 429, F.COMFYUI_UNAVAILABLE),
    ("estimate", "pricing_unavailable", "50301", 503, F.CREDITS_UNAVAILABLE),
    ("estimate", "estimate_rate_limited", "42901", 429, F.CREDITS_UNAVAILABLE),
    ("charge", "charge_rate_limited", "42901", 429, F.CREDITS_UNAVAILABLE),
    ("charge", "ledger_unavailable", "50302", 503, F.CREDITS_UNAVAILABLE),
]
BY_NUMBER: list[tuple[str, str, str]] = [
    ("submit_job", "40401", "template_not_found"),
    ("create_training", "40401", "template_not_found"),
    ("estimate", "40401", "template_not_found"),
    ("estimate", "40301", "scope_denied"),
    ("pre_deduct", "40301", "scope_denied"),
    ("pre_deduct", "40303", "daily_quota_exceeded"),
    ("commit", "40301", "scope_denied"),
    ("submit_job", "42201", "payload_invalid"),
    ("submit_job", "40402", "template_not_found"),
    ("get_job", "40401", "job_not_found"),
    ("get_training", "40401", "training_not_found"),
    ("start_training", "40401", "training_not_found"),
    ("cancel_training", "40401", "training_not_found"),
    ("pre_deduct", "40201", "insufficient_balance"),
    ("pre_deduct", "40302", "authorization_missing"),
    ("pre_deduct", "40401", "authorization_not_found"),
    ("pre_deduct", "40901", "idempotency_conflict"),
    ("commit", "40401", "pre_deduct_not_found"),
    ("commit", "40901", "pre_deduct_already_processed"),
    ("commit", "40902", "hold_insufficient"),
    ("commit", "42200", "amount_invalid"),
    ("cancel_hold", "40901", "pre_deduct_already_processed"),
    ("charge", "40302", "insufficient_balance"),
    ("charge", "42201", "amount_limit_exceeded"),
    ("balance", "40401", "account_not_found"),
]


def unavailable(call: str) -> FailureCode:
    return F.COMFYUI_UNAVAILABLE if call in COMFYUI_CALLS else F.CREDITS_UNAVAILABLE


@pytest.mark.parametrize(("call", "message", "number", "status", "code"), DEFINITE)
async def test_a_definite_refusal_is_an_answer(
    facing: Facing, call: str, message: str, number: str, status: int, code: FailureCode
) -> None:
    async with facing(always(status, error_body(message, number))) as (_, calls):
        answer = await calls[call]()
    assert answer.reply is None
    assert not answer.not_offered
    assert answer.refusal is not None
    assert (answer.refusal.code, answer.refusal.message) == (code, message)
    assert (answer.refusal.http_status, answer.refusal.wire_code) == (status, number)
    assert message in answer.refusal.sentence


@pytest.mark.parametrize(("call", "message", "number", "status", "code"), DEFINITE)
async def test_a_refusal_keeps_its_code_beside_details_that_are_no_jobs(
    facing: Facing, call: str, message: str, number: str, status: int, code: FailureCode
) -> None:
    """Only `job_refused` has a job's `error_details`; any service may put words of its own there."""
    body = error_body(message, number, error_details="balance 3, needed 24")
    async with facing(always(status, body)) as (_, calls):
        answer = await calls[call]()
    assert answer.refusal is not None
    failed = TaskFailed.by_refusal(answer.refusal)
    assert (failed.code, failed.error_details.code) == (code, code)


@pytest.mark.parametrize(("call", "message", "number", "status", "code"), RETRIED)
async def test_a_busy_service_is_retried_when_it_asks_to_be(
    facing: Facing, call: str, message: str, number: str, status: int, code: FailureCode
) -> None:
    async with facing(always(status, error_body(message, number), {"retry-after": "7"})) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls[call]()
    assert (raised.value.code, raised.value.retry_after_seconds) == (code, 7.0)
    assert raised.value.may_be_retried
    assert message in raised.value.sentence


def test_every_row_of_the_contract_is_tried_above() -> None:
    tried = {(call in COMFYUI_CALLS, message) for call, message, *_ in [*DEFINITE, *RETRIED]} | {(True, "job_refused")}
    assert tried == {(True, row.message) for row in COMFYUI_ERRORS} | {(False, row.message) for row in CREDITS_ERRORS}


CONTRACT = Path(__file__).parents[2] / "docs" / "contract.md"
CALLS_BY_ROUTE = {
    "estimate": "estimate",
    "pre-deduct": "pre_deduct",
    "commit": "commit",
    "cancel": "cancel_hold",
    "charge": "charge",
    "balance": "balance",
    "ledger": "ledger",
}
COMES_TO = {
    "payload_invalid": F.INPUT_INVALID,
    "template_not_found": F.INPUT_INVALID,
    "authorization_missing": F.NOT_AUTHORIZED,
    "scope_denied": F.NOT_AUTHORIZED,
    "authorization_not_found": F.NOT_AUTHORIZED,
    "authorization_revoked": F.NOT_AUTHORIZED,
    "authorization_expired": F.NOT_AUTHORIZED,
    "authorization_quota_exceeded": F.QUOTA_EXCEEDED,
    "authorization_daily_limit": F.QUOTA_EXCEEDED,
    "daily_quota_exceeded": F.QUOTA_EXCEEDED,
    "insufficient_balance": F.INSUFFICIENT_BALANCE,
    "idempotency_conflict": F.TASK_CONFLICT,
    "account_not_found": F.NOT_AUTHORIZED,
}
"""What a task ends with. Errors that are not listed are decided by a rule or retried."""


def errors_of_the_contract() -> list[tuple[str, str, str]]:
    """Contract §4's table: call, message and number, a row for each number of a message."""
    rows = re.findall(
        r"^\| `(?:POST|GET) /api/v1/credits/(\S+)` \|.*\| ([^|]*) \|$", CONTRACT.read_text(), re.MULTILINE
    )
    table = dict(rows)
    found: list[tuple[str, str, str]] = []
    for route, cell in rows:
        for group in table["commit" if cell == "as commit" else route].split(" · "):
            names = [name.replace(" (2)", "") for name in re.findall(r"[a-z_]+(?: \(2\))?", group.replace(" or ", " "))]
            prefix = names[0].partition("_")[0]
            for name in names:
                message = prefix + name if name.startswith("_") else name
                found += [(CALLS_BY_ROUTE[route], message, number) for number in re.findall(r"\d{5}", group)]
    return found


@pytest.mark.parametrize(("call", "message", "number"), errors_of_the_contract())
@pytest.mark.parametrize("status", ["by its number", 403, 500])
async def test_every_error_that_the_platform_documents_says_who_has_to_do_what(
    facing: Facing, call: str, message: str, number: str, status: str | int
) -> None:
    """The message decides, not the HTTP status. The sentence says who has to act, or that no action is needed."""
    http_status = status if isinstance(status, int) else int(number[:3])
    async with facing(always(http_status, error_body(message, number))) as (_, calls):
        try:
            answer = await calls[call]()
        except OutsideFailure as failure:
            sentence, code = failure.sentence, None
        else:
            assert answer.refusal is not None
            sentence, code = answer.refusal.sentence, answer.refusal.code
    assert message in sentence and "token was not accepted" not in sentence
    assert re.search(r"(caller|administrator|operator) has to|No action is needed", sentence), sentence
    assert code == COMES_TO.get(message, code)


def test_the_contracts_table_is_read_whole() -> None:
    documented = {message for _, message, _ in errors_of_the_contract()}
    assert documented == {row.message for row in CREDITS_ERRORS}


async def test_a_403_with_an_unknown_message_is_not_reported_as_a_bad_token(facing: Facing) -> None:
    async with facing(always(403, error_body("tenant_frozen", "40399"))) as (_, calls):
        with pytest.raises(OutsideFailure, match="40399 tenant_frozen") as raised:
            await calls["pre_deduct"]()
    assert "token was not accepted" not in raised.value.sentence


@pytest.mark.parametrize(("call", "number", "message"), BY_NUMBER)
@pytest.mark.parametrize("as_integer", [False, True])
async def test_an_unknown_message_is_read_by_its_number(
    facing: Facing, call: str, number: str, message: str, as_integer: bool
) -> None:
    body = error_body("words of a newer service", int(number) if as_integer else number)
    async with facing(always(400, body)) as (_, calls):
        answer = await calls[call]()
    assert answer.refusal is not None
    assert answer.refusal.message == message


async def test_the_message_counts_more_than_number_and_status(facing: Facing) -> None:
    async with facing(always(500, error_body("insufficient_balance", "40901"))) as (_, calls):
        answer = await calls["pre_deduct"]()
    assert answer.refusal is not None
    assert answer.refusal.code is F.INSUFFICIENT_BALANCE


@pytest.mark.parametrize(
    ("details", "code"),
    [
        ({"code": "model_missing", "message": "no checkpoint", "node": "4"}, F.MODEL_MISSING),
        ({"code": "gpu_preempted", "message": "", "retryable": True}, F.GPU_PREEMPTED),
        ({"code": "word_of_tomorrow"}, F.INTERNAL),
        ("just a text", F.INTERNAL),
        (None, F.INTERNAL),
        ({"code": {"odd": []}}, F.INTERNAL),
    ],
)
async def test_a_refused_job_fails_with_the_code_of_its_details(
    facing: Facing, details: Any, code: FailureCode
) -> None:
    async with facing(always(422, error_body("job_refused", "42202", error_details=details))) as (_, calls):
        answer = await calls["submit_job"]()
    assert answer.refusal is not None
    assert (answer.refusal.message, answer.refusal.code) == ("job_refused", code)
    if isinstance(details, dict) and isinstance(details["code"], str):
        assert answer.refusal.error_details is not None
        assert answer.refusal.error_details.code == details["code"]
        assert answer.refusal.sentence.endswith(f"job_refused. {details['code']}: {details.get('message', '')}")


async def test_an_odd_extra_field_does_not_hide_the_message(facing: Facing) -> None:
    body = error_body("payload_invalid", 42201, fields=[{"loc": ["prompt"]}, "prompt: too long"], error_details=[1])
    async with facing(always(422, body)) as (_, calls):
        answer = await calls["submit_job"]()
    assert answer.refusal is not None
    assert answer.refusal.code is F.INPUT_INVALID
    assert "payload_invalid (prompt: too long). " in answer.refusal.sentence


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ([], "payload_invalid. "),
        ("prompt: too long", "payload_invalid. "),
        ([{"loc": ["prompt"]}, None, ""], "payload_invalid. "),
        (["prompt: too long", 7], "payload_invalid (prompt: too long; 7). "),
        (list("abcdefg"), "payload_invalid (a; b; c; d; e). "),
    ],
)
async def test_a_refusal_names_up_to_five_fields(facing: Facing, fields: Any, named: str) -> None:
    async with facing(always(422, error_body("payload_invalid", fields=fields))) as (_, calls):
        answer = await calls["submit_job"]()
    assert answer.refusal is not None
    assert answer.refusal.sentence.startswith(f"ComfyUI refused POST /comfyui/v1/jobs: {named}")


@pytest.mark.parametrize("number", ["40401", 40401])
async def test_a_number_alone_is_enough(facing: Facing, number: str | int) -> None:
    async with facing(always(404, {"detail": {"code": number}})) as (_, calls):
        answer = await calls["cancel_job"]()
    assert answer.refusal is not None
    assert answer.refusal.message == "job_not_found"


@pytest.mark.parametrize(
    ("detail", "known"),
    [
        ({"message": "busy", "code": 1}, ("busy", "1")),
        ({"message": "busy", "code": True}, ("busy", "")),
        ({"message": ["busy"], "code": "1"}, ("", "1")),
        ({"message": False, "code": "1"}, ("", "1")),
        ({"message": None, "code": 1.5}, None),
        ({"message": "", "code": {}}, None),
        ({}, None),
        ("busy", None),
    ],
)
def test_an_error_body_needs_a_text_or_a_number_that_says_something(detail: Any, known: tuple[str, str] | None) -> None:
    body = read_error_body(json.dumps({"detail": detail}).encode())
    assert (body and (body.message, body.number)) == known


NO_ANSWER = "ComfyUI at {url} did not answer GET /comfyui/v1/jobs/{{job_id}}: {reason}. It is retried; "
NOT_KNOWN = (
    "ComfyUI at {url} answered GET /comfyui/v1/jobs/{{job_id}} in a way that the contract does not know: {reason}. "
    "It is retried; "
)
A_JOB: dict[str, Any] = {"job_id": "job-1", "job_status": "queued"}


@pytest.mark.parametrize(
    ("status", "body", "sentence", "reason"),
    [
        (200, {"job_id": "job-1"}, NOT_KNOWN, "HTTP 200, application/json, job_status: Field required"),
        (
            200,
            A_JOB | {"result_urls": ["file:///a", "https://a.example/"]},
            NOT_KNOWN,
            "HTTP 200, application/json, result_urls.0: ...",
        ),
        (200, [], NOT_KNOWN, "HTTP 200, application/json, the whole body: ..."),
        (200, b"<html>", NOT_KNOWN, "HTTP 200, application/json, not JSON: JSONDecodeError"),
        (200, A_JOB | {"job_id": "job-2"}, NOT_KNOWN, "HTTP 200, application/json, job_id is 'job-2', expected ..."),
        (200, b"", NOT_KNOWN, "HTTP 200, no body, not JSON: JSONDecodeError"),
        (300, A_JOB, NOT_KNOWN, "HTTP 300, a redirect, which is not followed"),
        (400, b"<html>", NOT_KNOWN, "HTTP 400, application/json"),
        (400, error_body("words of tomorrow", 7), NOT_KNOWN, "HTTP 400, application/json and says 7 words of tomorrow"),
        (410, b"", NOT_KNOWN, "HTTP 410, no body"),
        (
            401,
            b"",
            NO_ANSWER,
            "HTTP 401: our token was not accepted; check secret, issuer, audience and both sides' clocks",
        ),
        (503, b"", NO_ANSWER, "HTTP 503"),
        (503, error_body("busy"), NO_ANSWER, "HTTP 503 and says busy"),
    ],
)
async def test_a_failure_says_who_was_asked_what_and_what_is_wrong_with_the_answer(
    facing: Facing, status: int, body: Any, sentence: str, reason: str
) -> None:
    async with facing(always(status, body)) as (server, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["get_job"]()
    wanted = re.escape(sentence.format(url=server.url, reason=reason)).replace(r"\.\.\.", ".+")
    assert re.match(wanted, raised.value.sentence), raised.value.sentence


@pytest.mark.parametrize(
    ("content_type", "named"),
    [
        ("text/html", "text/html"),
        (" Text/HTML ; charset=utf-8", "text/html"),
        ("a" * 64, "a" * 64),
        ("a" * 65, "no content type"),
        ("text/\u00e4", "no content type"),
        ("text/\x07html", "no content type"),
        ("", "no content type"),
        (None, "no content type"),
    ],
)
async def test_a_failure_names_the_content_type_where_it_is_readable(content_type: str | None, named: str) -> None:
    headers = httpx.Headers([] if content_type is None else [(b"content-type", content_type.encode())])
    async with OutsideHttp(COMFYUI, "http://comfyui.test") as http:
        with pytest.raises(OutsideFailure, match=re.escape(f"HTTP 418, {named}. It is retried")):
            read_answer(http, LIST_GPUS, RawReply(418, headers, b"short and stout"), dict)


@pytest.mark.parametrize("call", [*COMFYUI_CALLS, *CREDITS_CALLS])
async def test_without_a_recognised_body_these_statuses_are_retried(facing: Facing, call: str) -> None:
    for status in (401, 403, 408, 425, 429, 500, 502, 503, 504, 599):
        async with facing(always(status, b"<html>busy</html>", {"content-type": "text/html"})) as (server, calls):
            with pytest.raises(OutsideFailure) as raised:
                await calls[call]()
        assert (status, raised.value.code, raised.value.may_be_retried) == (status, unavailable(call), True)
        assert server.url in raised.value.sentence
        assert str(status) in raised.value.sentence
        assert ("token" in raised.value.sentence) == (status in (401, 403))


@pytest.mark.parametrize("call", [*COMFYUI_CALLS, *CREDITS_CALLS])
async def test_without_a_recognised_body_other_statuses_are_an_invalid_reply(facing: Facing, call: str) -> None:
    for status in (400, 404, 405, 409, 410, 418, 422):
        async with facing(always(status, {"detail": "Not Found"})) as (_, calls):
            if call in OURS and status in (404, 405):
                assert (await calls[call]()).not_offered
                continue
            with pytest.raises(OutsideFailure) as raised:
                await calls[call]()
        assert (status, raised.value.code, raised.value.may_be_retried) == (status, F.REPLY_INVALID, True)


@pytest.mark.parametrize("call", [*COMFYUI_CALLS, *CREDITS_CALLS])
async def test_only_our_routes_may_be_left_out(facing: Facing, call: str) -> None:
    async with facing(always(501, b"")) as (_, calls):
        if call in OURS:
            answer = await calls[call]()
            assert (answer.not_offered, answer.reply, answer.refusal) == (True, None, None)
            return
        with pytest.raises(OutsideFailure) as raised:
            await calls[call]()
    assert raised.value.code is unavailable(call)


async def test_a_404_with_an_unknown_message_does_not_make_a_route_not_offered(facing: Facing) -> None:
    async with facing(always(404, error_body("job_is_elsewhere", "40499"))) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["cancel_job"]()
    assert raised.value.code is F.REPLY_INVALID


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("86400", 60, 60),
        ("9" * 400, 60, 60),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00", 0, 0),
        ("Wed, 21 Oct 2115 07:28:00", 60, 60),
    ],
)
async def test_retry_after_is_kept_up_to_a_minute(facing: Facing, header: str, low: float, high: float) -> None:
    async with facing(always(503, b"", {"retry-after": header})) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["estimate"]()
    assert raised.value.retry_after_seconds is not None
    assert low <= raised.value.retry_after_seconds <= high


@pytest.mark.parametrize("offset_hours", [0, 2, -5])
async def test_retry_after_may_be_a_date_of_any_time_zone(facing: Facing, offset_hours: int) -> None:
    at = datetime.now(UTC) + timedelta(seconds=40)
    header = format_datetime(at.astimezone(timezone(timedelta(hours=offset_hours))))
    async with facing(always(503, b"", {"retry-after": header})) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["estimate"]()
    assert raised.value.retry_after_seconds is not None
    assert 20 <= raised.value.retry_after_seconds <= 40


@pytest.mark.parametrize("header", ["soon", "-5", "1e9", "\u00b2", "\u0663", "Wed, 99 Oct 99999 07:28:00 GMT", ""])
async def test_an_unreadable_retry_after_is_ignored(facing: Facing, header: str) -> None:
    async with facing(always(503, b"", {"retry-after": header})) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["estimate"]()
    assert raised.value.retry_after_seconds is None


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "html": b"<html><body>It works!</body></html>",
    "null": b"null",
    "text": b'"ok"',
    "list": b"[1]",
    "number": b"7",
    "truncated": b'{"job_id": "job-1"',
    "not a number": b'{"estimated_cost": NaN, "selected_cost": NaN, "frozen_amount": NaN, "change": NaN}',
    "infinite": b'{"job_id": 1e999}',
    "deep": b'{"extras":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "rather deep": b'{"extras":' + b"[" * 40 + b"]" * 40 + b"}",
    "5,000 digits": b'{"selected_cost": ' + b"9" * 5_000 + b"}",
    "not utf-8": b'{"job_id": "\xff\xfe"}',
    "nul bytes": b"\x00" * 64,
    "wrong types": b'{"job_id": ["job-1"], "training_id": 5, "pre_deduct_id": {}, "selected_cost": "dear"}',
    "10 MB": b'{"x": "' + b"y" * 10_000_000 + b'"}',
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_reply_is_an_invalid_reply(facing: Facing, kind: str) -> None:
    async with facing(always(200, HOSTILE[kind])) as (server, calls):
        for name, call in calls.items():
            with pytest.raises(OutsideFailure) as raised:
                await call()
            assert (name, raised.value.code) == (name, F.REPLY_INVALID)
            assert server.url in raised.value.sentence
            assert len(raised.value.sentence) < 1_500
            assert raised.value.sentence.isprintable()


GOOD_REPLY: dict[str, Any] = {
    "job_id": "job-1",
    "job_status": "queued",
    "training_id": "training-1",
    "training_status": "queued",
    "pre_deduct_id": "hold-1",
    "ledger_id": "ledger-1",
    "gpu_hours": 1.5,
    **dict.fromkeys(("estimated_cost", "selected_cost", "frozen_amount", "change", "balance", "frozen"), 24),
}
ABOUT_POINTS = ["submit_job", "estimate", "pre_deduct", "commit", "charge", "balance"]
ABOUT_IDS = [*(name for name in COMFYUI_CALLS if name not in LISTS), "pre_deduct", "commit", "cancel_hold", "charge"]


@pytest.mark.parametrize("call", [*ABOUT_IDS, "estimate", "balance"])
async def test_the_reply_that_the_next_tests_corrupt_is_valid(facing: Facing, call: str) -> None:
    async with facing(always(200, GOOD_REPLY)) as (_, calls):
        assert (await calls[call]()).reply is not None


@pytest.mark.parametrize("call", ABOUT_POINTS)
async def test_points_that_are_no_whole_number_are_an_invalid_reply(facing: Facing, call: str) -> None:
    values: list[Any] = [23.5, True, None, [], {}, "dear", 10**18, -(10**18)]
    for value in values:
        spoilt = {name: value if points == 24 else points for name, points in GOOD_REPLY.items()}
        async with facing(always(200, spoilt)) as (_, calls):
            with pytest.raises(OutsideFailure) as raised:
                await calls[call]()
        assert (value, raised.value.code) == (value, F.REPLY_INVALID)


@pytest.mark.parametrize("call", ABOUT_IDS)
async def test_an_id_that_no_path_can_hold_is_an_invalid_reply(facing: Facing, call: str) -> None:
    for value in ("a/../b", "..", "", "a\nb", "x" * 129, "a\ud800", "a\x00", "ü", "a b", "a%2fb", 5, None, ["job-1"]):
        spoilt = {name: value if name.endswith("_id") else good for name, good in GOOD_REPLY.items()}
        async with facing(always(200, spoilt)) as (_, calls):
            with pytest.raises(OutsideFailure) as raised:
                await calls[call]()
        assert (value, raised.value.code) == (value, F.REPLY_INVALID)


@pytest.mark.parametrize("call", ["submit_job", "create_training", "estimate", "pre_deduct", "commit"])
async def test_a_negative_amount_is_an_invalid_reply(facing: Facing, call: str) -> None:
    amounts = {"estimated_cost": -1, "selected_cost": -1, "frozen_amount": -1, "gpu_hours": -1}
    ids = {"job_id": "job-1", "training_id": "training-1", "pre_deduct_id": "hold-1"}
    async with facing(always(200, amounts | ids)) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls[call]()
    assert raised.value.code is F.REPLY_INVALID


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_a_redirect_is_not_followed(facing: Facing, status: int) -> None:
    async with facing(always(status, b"", {"location": "/elsewhere"})) as (server, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["pre_deduct"]()
        assert [request.target for request in server.seen] == ["/api/v1/credits/pre-deduct"]
    assert raised.value.code is F.REPLY_INVALID
    assert "redirect" in raised.value.sentence


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        ("get_job", {"job_id": "job-2", "job_status": "queued"}),
        ("cancel_job", {"job_id": "job-2", "job_status": "queued"}),
        ("get_training", {"training_id": "training-2", "training_status": "queued"}),
        ("start_training", {"training_id": "training-2", "training_status": "queued"}),
        ("cancel_training", {"training_id": "training-2", "training_status": "queued"}),
        ("commit", {"pre_deduct_id": "hold-2", "frozen_amount": 24}),
        ("cancel_hold", {"pre_deduct_id": "hold-2", "status": "cancelled"}),
    ],
)
async def test_an_answer_about_another_id_is_an_invalid_reply(facing: Facing, call: str, reply: dict[str, Any]) -> None:
    async with facing(always(200, reply)) as (_, calls):
        with pytest.raises(OutsideFailure, match=r"is '(\w+)-2', expected '\1-1'") as raised:
            await calls[call]()
    assert raised.value.code is F.REPLY_INVALID


async def test_unclean_text_is_repaired_and_what_only_informs_costs_nothing(facing: Facing) -> None:
    state = {
        "job_id": "job-1",
        "job_status": "processing",
        "stage_progress": 400,
        "next_eta": "tomorrow",
        "queue_position": "many",
        "error_details": {"code": "node_error", "message": "bad \x00 text \ud800"},
        "unknown": {"field": 1},
    }
    async with facing(always(200, state)) as (_, calls):
        answer = await calls["get_job"]()
    assert answer.reply is not None
    assert answer.reply.stage_progress == 100
    assert answer.reply.next_eta is None
    assert answer.reply.error_details.message == "bad \ufffd text \ufffd"


async def test_no_part_of_a_reply_is_in_a_failure(facing: Facing) -> None:
    """Replies may repeat prompts, and failures stay in histories."""
    async with facing(always(200, {"job_id": "job 1 with a secret prompt", "job_status": "secret"})) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["get_job"]()
    assert "secret" not in raised.value.sentence
    assert raised.value.__cause__ is None


async def test_a_compressed_bomb_is_not_unpacked(facing: Facing) -> None:
    async def answer(request: Seen, writer: asyncio.StreamWriter) -> None:
        assert request.headers["accept-encoding"] == "identity"
        writer.write(http_bytes(200, b"\x1f\x8b" + b"\x00" * 1_000, {"content-encoding": "gzip"}))

    async with facing(answer) as (_, calls):
        with pytest.raises(OutsideFailure) as raised:
            await calls["get_job"]()
    assert raised.value.code is F.REPLY_INVALID


async def test_an_endless_body_is_cut() -> None:
    sent = 0

    async def pour(request: Seen, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            await writer.drain()
            sent += 65_536

    async with serving(pour) as server, CreditsClient(server.url, tokens()) as client:
        with pytest.raises(OutsideFailure, match="a body of more than 1048576 bytes") as raised:
            await client.estimate(estimate_post())
    assert raised.value.code is F.REPLY_INVALID
    assert sent < 16 * 1024 * 1024, "the rest was not waited for"
