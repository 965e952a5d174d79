"""The credits service's wire (contract §4). All amounts are whole points."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.fields import (
    Informative,
    Instant,
    NotKept,
    OutsideId,
    OutsideModel,
    OutsideName,
    OutsideText,
    OwnModel,
    Points,
    first_of,
)
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.size_budget import MAX_OPTIONS

MIN_HOLD_SECONDS = 60
MAX_HOLD_SECONDS = 3600
MAX_CHARGE_POINTS = 2000
CURRENCY = "point"
CHARGE_REASON = "delivered work whose hold had ended"
"""`reason` of all our charges: in a ledger without kinds it identifies an entry as ours (contract §4)."""


class EstimateRequest(OwnModel):
    """Body of `POST /api/v1/credits/estimate`. `resolution` holds the base model for `model.train`."""

    tenant_id: str
    user_id: str
    template_id: str
    scene: Scene
    resolution: str
    priority: TaskPriority
    extras: dict[str, int] = {}
    gpu_hours: float | None = None


class PriceOption(OutsideModel):
    """One of `options`: what each priority would cost, in points, and take, in minutes."""

    priority: TaskPriority
    total_cost: Points
    eta_minutes: Annotated[float | None, Informative] = None


class Estimate(OutsideModel):
    """Answer to estimate. Only `selected_cost` decides anything. Fields that are not shown are not kept."""

    currency: Annotated[OutsideName, NotKept] = CURRENCY
    template_id: Annotated[OutsideName | None, Informative, NotKept] = None
    scene: Annotated[Scene | None, Informative, NotKept] = None
    resolution: Annotated[OutsideName | None, Informative, NotKept] = None
    priority: Annotated[TaskPriority | None, Informative, NotKept] = None
    extras: Annotated[dict[OutsideName, Points] | None, Informative, NotKept] = None
    estimated_cost: Annotated[Points | None, Informative] = None
    selected_cost: Annotated[Points, Field(ge=0)]
    min_cost: Annotated[Points | None, Informative] = None
    max_cost: Annotated[Points | None, Informative] = None
    current_balance: Annotated[Points | None, Informative] = None
    suggest_topup: Annotated[Points | None, Informative] = None
    calculation_basis: Annotated[Any, Informative, NotKept] = None
    policy_tag: Annotated[OutsideName | None, Informative, NotKept] = None
    audit_id: Annotated[OutsideName | None, Informative, NotKept] = None
    options: Annotated[list[PriceOption] | None, first_of(MAX_OPTIONS), Informative] = None


class PreDeductRequest(OwnModel):
    """Body of `POST /api/v1/credits/pre-deduct`. `expire_in` in seconds, 60 to 3600."""

    task_id: str
    template_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    estimated_cost: int
    currency: str = CURRENCY
    expire_in: Annotated[int, Field(ge=MIN_HOLD_SECONDS, le=MAX_HOLD_SECONDS)]


class QuotaSnapshot(OutsideModel):
    """`quota_snapshot`: the template's quota, −1 for none, and how much of it the user has used."""

    template_quota: int = -1
    user_usage: int = 0


class HoldReply(OutsideModel):
    """Answer to pre-deduct and commit. After a commit `frozen_amount` is what was charged."""

    pre_deduct_id: OutsideId
    frozen_amount: Annotated[Points, Field(ge=0)]
    balance_after: Annotated[Points | None, Informative] = None
    quota_snapshot: Annotated[QuotaSnapshot | None, Informative] = None
    expire_at: Annotated[Instant | None, Informative] = None


class CommitRequest(OwnModel):
    """Body of `POST /api/v1/credits/commit`."""

    pre_deduct_id: str
    actual_cost: int
    task_id: str
    tenant_id: str
    template_id: str
    user_id: str


class CancelHoldRequest(OwnModel):
    """Body of `POST /api/v1/credits/cancel`."""

    pre_deduct_id: str
    tenant_id: str
    user_id: str
    reason: str


def _number_from_text(value: Any) -> Any:
    return (
        int(value) if isinstance(value, str) and value.lstrip("-").isascii() and value.lstrip("-").isdigit() else value
    )


class CancelHoldReply(OutsideModel):
    """Answer to cancel. `balance_after` comes as a string (field)."""

    pre_deduct_id: OutsideId
    status: OutsideName = ""
    reason: Annotated[OutsideText, NotKept] = ""
    balance_after: Annotated[Points | None, Informative, BeforeValidator(_number_from_text)] = None


class ChargeRequest(OwnModel):
    """Body of `POST /api/v1/credits/charge`; `amount` 1 to 2000 points."""

    tenant_id: str
    user_id: str
    template_id: str
    task_id: str
    amount: Annotated[int, Field(ge=1, le=MAX_CHARGE_POINTS)]
    priority: TaskPriority
    reason: str


class ChargeReply(OutsideModel):
    """Answer to charge."""

    ledger_id: OutsideId
    change: Points
    balance_after: Annotated[Points | None, Informative] = None
    reason: Annotated[OutsideText, NotKept] = ""
    created_at: Annotated[Instant | None, Informative, NotKept] = None


class Balance(OutsideModel):
    """`GET /api/v1/credits/balance`."""

    balance: Points
    frozen: Points
    currency: OutsideName = CURRENCY


class LedgerKind(StrEnum):
    GRANT = "grant"
    PRE_DEDUCT = "pre_deduct"
    COMMIT = "commit"
    CANCEL = "cancel"
    EXPIRE = "expire"
    CHARGE = "charge"


class LedgerReason(StrEnum):
    """`reason` in a ledger without kinds (field). A charge shows the reason of its request, ours `CHARGE_REASON`."""

    PRE_DEDUCT = "pre_deduct"
    REFUND = "refund_pre_deduct"
    COMMIT = "commit"
    CANCEL = "cancel"


class LedgerEntry(OutsideModel):
    """One entry: `change` is its effect on `balance`, `frozen_change` on `frozen` (ours; null if not given)."""

    ledger_id: OutsideId
    task_id: OutsideName | None = None
    change: Points
    balance_after: Annotated[Points | None, Informative, NotKept] = None
    reason: OutsideName = ""
    created_at: Annotated[Instant | None, Informative, NotKept] = None
    kind: Annotated[LedgerKind | None, Informative] = None
    pre_deduct_id: Annotated[OutsideId | None, Informative] = None
    frozen_change: Annotated[Points | None, Informative] = None


def _each_readable(entries: Any) -> Any:
    """An unreadable entry hides none of the others: it stays as an empty entry of its task."""
    return [_readable(entry) for entry in entries] if isinstance(entries, list) else entries


def _readable(entry: Any) -> LedgerEntry:
    try:
        return LedgerEntry.model_validate(entry)
    except ValidationError:
        task_id = entry.get("task_id") if isinstance(entry, dict) else None
        return LedgerEntry(ledger_id="unreadable", task_id=task_id if isinstance(task_id, str) else None, change=0)


class Ledger(OutsideModel):
    """`GET /api/v1/credits/ledger`: newest first. `cursor` leads to the next page, null at the end (ours)."""

    entries: Annotated[list[LedgerEntry], BeforeValidator(_each_readable)]
    cursor: Annotated[OutsideText | None, Informative] = None
