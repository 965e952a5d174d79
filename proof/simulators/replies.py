"""What a simulator answers: replies, and the refusals of contract §2 and §4 with their statuses and codes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from comfyui_temporal.contracts.errors import COMFYUI_ERRORS, CREDITS_ERRORS, ErrorDetails

_STATUSES: Final[dict[str, int]] = {
    "payload_invalid": 422,
    "job_refused": 422,
    "template_not_found": 404,
    "job_not_found": 404,
    "training_not_found": 404,
    "authorization_missing": 403,
    "scope_denied": 403,
    "authorization_daily_limit": 403,
    "daily_quota_exceeded": 403,
    "authorization_not_found": 404,
    "authorization_revoked": 403,
    "authorization_expired": 403,
    "authorization_quota_exceeded": 403,
    "insufficient_balance": 403,
    "idempotency_conflict": 409,
    "pre_deduct_not_found": 404,
    "pre_deduct_already_processed": 409,
    "hold_insufficient": 409,
    "amount_invalid": 422,
    "amount_limit_exceeded": 422,
    "account_not_found": 404,
    "rate_limited": 429,
    "estimate_rate_limited": 429,
    "charge_rate_limited": 429,
    "pricing_unavailable": 503,
    "ledger_unavailable": 503,
}
_ROWS: Final = {row.message: row for row in (*CREDITS_ERRORS, *COMFYUI_ERRORS)}
"""Both have `template_not_found`; ComfyUI's is used: the simulated credits service knows every template."""


@dataclass(frozen=True)
class Reply:
    """An answer: status and JSON body."""

    status: int
    body: Any


@dataclass
class Refused(Exception):
    """A refusal by name. `status` and `code` only where a route differs from the table (contract §4, field)."""

    message: str
    fields: list[str] = field(default_factory=list)
    error_details: ErrorDetails | None = None
    status: int | None = None
    code: str | None = None

    def reply(self) -> Reply:
        row = _ROWS[self.message]
        detail: dict[str, Any] = {"code": self.code or row.code, "message": self.message}
        if self.fields:
            detail["fields"] = self.fields
        if self.error_details is not None:
            detail["error_details"] = self.error_details.model_dump(mode="json")
        return Reply(self.status or _STATUSES[self.message], {"detail": detail})


class Unauthenticated(Exception):
    """No token, or one that is not ours or has ended: 401, never kept under a key."""

    def reply(self) -> Reply:
        return Reply(401, {"detail": {"code": "40101", "message": f"token_invalid: {self}"}})


Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], body: Any) -> Model:
    """The body as `model`, types taken strictly. Raises Refused `payload_invalid` with a line for each bad field."""
    try:
        return model.model_validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        raise Refused("payload_invalid", fields=field_lines(error)) from None


def field_lines(error: ValidationError) -> list[str]:
    """`hyperparameters.epochs: Input should be …`, one line a field."""
    return [f"{'.'.join(str(part) for part in e['loc']) or 'body'}: {e['msg']}" for e in error.errors()]
