"""The bridge's HTTP replies, and the refusals of contract §2 by name."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from comfyui_temporal.contracts.errors import COMFYUI_ERRORS, ErrorDetails, sentences_of
from comfyui_temporal.contracts.permissions import TokenClaims

_STATUSES: Final[dict[str, int]] = {
    "payload_invalid": 422,
    "job_refused": 422,
    "template_not_found": 404,
    "job_not_found": 404,
    "training_not_found": 404,
    "authorization_missing": 403,
    "idempotency_conflict": 409,
    "rate_limited": 429,
}
_ROWS: Final = {row.message: row for row in COMFYUI_ERRORS}
RETRY_AFTER_SECONDS: Final = 2


@dataclass(frozen=True)
class Reply:
    """An answer: status, JSON body, headers."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One request as an action sees it; `run_id` is the id in its path."""

    path: str
    body: Any
    claims: TokenClaims
    key: str
    run_id: str = ""


Action = Callable[[Call], Awaitable[Reply]]


@dataclass
class Refused(Exception):
    """A definite refusal, by its name in contract §2. `fields` has one message for each wrong field."""

    message: str
    fields: list[str] = field(default_factory=list)
    error_details: ErrorDetails | None = None
    """Of `job_refused`: the error that the task fails with."""

    def reply(self) -> Reply:
        detail: dict[str, Any] = {"code": _ROWS[self.message].code, "message": self.message}
        if self.fields:
            detail["fields"] = self.fields
        if self.error_details is not None:
            detail["error_details"] = self.error_details.model_dump(mode="json", exclude_none=True)
        return Reply(_STATUSES[self.message], {"detail": detail})


@dataclass
class Unanswered(Exception):
    """No answer now. Nothing is stored and the same request may be repeated. `reason` is shown to the caller."""

    status: int
    reason: str

    def reply(self) -> Reply:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 503 else {}
        return Reply(self.status, {"detail": self.reason}, headers)


class Unauthenticated(Exception):
    """The token is missing, expired or not signed for this system."""

    def reply(self) -> Reply:
        return Reply(401, {"detail": {"code": "40101", "message": f"token_invalid: {self}"}})


Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], body: Any) -> Model:
    """Parse the body as `model`, with strict types. Raises Refused `payload_invalid`."""
    try:
        return model.model_validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        raise Refused("payload_invalid", fields=sentences_of(error)) from None
