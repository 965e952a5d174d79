"""The gateway's problem documents, and failures on the way to it → `TaskError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httpx
from pydantic import ValidationError

from comfyui_temporal.client.errors import (
    AccessDenied,
    CreditsRefused,
    GatewayUnavailable,
    InvalidInput,
    TaskError,
    TaskExists,
    TaskOver,
    TemporalUnavailable,
    UnexpectedReply,
    UnknownTask,
    WorkerUnavailable,
)
from comfyui_temporal.contracts.fields import OwnModel

_ERROR_OF_CODE: Final[dict[str, type[TaskError]]] = {
    "input_invalid": InvalidInput,
    "cursor_invalid": InvalidInput,
    "too_large": InvalidInput,
    "unauthenticated": AccessDenied,
    "not_authorized": AccessDenied,
    "task_unknown": UnknownTask,
    "dataset_invalid": InvalidInput,
    "file_unsupported": InvalidInput,
    "upload_unknown": InvalidInput,
    "upload_expired": InvalidInput,
    "uploads_not_offered": InvalidInput,
    "task_exists": TaskExists,
    "task_conflict": TaskExists,
    "task_over": TaskOver,
    "temporal_unavailable": TemporalUnavailable,
    "worker_unavailable": WorkerUnavailable,
}
_RETRIED_STATUSES: Final = frozenset({408, 425, 429})


class _FieldProblem(OwnModel):
    field: str
    message: str


class _Problem(OwnModel):
    """The members of a problem document (RFC 9457) that are used; others are ignored."""

    code: str
    detail: str
    fields: list[_FieldProblem] = []


@contextmanager
def typed_transport_errors(url: httpx.URL) -> Iterator[None]:
    """Inside, transport errors become GatewayUnavailable."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError) as error:
        where = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
        # What h11 says of a request that it cannot send repeats its headers, and so the token.
        is_quotable = not isinstance(error, httpx.LocalProtocolError)
        cause = (str(error) if is_quotable else "") or type(error).__name__
        raise GatewayUnavailable(f"The gateway at {where} does not answer: {cause}.") from None


def task_error(response: httpx.Response, task_id: str | None) -> TaskError:
    """The error for an answer other than 2xx, by its code, else by its status."""
    status = response.status_code
    try:
        problem = _Problem.model_validate_json(response.content)
    except ValidationError:
        problem = _Problem(code="", detail=f"The gateway answered {status} without a reason.")
    if status == httpx.codes.PAYMENT_REQUIRED:
        return CreditsRefused(problem.detail, code=problem.code or None)
    kind = _ERROR_OF_CODE.get(problem.code)
    if kind is TaskExists:
        return TaskExists(task_id or "", code=problem.code)
    if kind is InvalidInput:
        fields = {one.field: one.message for one in problem.fields}
        return InvalidInput(problem.detail, code=problem.code, fields=fields)
    if kind is None:
        kind = GatewayUnavailable if status >= 500 or status in _RETRIED_STATUSES else _by_status(status)
    return kind(problem.detail, code=problem.code or None)


def _by_status(status: int) -> type[TaskError]:
    return AccessDenied if status in (401, 403) else UnexpectedReply
