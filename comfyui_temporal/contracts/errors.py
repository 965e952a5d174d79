"""Every failure has one name.

    Failure (a sentence, a code, retryable or not)
    ├── FailureCode          our own failures and ComfyUI's, contract §1: what a task ends with
    └── WIRE_ERRORS          each error body of contract §2 and §4 → exactly one FailureCode

A definite refusal is an *answer* (`Refusal`): workflows decide by it and never retry it under the same key. Everything
else (silence, 429, 5xx, an unreadable body) is an `OutsideFailure` that an activity raises and Temporal retries.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Generic, TypeVar

from pydantic import Field, ValidationError

from comfyui_temporal.contracts.fields import OutsideModel, OutsideName, OutsideText, OwnModel
from comfyui_temporal.contracts.lives import READ_THE_LEDGER, TASK_ENDED, EarlierLife


class FailureCode(StrEnum):
    """Stable codes (contract §1): the type of the `ApplicationError` that a failed run ends with."""

    GPU_PREEMPTED = "gpu_preempted"
    LOST = "lost"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    NODE_ERROR = "node_error"
    WORKFLOW_INVALID = "workflow_invalid"
    MODEL_MISSING = "model_missing"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    INTERNAL = "internal"

    INPUT_INVALID = "input_invalid"
    TASK_EXISTS = "task_exists"
    TASK_CONFLICT = "task_conflict"
    INSUFFICIENT_BALANCE = "insufficient_balance"
    NOT_AUTHORIZED = "not_authorized"
    QUOTA_EXCEEDED = "quota_exceeded"
    PRICE_MISMATCH = "price_mismatch"
    PRICE_NOT_CONFIRMED = "price_not_confirmed"
    CREDIT_EXHAUSTED = "credit_exhausted"
    GPU_UNAVAILABLE = "gpu_unavailable"
    DATASET_INVALID = "dataset_invalid"
    COMFYUI_UNAVAILABLE = "comfyui_unavailable"
    CREDITS_UNAVAILABLE = "credits_unavailable"
    REPLY_INVALID = "reply_invalid"


JOB_CODES: Final = frozenset(
    {
        FailureCode.GPU_PREEMPTED,
        FailureCode.LOST,
        FailureCode.GPU_OUT_OF_MEMORY,
        FailureCode.NODE_ERROR,
        FailureCode.WORKFLOW_INVALID,
        FailureCode.MODEL_MISSING,
        FailureCode.CANCELLED,
        FailureCode.TIMEOUT,
        FailureCode.INTERNAL,
    }
)
"""The codes that `error_details` may carry."""
ALWAYS_RETRIED: Final = frozenset({FailureCode.GPU_PREEMPTED, FailureCode.LOST})
RETRIED_IF_SAID: Final = frozenset({FailureCode.INTERNAL})


class ExceptionCode(StrEnum):
    """Codes of exception records, which end no task: for operators (contract §4, §6)."""

    SHORTFALL = "shortfall"
    SETTLEMENT_UNKNOWN = "settlement_unknown"
    SETTLEMENT_CORRECTED = "settlement_corrected"
    HOLD_DOUBLED = "hold_doubled"
    UNDO_UNFINISHED = "undo_unfinished"
    HOLD_LEFT_TO_EXPIRY = "hold_left_to_expiry"
    COST_ABOVE_HOLD = "cost_above_hold"
    PRICES_DIFFER = "prices_differ"
    UNCOVERED = "uncovered"
    QUEUE_SLA_MISSED = "queue_sla_missed"
    ROUTE_NOT_OFFERED = "route_not_offered"


HOLD_NAMELESS: Final = "hold_doubled:nameless"
"""Key of the `hold_doubled` record of holds without an id: however they are found, in whichever life, once a task."""
HOLD_OUT_OF_SIGHT: Final = "hold_doubled:out_of_sight"
"""Key of the `undo_unfinished` record that says: the ledger does not show whether a hold is doubled."""


class ErrorDetails(OutsideModel):
    """How a job or training failed (contract §1 `error_details`).

    `code` is kept unchanged: an unknown one is retried only if `retryable` is true.
    """

    code: OutsideName = FailureCode.INTERNAL.value
    message: OutsideText = ""
    retryable: bool = False
    node: OutsideName | None = None

    def may_be_retried(self) -> bool:
        """Whether another attempt may succeed (contract §1)."""
        if self.code in ALWAYS_RETRIED:
            return True
        if self.code in JOB_CODES and self.code not in RETRIED_IF_SAID:
            return False
        return self.retryable


class RefusalKind(StrEnum):
    """The refusals that workflows decide by, named by their `message`."""

    HOLD_NOT_FOUND = "pre_deduct_not_found"
    HOLD_ALREADY_RESOLVED = "pre_deduct_already_processed"
    HOLD_TOO_SMALL = "hold_insufficient"
    KEY_CONFLICT = "idempotency_conflict"
    TASK_ENDED = TASK_ENDED
    READ_THE_LEDGER = READ_THE_LEDGER
    OTHER = "other"


class Refusal(OwnModel):
    """A definite refusal by another service: the same request would be refused again."""

    code: FailureCode
    """The code that a task ends with if this refusal ends it."""
    message: str
    """The service's own word, e.g. `insufficient_balance` (contract §4). Rules use `kind` and `code`."""
    http_status: int
    wire_code: str = ""
    error_details: ErrorDetails | None = None
    """The job's own, of `job_refused` alone."""
    sentence: str
    """For operators and callers: what was refused, by which service, what to do."""

    @property
    def kind(self) -> RefusalKind:
        return _KINDS.get(self.message, RefusalKind.OTHER)


_KINDS: Final = {kind.value: kind for kind in RefusalKind}


class UnreadableReply(Refusal):
    """Not a refusal by the service: its answers stayed unreadable for 15 minutes, and it may have taken effect."""

    code: FailureCode = FailureCode.REPLY_INVALID
    message: str = "unreadable"
    http_status: int = 0


class WireError(OwnModel):
    """One row of the tables in contract §2 and §4."""

    message: str
    code: str
    failure: FailureCode
    definite: bool = True
    """False: the key is free again, and the same request is retried (429, unavailable)."""
    advice: str = ""


def _row(message: str, code: str, failure: FailureCode, advice: str, *, definite: bool = True) -> WireError:
    return WireError(message=message, code=code, failure=failure, definite=definite, advice=advice)


_F = FailureCode
_CORRECT: Final = "The caller has to correct the field that the message names."
_SCOPE: Final = (
    "The operator has to make the service accept our service token: both need the same secret "
    "(COMFYUI_TEMPORAL_SERVICE_SECRET), issuer and audience, and the service must allow the scope of this call."
)
_NEW_KEY: Final = "The caller has to use a new task_id: another request used this task's key."
_WAITED: Final = "No action is needed yet: it is retried; if it lasts, the operator has to look at the service."
_LOOKED_UP: Final = "No action is needed: the ledger is checked."
COMFYUI_ERRORS: Final[tuple[WireError, ...]] = (
    _row("payload_invalid", "42201", _F.INPUT_INVALID, _CORRECT),
    _row("template_not_found", "40402", _F.INPUT_INVALID, "The caller has to use a template that ComfyUI offers."),
    _row("job_refused", "42202", _F.INTERNAL, "The caller has to read error_details: the server refused the job."),
    _row("job_not_found", "40401", _F.LOST, "No action is needed: the server no longer knows the job."),
    _row("training_not_found", "40401", _F.LOST, "No action is needed: the server no longer knows the training."),
    _row("authorization_missing", "40302", _F.NOT_AUTHORIZED, _SCOPE),
    _row("idempotency_conflict", "40901", _F.TASK_CONFLICT, _NEW_KEY),
    _row("rate_limited", "42901", _F.COMFYUI_UNAVAILABLE, _WAITED, definite=False),
)
CREDITS_ERRORS: Final[tuple[WireError, ...]] = (
    _row("payload_invalid", "42201", _F.INPUT_INVALID, _CORRECT),
    _row(
        "template_not_found",
        "40401",
        _F.INPUT_INVALID,
        "The caller has to use a template that has a price, or the credits service's operator has to give it one.",
    ),
    _row(
        "insufficient_balance",
        "40302",
        _F.INSUFFICIENT_BALANCE,
        "The tenant's administrator has to top the balance up; then the caller starts a new task.",
    ),
    _row("scope_denied", "40301", _F.NOT_AUTHORIZED, _SCOPE),
    _row("authorization_missing", "40302", _F.NOT_AUTHORIZED, _SCOPE),
    _row(
        "authorization_not_found",
        "40401",
        _F.NOT_AUTHORIZED,
        "The tenant's administrator has to authorise the tenant for this template.",
    ),
    _row(
        "authorization_revoked",
        "40302",
        _F.NOT_AUTHORIZED,
        "The tenant's administrator has to restore the tenant's right to this template: it was revoked.",
    ),
    _row(
        "authorization_expired",
        "40302",
        _F.NOT_AUTHORIZED,
        "The tenant's administrator has to renew the tenant's right to this template.",
    ),
    _row(
        "authorization_quota_exceeded",
        "40302",
        _F.QUOTA_EXCEEDED,
        "The tenant's administrator has to raise the template's quota, or the caller waits for the next one.",
    ),
    _row(
        "authorization_daily_limit",
        "40302",
        _F.QUOTA_EXCEEDED,
        "The caller has to wait for the next day, or the tenant's administrator raises this template's limit.",
    ),
    _row(
        "daily_quota_exceeded",
        "40303",
        _F.QUOTA_EXCEEDED,
        "The caller has to wait for the next day, or the tenant's administrator raises the daily quota.",
    ),
    _row("idempotency_conflict", "40901", _F.TASK_CONFLICT, _NEW_KEY),
    _row("pre_deduct_not_found", "40401", _F.REPLY_INVALID, f"{_LOOKED_UP} The service knows no such hold."),
    _row("pre_deduct_already_processed", "40901", _F.REPLY_INVALID, f"{_LOOKED_UP} The hold was resolved before."),
    _row("hold_insufficient", "40902", _F.REPLY_INVALID, f"{_LOOKED_UP} The hold is smaller than the cost."),
    _row("amount_invalid", "42200", _F.REPLY_INVALID, "The operator has to compare prices: the amount is refused."),
    _row(
        "amount_limit_exceeded",
        "42201",
        _F.REPLY_INVALID,
        "The operator has to raise the service's limit to 2000 points.",
    ),
    _row(
        "account_not_found",
        "40401",
        _F.NOT_AUTHORIZED,
        "The tenant's administrator has to open an account: the credits service has none for this tenant and user.",
    ),
    _row("pricing_unavailable", "50301", _F.CREDITS_UNAVAILABLE, _WAITED, definite=False),
    _row("estimate_rate_limited", "42901", _F.CREDITS_UNAVAILABLE, _WAITED, definite=False),
    _row("charge_rate_limited", "42901", _F.CREDITS_UNAVAILABLE, _WAITED, definite=False),
    _row("ledger_unavailable", "50302", _F.CREDITS_UNAVAILABLE, _WAITED, definite=False),
)
CREDITS_CODES_BY_NUMBER: Final = {
    "40201": "insufficient_balance",
    "40301": "scope_denied",
    "40302": "authorization_missing",
    "40303": "daily_quota_exceeded",
    "40401": "pre_deduct_not_found",
    "40901": "idempotency_conflict",
    "40902": "hold_insufficient",
    "42200": "amount_invalid",
    "42201": "payload_invalid",
    "42901": "estimate_rate_limited",
    "50301": "pricing_unavailable",
    "50302": "ledger_unavailable",
}
"""Used only if the message is not in `CREDITS_ERRORS`: classify by message, then by code (contract §4)."""
COMFYUI_CODES_BY_NUMBER: Final = {
    "40302": "authorization_missing",
    "40401": "job_not_found",
    "40402": "template_not_found",
    "40901": "idempotency_conflict",
    "42201": "payload_invalid",
    "42202": "job_refused",
    "42901": "rate_limited",
}
RETRIED_STATUSES: Final = frozenset({401, 403, 408, 425, 429})
"""Retried without a recognised body, as is every 5xx; the rest is `reply_invalid` (contract §4)."""


class WireErrorDetail(OutsideModel):
    """`detail` of an error body: `{"code": "40302", "message": "insufficient_balance"}`."""

    code: OutsideText = ""
    message: OutsideText = ""
    error_details: ErrorDetails | None = None
    fields: list[OutsideText] = Field(default_factory=list)
    """(ours) What was wrong, field by field, with `payload_invalid`."""


class WireErrorBody(OutsideModel):
    """The error body of both services (contract §4)."""

    detail: WireErrorDetail


T = TypeVar("T")


class Answer(OwnModel, Generic[T]):
    """The outcome of a call: the reply, a definite refusal, or `not_offered`. Exactly one of the three.

    `not_offered`: the server lacks this (ours) route; recorded and treated as done (contract §2).
    """

    reply: T | None = None
    refusal: Refusal | None = None
    not_offered: bool = False
    earlier_life: EarlierLife | None = None
    """What the task's row knew at the time of the call; None if it has no earlier life."""
    tries: int = 1
    """How often it was sent, including this try: a service without idempotency may have acted each time."""


def sentences_of(error: ValidationError) -> list[str]:
    """A validation error, field by field: `prompt: Field required`. Values are left out, so no prompt reaches a log."""
    return [
        f"{'.'.join(str(part) for part in problem['loc']) or 'input'}: {problem['msg']}" for problem in error.errors()
    ][:20]
