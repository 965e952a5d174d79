"""The credits service, exactly by contract §4: keys compared by body, holds resolved once, a ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from comfyui_temporal.contracts.calls import LedgerQuery, Post
from comfyui_temporal.contracts.credits import (
    CancelHoldReply,
    CancelHoldRequest,
    ChargeReply,
    ChargeRequest,
    CommitRequest,
    Estimate,
    EstimateRequest,
    HoldReply,
    Ledger,
    LedgerEntry,
    LedgerKind,
    LedgerReason,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import CREDITS_ERRORS, Answer, Refusal
from comfyui_temporal.contracts.fields import OwnModel
from proof.simulation.timeline import Timeline

_ROWS: Final = {row.message: row for row in CREDITS_ERRORS}
Body = TypeVar("Body", bound=OwnModel)


def refused(message: str) -> Answer[Any]:
    """A definite refusal by contract §4's table."""
    row = _ROWS[message]
    return Answer(
        refusal=Refusal(
            code=row.failure, message=message, http_status=409, wire_code=row.code, sentence=f"Refused: {message}."
        )
    )


@dataclass
class Hold:
    """One hold; granted `amount` and requested `asked` in points; `phase` open, committed, cancelled or expired."""

    pre_deduct_id: str
    task_id: str
    key: str
    amount: int
    asked: int
    taken_at: float
    expires_at: float
    phase: str = "open"
    charged: int = 0
    cancelled_by_operator_at: float | None = None
    ended_at: float | None = None

    @property
    def is_cancelled_by_operator(self) -> bool:
        return self.cancelled_by_operator_at is not None

    @property
    def n(self) -> int:
        """The hold's number within the task, from its idempotency key."""
        return int(self.key.rpartition(":")[2])


@dataclass
class CreditsTerms:
    """How this service is set up, and what it refuses. `lag_seconds`: how long an entry stays out of the ledger."""

    balance: int = 1_000
    price_offset: int = 0
    lag_seconds: float = 0.0
    tells_kinds: bool = True
    tells_balance: bool = True
    """Whether an estimate says how many points there are."""
    grants_more: int = 0
    """Points that a hold has beyond what was requested."""
    commits_less: int = 0
    """Points that a commit charges less than it was sent."""
    says_less: int = 0
    """Points by which a commit's answer understates the charge."""
    is_field: bool = False
    """The platform's own service (contract §4 (field)): no idempotency, no expiry, no hours in its estimate."""
    acts_and_fails: bool = False
    """(field) The first commit acts and is answered with 500."""
    refuses_holds_with: str | None = None
    refuses_commits_with: str | None = None
    refuses_cancels: int = 0
    """How many cancels are refused for a reason that is not the contract's: such a hold ends by its expiry."""


@dataclass
class Account:
    """What the service keeps."""

    holds: dict[str, Hold] = field(default_factory=dict)
    entries: list[tuple[float, LedgerEntry]] = field(default_factory=list)
    answers: dict[str, tuple[str, Answer[Any]]] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    """Keys that came again with another body."""
    estimates: dict[int, int] = field(default_factory=dict)
    """Attempt → what it was estimated at, in points."""


class ActedAndFailed(Exception):
    """The service acted and answers with an error."""


class CreditsModel:
    """One account, and everything that was held and charged on it."""

    def __init__(self, timeline: Timeline, terms: CreditsTerms, price_of: Callable[[EstimateRequest], int]) -> None:
        self._timeline = timeline
        self._price_of = price_of
        self.terms = terms
        self.balance = terms.balance
        self.account = Account()

    @property
    def holds(self) -> list[Hold]:
        """Every hold there ever was; what has run out is expired by now."""
        self._expire()
        return list(self.account.holds.values())

    def charged(self) -> int:
        """Points that were charged in all, by the ledger."""
        committed = sum(hold.charged for hold in self.account.holds.values())
        return committed - sum(e.change for _, e in self.account.entries if e.kind is LedgerKind.CHARGE)

    # Routes

    def estimate(self, post: Post[EstimateRequest]) -> Answer[Estimate]:
        body = post.body.model_copy(update={"gpu_hours": 0.0}) if self._ignores_hours(post.body) else post.body
        cost = max(0, self._price_of(body) + self.terms.price_offset)
        self.account.estimates[int(post.key.rpartition(":")[2])] = cost
        balance = self.balance if self.terms.tells_balance else None
        return Answer(reply=Estimate(selected_cost=cost, estimated_cost=cost, current_balance=balance))

    def _ignores_hours(self, body: EstimateRequest) -> bool:
        return self.terms.is_field and body.gpu_hours is not None

    def pre_deduct(self, post: Post[PreDeductRequest]) -> Answer[HoldReply]:
        return self._once(post, lambda body: self._take(post.key, body))

    def commit(self, post: Post[CommitRequest]) -> Answer[HoldReply]:
        return self._once(post, self._commit)

    def cancel_hold(self, post: Post[CancelHoldRequest]) -> Answer[CancelHoldReply]:
        return self._once(post, self._cancel)

    def charge(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        return self._once(post, self._charge)

    def ledger(self, query: LedgerQuery) -> Answer[Ledger]:
        self._expire()
        seen = self._timeline.now - self.terms.lag_seconds
        entries = [entry for at, entry in self.account.entries if at <= seen]
        if not self.terms.tells_kinds:
            entries = [row for entry in entries for row in self._by_reason(entry)]
        return Answer(reply=Ledger(entries=list(reversed(entries))))

    def _by_reason(self, entry: LedgerEntry) -> list[LedgerEntry]:
        """An entry on a ledger that shows reasons alone, oldest first; an expiry is not shown (contract §4 (field))."""
        hold = self.account.holds.get(entry.pre_deduct_id or "")
        bare = entry.model_copy(update={"kind": None, "pre_deduct_id": None})
        if entry.kind is LedgerKind.EXPIRE:
            return []
        if entry.kind is LedgerKind.COMMIT and hold is not None:
            rest = bare.model_copy(update={"reason": LedgerReason.REFUND.value})
            cost = bare.model_copy(update={"reason": LedgerReason.COMMIT.value, "change": -hold.charged})
            return [rest, cost] if entry.change else [cost]
        if entry.kind is LedgerKind.CHARGE:
            return [bare]
        return [bare.model_copy(update={"reason": entry.kind.value if entry.kind else ""})]

    def cancel_by_operator(self) -> None:
        """An operator gives the newest open hold back."""
        for hold in reversed(self.holds):
            if hold.phase == "open":
                self._give_back(hold, "cancelled", LedgerKind.CANCEL)
                hold.cancelled_by_operator_at = self._timeline.now
                return

    # What they do

    def _once(self, post: Post[Body], act: Callable[[Body], Answer[Any]]) -> Answer[Any]:
        """The first answer again for the same key and body; `idempotency_conflict` for another body."""
        self._expire()
        if self.terms.is_field:
            return act(post.body)
        body = post.body.model_dump_json()
        known = self.account.answers.get(post.key)
        if known is None:
            self.account.answers[post.key] = known = (body, act(post.body))
        elif known[0] != body:
            self.account.conflicts.append(post.key)
            return refused("idempotency_conflict")
        return known[1]

    def _take(self, key: str, body: PreDeductRequest) -> Answer[HoldReply]:
        if self.terms.refuses_holds_with:
            return refused(self.terms.refuses_holds_with)
        if body.estimated_cost > self.balance:
            return refused("insufficient_balance")
        now = self._timeline.now
        amount = min(body.estimated_cost + self.terms.grants_more, self.balance)
        ends_at = float("inf") if self.terms.is_field else now + body.expire_in
        hold = Hold(f"hold-{len(self.account.holds) + 1}", body.task_id, key, amount, body.estimated_cost, now, ends_at)
        self.account.holds[hold.pre_deduct_id] = hold
        self._enter(hold.task_id, LedgerKind.PRE_DEDUCT, -hold.amount, hold)
        return Answer(reply=self._reply(hold, hold.amount))

    def _commit(self, body: CommitRequest) -> Answer[HoldReply]:
        hold = self.account.holds.get(body.pre_deduct_id)
        if self.terms.refuses_commits_with:
            return refused(self.terms.refuses_commits_with)
        if hold is None:
            return refused("pre_deduct_not_found")
        if hold.phase != "open":
            return refused("pre_deduct_already_processed")
        if not body.actual_cost >= 0:
            return refused("amount_invalid")
        if body.actual_cost > hold.amount:
            return refused("hold_insufficient")
        hold.phase, hold.charged = "committed", max(0, body.actual_cost - self.terms.commits_less)
        self._enter(hold.task_id, LedgerKind.COMMIT, hold.amount - hold.charged, hold)
        if self.terms.acts_and_fails:
            self.terms.acts_and_fails = False
            raise ActedAndFailed
        return Answer(reply=self._reply(hold, max(0, hold.charged - self.terms.says_less)))

    def _cancel(self, body: CancelHoldRequest) -> Answer[CancelHoldReply]:
        hold = self.account.holds.get(body.pre_deduct_id)
        if self.terms.refuses_cancels:
            self.terms.refuses_cancels -= 1
            return refused("amount_invalid")
        if hold is None:
            return refused("pre_deduct_not_found")
        if hold.phase != "open":
            return refused("pre_deduct_already_processed")
        self._give_back(hold, "cancelled", LedgerKind.CANCEL)
        return Answer(
            reply=CancelHoldReply(
                pre_deduct_id=hold.pre_deduct_id, status="cancelled", reason=body.reason, balance_after=self.balance
            )
        )

    def _charge(self, body: ChargeRequest) -> Answer[ChargeReply]:
        if body.amount > self.balance:
            return refused("insufficient_balance")
        entry = self._enter(body.task_id, LedgerKind.CHARGE, -body.amount, None, reason=body.reason)
        return Answer(reply=ChargeReply(ledger_id=entry.ledger_id, change=entry.change, balance_after=self.balance))

    def _expire(self) -> None:
        for hold in self.account.holds.values():
            if hold.phase == "open" and hold.expires_at <= self._timeline.now:
                self._give_back(hold, "expired", LedgerKind.EXPIRE)

    def _give_back(self, hold: Hold, phase: str, kind: LedgerKind) -> None:
        hold.phase, hold.ended_at = phase, self._timeline.now
        self._enter(hold.task_id, kind, hold.amount, hold)

    def _enter(
        self, task_id: str, kind: LedgerKind, change: int, hold: Hold | None, *, reason: str = ""
    ) -> LedgerEntry:
        self.balance += change
        entry = LedgerEntry(
            ledger_id=f"entry-{len(self.account.entries) + 1}",
            task_id=task_id,
            change=change,
            balance_after=self.balance,
            kind=kind,
            reason=reason,
            pre_deduct_id=hold.pre_deduct_id if hold else None,
        )
        self.account.entries.append((self._timeline.now, entry))
        return entry

    def _reply(self, hold: Hold, frozen: int) -> HoldReply:
        return HoldReply(
            pre_deduct_id=hold.pre_deduct_id,
            frozen_amount=frozen,
            balance_after=self.balance,
            expire_at=None if self.terms.is_field else datetime.fromtimestamp(hold.expires_at, UTC),
        )
