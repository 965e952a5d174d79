"""Errors as `application/problem+json` (RFC 9457), each with one stable code and a sentence to act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from comfyui_temporal.contracts.fields import OwnModel, repaired, shortened
from gateway.safe_answers import HEADERS as SAFE_HEADERS

PROBLEM_JSON: Final = "application/problem+json"
MAX_FIELDS: Final = 20
MAX_NAME_BYTES: Final = 64
PROBLEM_STATE: Final = "problem_code"
"""Under this name a connection's state holds the code of the problem that it was answered with."""


class ProblemCode(StrEnum):
    """What can be wrong with a request. It uses contract §1's code if there is one."""

    INPUT_INVALID = "input_invalid"
    DATASET_INVALID = "dataset_invalid"
    CURSOR_INVALID = "cursor_invalid"
    UNAUTHENTICATED = "unauthenticated"
    NOT_AUTHORIZED = "not_authorized"
    TASK_UNKNOWN = "task_unknown"
    ROUTE_UNKNOWN = "route_unknown"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TASK_EXISTS = "task_exists"
    TASK_CONFLICT = "task_conflict"
    INSUFFICIENT_BALANCE = "insufficient_balance"
    QUOTA_EXCEEDED = "quota_exceeded"
    PRICE_MISMATCH = "price_mismatch"
    TASK_OVER = "task_over"
    ALREADY_CHARGED = "already_charged"
    SETTLEMENT_UNKNOWN = "settlement_unknown"
    STILL_ENDING = "still_ending"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    RATE_LIMITED = "rate_limited"
    INTERNAL = "internal"
    TEMPORAL_UNAVAILABLE = "temporal_unavailable"
    STORE_UNAVAILABLE = "store_unavailable"
    WORKER_UNAVAILABLE = "worker_unavailable"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    COMFYUI_UNAVAILABLE = "comfyui_unavailable"
    ROUTE_NOT_OFFERED = "route_not_offered"
    TOKENS_UNVERIFIABLE = "tokens_unverifiable"
    DRAINING = "draining"
    UPLOAD_UNKNOWN = "upload_unknown"
    UPLOAD_EXPIRED = "upload_expired"
    UPLOAD_OFFSET = "upload_offset"
    FILE_UNSUPPORTED = "file_unsupported"
    PROTOCOL_UNSUPPORTED = "protocol_unsupported"
    UPLOADS_NOT_OFFERED = "uploads_not_offered"


STATUS_OF: Final[dict[ProblemCode, int]] = {
    ProblemCode.INPUT_INVALID: 422,
    ProblemCode.DATASET_INVALID: 422,
    ProblemCode.CURSOR_INVALID: 400,
    ProblemCode.UNAUTHENTICATED: 401,
    ProblemCode.NOT_AUTHORIZED: 403,
    ProblemCode.TASK_UNKNOWN: 404,
    ProblemCode.ROUTE_UNKNOWN: 404,
    ProblemCode.METHOD_NOT_ALLOWED: 405,
    ProblemCode.TASK_EXISTS: 409,
    ProblemCode.TASK_CONFLICT: 409,
    ProblemCode.INSUFFICIENT_BALANCE: 402,
    ProblemCode.QUOTA_EXCEEDED: 402,
    ProblemCode.PRICE_MISMATCH: 402,
    ProblemCode.TASK_OVER: 409,
    ProblemCode.ALREADY_CHARGED: 409,
    ProblemCode.SETTLEMENT_UNKNOWN: 409,
    ProblemCode.STILL_ENDING: 409,
    ProblemCode.TOO_LARGE: 413,
    ProblemCode.TOO_SLOW: 408,
    ProblemCode.RATE_LIMITED: 429,
    ProblemCode.INTERNAL: 500,
    ProblemCode.TEMPORAL_UNAVAILABLE: 503,
    ProblemCode.STORE_UNAVAILABLE: 503,
    ProblemCode.WORKER_UNAVAILABLE: 503,
    ProblemCode.STORAGE_UNAVAILABLE: 503,
    ProblemCode.COMFYUI_UNAVAILABLE: 503,
    ProblemCode.ROUTE_NOT_OFFERED: 503,
    ProblemCode.TOKENS_UNVERIFIABLE: 503,
    ProblemCode.DRAINING: 503,
    ProblemCode.UPLOAD_UNKNOWN: 404,
    ProblemCode.UPLOAD_EXPIRED: 410,
    ProblemCode.UPLOAD_OFFSET: 409,
    ProblemCode.FILE_UNSUPPORTED: 415,
    ProblemCode.PROTOCOL_UNSUPPORTED: 412,
    ProblemCode.UPLOADS_NOT_OFFERED: 404,
}
RETRY_AFTER_SECONDS: Final = 2


class FieldProblem(OwnModel):
    """One invalid field, and what is allowed."""

    field: str
    message: str


class ProblemBody(OwnModel):
    """The body of every error."""

    type: str
    """`urn:comfyui-temporal:problem:{code}`."""
    title: str
    status: int
    code: ProblemCode
    detail: str
    """A sentence: what is wrong and what to do."""
    message: str
    """As `detail`, for clients that read `code` and `message`."""
    fields: list[FieldProblem] = []


class Problem(Exception):
    """Raised anywhere while a request is answered; becomes the answer."""

    def __init__(
        self,
        code: ProblemCode,
        detail: str,
        *,
        fields: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
        status: int | None = None,
    ) -> None:
        """`status`: default that of the code."""
        self.code = code
        self.status = status or STATUS_OF[code]
        self.detail = detail
        self.fields = list(fields)
        self.headers = dict(headers or {})
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
        super().__init__(detail)

    def response(self) -> JSONResponse:
        body = ProblemBody(
            type=f"urn:comfyui-temporal:problem:{self.code}",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            code=self.code,
            detail=self.detail,
            message=self.detail,
            fields=self.fields,
        )
        return JSONResponse(body.model_dump(mode="json"), self.status, headers=self.headers, media_type=PROBLEM_JSON)


def input_invalid(errors: Sequence[Any]) -> Problem:
    """pydantic's errors, field by field. The given value is never repeated: it may be a prompt."""
    fields: list[FieldProblem] = []
    for error in errors[:MAX_FIELDS]:
        place = [shortened(repaired(str(part)), MAX_NAME_BYTES) for part in error["loc"]]
        message = repaired(str(error["msg"])).removeprefix("Value error, ")
        fields.append(FieldProblem(field=".".join(place[1:]) or "".join(place) or "body", message=message))
    noun = "field is" if len(errors) == 1 else "fields are"
    return Problem(
        ProblemCode.INPUT_INVALID, f"Nothing was done: {len(errors)} {noun} invalid; see `fields`.", fields=fields
    )


def of_http_exception(error: HTTPException) -> Problem:
    """Maps the framework's own refusals."""
    match error.status_code:
        case 404:
            return Problem(ProblemCode.ROUTE_UNKNOWN, "There is no such route; see /openapi.json for the list.")
        case 405:
            return Problem(
                ProblemCode.METHOD_NOT_ALLOWED, "This route does not support this method.", headers=error.headers
            )
        case 408:
            return Problem(ProblemCode.TOO_SLOW, "The body did not arrive in time; send the request again.")
        case 413:
            return Problem(ProblemCode.TOO_LARGE, f"The body is too large for this route: {error.detail}.")
        case 429:
            return Problem(ProblemCode.RATE_LIMITED, error.detail, headers=error.headers)
        case status if status < 500:
            return Problem(ProblemCode.INPUT_INVALID, "The request cannot be read: its body must be one JSON object.")
        case _:
            return Problem(ProblemCode.INTERNAL, "The request could not be answered; try it again.")


def answer_with_problems(app: FastAPI) -> None:
    """Every refusal of the application becomes a problem document, over HTTP and in a WebSocket's handshake."""

    async def answer(connection: HTTPConnection, error: Exception) -> JSONResponse | None:
        problem = _problem_of(error)
        setattr(connection.state, PROBLEM_STATE, problem.code)
        response = problem.response()
        if isinstance(connection, WebSocket):
            await connection.send_denial_response(response)
            return None
        return response

    async def answer_unforeseen(_request: Request, _error: Exception) -> JSONResponse:
        # The framework answers outside all middleware here.
        problem = Problem(
            ProblemCode.INTERNAL, "The request could not be answered: this is a defect.", headers=SAFE_HEADERS
        )
        return problem.response()

    for kind in (Problem, RequestValidationError, WebSocketRequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, answer_unforeseen)


def _problem_of(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case RequestValidationError() | WebSocketRequestValidationError():
            return input_invalid(error.errors())
        case HTTPException():
            return of_http_exception(error)
    return Problem(ProblemCode.INTERNAL, "The request could not be answered: this is a defect.")


_RETRY_AFTER: Final = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_HEADERS_OF: Final[dict[int, dict[str, Any]]] = {
    401: {"WWW-Authenticate": {"description": "A Bearer challenge (RFC 6750).", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def problems(*codes: ProblemCode) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route's OpenAPI entry: every error that it may return, by status, with examples."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status = STATUS_OF[code]
        entry = by_status.setdefault(
            status,
            {
                "model": ProblemBody,
                "description": HTTPStatus(status).phrase,
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemBody"}, "examples": {}}},
                "headers": _HEADERS_OF.get(status, {}),
            },
        )
        entry["content"][PROBLEM_JSON]["examples"][code.value] = {
            "value": ProblemBody(
                type=f"urn:comfyui-temporal:problem:{code}",
                title=HTTPStatus(status).phrase,
                status=status,
                code=code,
                detail=(detail := _EXAMPLE_DETAIL.get(code, "What is wrong and what to do.")),
                message=detail,
            ).model_dump(mode="json")
        }
    return by_status


_EXAMPLE_DETAIL: Final = {
    ProblemCode.UNAUTHENTICATED: "A bearer token is needed: send it as `Authorization: Bearer …`.",
    ProblemCode.NOT_AUTHORIZED: "The token lacks the scope task.read.",
    ProblemCode.TASK_UNKNOWN: "There is no task image-3f9c of this tenant.",
    ProblemCode.TASK_EXISTS: "The task_id image-3f9c cannot be used with this input; nothing was started.",
    ProblemCode.INSUFFICIENT_BALANCE: "The task would cost 24 points and the balance is 3; nothing was submitted.",
    ProblemCode.ALREADY_CHARGED: "Task image-3f9c was delivered and charged: there is no hold left to give back.",
}
