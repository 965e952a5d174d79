"""What an answer means (contract §2, §4): the reply, a definite refusal, *not offered*, or a failure that is retried.

Checked in this order:
1. 2xx: the reply's model, or `reply_invalid`.
2. An error body of the contract's shape: by message, then by number. Definite → `Refusal`; else → retried.
3. Without such a body, on a route marked (ours): 404, 405, 501 → not offered.
4. 401, 403, 408, 425, 429, 5xx → retried; the rest → `reply_invalid`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from activities.outside_http import MAX_REPLY_BYTES, OutsideFailure, OutsideHttp, RawReply, Route
from comfyui_temporal.contracts.comfyui import OutsideDetails
from comfyui_temporal.contracts.errors import (
    JOB_CODES,
    RETRIED_STATUSES,
    Answer,
    ErrorDetails,
    FailureCode,
    Refusal,
    WireError,
)
from comfyui_temporal.contracts.fields import repaired, shortened
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json

Reply = TypeVar("Reply")

MAX_RETRY_AFTER_SECONDS: Final = 60.0
NOT_OFFERED_STATUSES: Final = frozenset({404, 405, 501})
_details_adapter: Final[TypeAdapter[ErrorDetails | None]] = TypeAdapter(OutsideDetails | None)


class ErrorBody(NamedTuple):
    """`detail` of an error body, read tolerantly: one malformed field never hides the message that decides."""

    message: str
    number: str
    fields: list[str]
    error_details: ErrorDetails | None


def read_answer(
    http: OutsideHttp,
    route: Route,
    raw: RawReply,
    model: type[Reply] | TypeAdapter[Reply],
    *,
    check: Callable[[Reply], str | None] = lambda _: None,
) -> Answer[Reply]:
    """Map a raw reply to an answer.

    `check` names a contradiction in a well-formed reply (another id than requested), or None. Raises OutsideFailure.
    """
    if 200 <= raw.status < 300:
        return Answer(reply=_reply(http, route, raw, model, check))
    error_body = read_error_body(raw.body)
    if error_body is not None:
        row = classify(http, route, error_body)
        if row is not None and row.definite:
            return Answer(refusal=_refusal(http, route, raw, row, error_body))
        if row is not None:
            raise _retried(http, route, raw, row, error_body)
    elif route.is_ours and raw.status in NOT_OFFERED_STATUSES:
        return Answer(not_offered=True)
    raise _unrecognised(http, route, raw, error_body)


def read_error_body(body: bytes) -> ErrorBody | None:
    """`{"detail": {"code", "message"}}`, or None if the body has another shape. Raises nothing."""
    try:
        value = read_json(body, max_bytes=MAX_REPLY_BYTES)
    except UnreadableJson:
        return None
    detail = value.get("detail") if isinstance(value, dict) else None
    if not isinstance(detail, dict):
        return None
    message, number = _text(detail.get("message")), _text(detail.get("code"))
    if not message and not number:
        return None
    fields = detail.get("fields")
    return ErrorBody(
        message=message,
        number=number,
        fields=[text for text in map(_text, fields) if text][:5] if isinstance(fields, list) else [],
        error_details=_details(detail.get("error_details")),
    )


def classify(http: OutsideHttp, route: Route, body: ErrorBody) -> WireError | None:
    """The row of contract §2 or §4 that an error body matches: by message, then by number; None for neither."""
    party = http.party
    if body.message in party.errors:
        return party.errors[body.message]
    message = route.messages_by_number.get(body.number) or party.messages_by_number.get(body.number)
    return party.errors[message] if message else None


def read_retry_after(raw: RawReply) -> float | None:
    """The seconds in `Retry-After`, 0 to 60; None if it is absent or unreadable."""
    text = raw.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max((at - datetime.now(UTC)).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)


def _reply(
    http: OutsideHttp,
    route: Route,
    raw: RawReply,
    model: type[Reply] | TypeAdapter[Reply],
    check: Callable[[Reply], str | None],
) -> Reply:
    adapter = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    try:
        reply = adapter.validate_python(read_json(raw.body, max_bytes=MAX_REPLY_BYTES))
    except UnreadableJson as error:
        _refuse_reply(http, route, raw, str(error))
    except (ValidationError, RecursionError) as error:
        _refuse_reply(http, route, raw, _first_problem(error))
    problem = check(reply)
    if problem:
        _refuse_reply(http, route, raw, problem)
    return reply


def _refuse_reply(http: OutsideHttp, route: Route, raw: RawReply, problem: str) -> NoReturn:
    raise http.reply_invalid(route, f"HTTP {raw.status}, {_kind_of(raw)}, {problem}") from None


def _first_problem(error: Exception) -> str:
    """Where and what is wrong, never the value: replies may repeat a prompt, and failures are kept in histories."""
    if not isinstance(error, ValidationError):
        return "it is nested too deep"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole body"
    return shortened(f"{where}: {first['msg']}", 300)


def _refusal(http: OutsideHttp, route: Route, raw: RawReply, row: WireError, body: ErrorBody) -> Refusal:
    code, advice = row.failure, row.advice
    details = body.error_details if row.message == "job_refused" else None
    if details is not None:
        code = _job_code(details)
        advice = f"{details.code}: {details.message}"
    named = f" ({'; '.join(body.fields)})" if body.fields else ""
    return Refusal(
        code=code,
        message=row.message,
        http_status=raw.status,
        wire_code=body.number,
        error_details=details,
        sentence=shortened(f"{http.party.name} refused {route}: {row.message}{named}. {advice}"),
    )


def _job_code(details: ErrorDetails) -> FailureCode:
    return FailureCode(details.code) if details.code in JOB_CODES else FailureCode.INTERNAL


def _retried(http: OutsideHttp, route: Route, raw: RawReply, row: WireError, body: ErrorBody) -> OutsideFailure:
    return OutsideFailure(
        row.failure,
        f"{http.party.name} at {http.address} cannot take {route} now: {row.message} (HTTP {raw.status}). {row.advice}",
        retry_after_seconds=read_retry_after(raw),
    )


def _unrecognised(http: OutsideHttp, route: Route, raw: RawReply, body: ErrorBody | None) -> OutsideFailure:
    """`body`: an error body of the contract's shape with an unknown message and number."""
    retry_after = read_retry_after(raw)
    message = f" and says {f'{body.number} {body.message}'.strip()}" if body is not None else ""
    if raw.status == 401 or (raw.status == 403 and body is None):
        reason = f"HTTP {raw.status}: our token was not accepted; check secret, issuer, audience and both sides' clocks"
        return http.unavailable(route, reason, retry_after_seconds=retry_after)
    if raw.status in RETRIED_STATUSES or raw.status >= 500:
        return http.unavailable(route, f"HTTP {raw.status}{message}", retry_after_seconds=retry_after)
    what = "a redirect, which is not followed" if 300 <= raw.status < 400 else _kind_of(raw)
    return http.reply_invalid(route, f"HTTP {raw.status}, {what}{message}", retry_after_seconds=retry_after)


def _kind_of(raw: RawReply) -> str:
    if not raw.body:
        return "no body"
    kind = raw.headers.get("content-type", "").split(";")[0].strip().lower()
    named = kind if kind.isascii() and kind.isprintable() and len(kind) <= 64 else ""
    return named or "no content type"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return shortened(repaired(str(value)), 300)


def _details(value: Any) -> ErrorDetails | None:
    try:
        return _details_adapter.validate_python(value)
    except ValidationError:
        return None
