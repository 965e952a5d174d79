"""The credits held for one task: taken, topped up, renewed, given back (contract §4).

Every hold is noted before it is asked for, so that one whose answer was lost can be learned by repeating key and body.
Its life counts from the first sending. New hold first, then the old one is cancelled: the only instant without cover
is where the balance is too short for both.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow

from activities.credits import CreditsActivities
from contracts.calls import Post
from contracts.carried import AskedHold, HoldState
from contracts.credits import (
    MAX_HOLD_SECONDS,
    CancelHoldRequest,
    Estimate,
    EstimateRequest,
    HoldReply,
    PreDeductRequest,
)
from contracts.errors import Answer, ExceptionCode, FailureCode, Refusal
from contracts.size_budget import MAX_KEPT_HOLDS
from contracts.tasks import CreditsSummary, EventType, ImageTask, TrainingTask
from workflows.failures import TaskFailed
from workflows.ledger_search import HoldFate, LedgerSearch
from workflows.outside_call import OutsideCall
from workflows.task_record import TaskRecord

LAST_SECONDS: Final = timedelta(seconds=60)
"""A hold with less life than this is not relied on."""
SHORTEST_LIFE_SECONDS: Final = 120
"""Past the deadline, say: a hold of 60 s would be too short to rely on the moment it is granted, for ever."""
REFUSED_AGAIN_AFTER: Final = timedelta(seconds=30)
UNCOVERED_LIMIT_IMAGE: Final = timedelta(seconds=60)
UNCOVERED_LIMIT_TRAINING: Final = timedelta(hours=1)


class HoldRefused(Exception):
    """The credits service definitely refused a hold."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.sentence)


class CreditHold:
    """Held, then committed, cancelled or expired: each hold once, and each belongs to this task."""

    def __init__(
        self,
        task: ImageTask | TrainingTask,
        outside: OutsideCall,
        record: TaskRecord,
        deadline: Callable[[], datetime],
        carried: HoldState,
    ) -> None:
        self._task = task
        self._outside = outside
        self._record = record
        self._deadline = deadline
        self.state = carried
        self.margin_seconds = 300.0
        self.opening_minutes = 15.0
        self.uncovered_limit = UNCOVERED_LIMIT_IMAGE if isinstance(task, ImageTask) else UNCOVERED_LIMIT_TRAINING
        self._renewal: asyncio.Task[None] | None = None
        self._wanted = 0
        self._is_closing = False
        self._checkpoint_passed = False
        self._exhausted: Refusal | None = None
        self.ledger = LedgerSearch(outside, carried)

    def carry(self) -> HoldState:
        self.state.leave_out_old()
        return self.state

    @property
    def standing(self) -> AskedHold | None:
        """The newest hold that was granted and is not resolved."""
        granted = [hold for hold in self.state.granted() if not hold.resolved]
        return granted[-1] if granted else None

    @property
    def amount(self) -> int:
        """Points of the last hold that was granted."""
        granted = self.state.granted()
        return granted[-1].amount if granted else 0

    @property
    def covered(self) -> int:
        """Points that the standing hold was asked for: what the present price is compared with."""
        standing = self.standing
        return standing.request.estimated_cost if standing else self.amount

    def summary(self) -> CreditsSummary:
        """`credits` of results and queries, in points; nothing is returned while a hold stands."""
        returned = 0 if self.standing else max(0, self.amount - self.state.charged)
        ids = [hold.pre_deduct_id for hold in self.state.granted() if hold.pre_deduct_id]
        return CreditsSummary(
            estimated=self.state.estimated,
            held=self.amount,
            charged=self.state.charged,
            returned=returned,
            shortfall=self.state.shortfall,
            pre_deduct_ids=ids[-MAX_KEPT_HOLDS:],
            pre_deduct_count=self.state.granted_before + len(ids),
        )

    # Row 2: estimate

    async def estimate(self, request: EstimateRequest, *, n: int) -> Estimate:
        """The credits service's own price. Raises TaskFailed, TaskStopped."""
        post = Post[EstimateRequest](
            call_for=self._outside.call_for, key=self._outside.key("estimate", n), body=request
        )
        answer = await self._outside.reading(
            CreditsActivities.estimate, post, summary="2 agree", minutes=self.opening_minutes
        )
        if answer.reply is None:
            raise TaskFailed.by_refusal(answer.refusal or _closing())
        self.state.estimated = answer.reply.selected_cost
        return answer.reply

    # Row 3: hold

    async def cover(self, cost: int) -> None:
        """Make sure that `cost` points are held; a dearer job tops the hold up first (contract §1).

        Raises TaskFailed with the refusal's code, TaskStopped, or `credits_unavailable`.
        """
        if self._renewal is not None:
            await self._outside.unless_stopped(self._renewal.done)  # it may be refused for an hour
            self._take_up()
        old = self.standing
        if cost == 0 or (old is not None and old.request.estimated_cost >= cost):
            return
        try:
            await self._take(cost, self._ask_opening, self._outside.may_begin)
        except HoldRefused as refused:
            if old is None or refused.refusal.code is not FailureCode.INSUFFICIENT_BALANCE:
                raise TaskFailed.by_refusal(refused.refusal) from None
            await self._top_up_without_cover(old, cost)
            return
        if old is not None:
            await self._give_back_one(old, "topped up")

    async def _top_up_without_cover(self, old: AskedHold, cost: int) -> None:
        await self._give_back_one(old, "topped up")
        self._tell_uncovered("The balance was too short to hold the dearer price beside the old hold.")
        try:
            await self._take(cost, self._ask_opening, self._outside.may_begin)
        except HoldRefused as refused:
            raise TaskFailed.by_refusal(refused.refusal) from None
        self.state.uncovered_since = None

    async def _take(
        self, amount: int, ask: Callable[[AskedHold], Awaitable[HoldReply]], may_begin: Callable[[], None]
    ) -> AskedHold:
        """Take a hold that has enough life left. Raises HoldRefused, and what `may_begin` raises before each asking."""
        while True:
            may_begin()
            hold = self._note(amount)
            reply = await ask(hold)
            hold.pre_deduct_id, hold.amount = reply.pre_deduct_id, reply.frozen_amount
            if self._expires_at(hold) - workflow.now() >= LAST_SECONDS:
                self._tell_held(hold, reply)
                return hold
            await self._give_back_one(hold, "its answer came too late to rely on it")

    def _note(self, amount: int) -> AskedHold:
        now = workflow.now()
        seconds = math.ceil((self._deadline() - now).total_seconds() + self.margin_seconds)
        request = PreDeductRequest(
            task_id=self._task.task_id,
            template_id=self._task.template_id,
            tenant_id=self._task.tenant_id,
            user_id=self._task.user_id,
            scene=self._task.scene,
            estimated_cost=amount,
            expire_in=min(MAX_HOLD_SECONDS, max(SHORTEST_LIFE_SECONDS, seconds)),
        )
        return self.state.note(request, now)

    async def _ask_opening(self, hold: AskedHold) -> HoldReply:
        answer = await self._outside.opening(
            CreditsActivities.pre_deduct, self._post(hold), summary="3 hold", minutes=self.opening_minutes
        )
        return self._granted(hold, answer)

    def _may_renew(self) -> None:
        if self._is_closing:
            raise HoldRefused(_closing())

    async def _ask_renewing(self, hold: AskedHold) -> HoldReply:
        """An outage is no refusal: it is retried, also uncovered, and recorded."""
        answer = await self._outside.until_answered(
            CreditsActivities.pre_deduct, self._post(hold), summary="3 hold", give_up=lambda: self._is_closing
        )
        if answer is None:
            raise HoldRefused(_closing())
        return self._granted(hold, answer)

    def _granted(self, hold: AskedHold, answer: Answer[HoldReply]) -> HoldReply:
        if answer.reply is None:
            refusal = answer.refusal or _closing()
            # An unreadable answer may have taken the hold all the same: it stays noted, and the undo learns of it.
            hold.refused = refusal.message != "unreadable"
            raise HoldRefused(refusal)
        return answer.reply

    def _post(self, hold: AskedHold) -> Post[PreDeductRequest]:
        key = self._outside.key("pre_deduct", hold.n)
        return Post[PreDeductRequest](call_for=self._outside.call_for, key=key, body=hold.request)

    def _expires_at(self, hold: AskedHold) -> datetime:
        return hold.asked_at + timedelta(seconds=hold.request.expire_in)

    # Renewal: beside the wait, never in its way

    def due(self) -> datetime | None:
        """When the standing hold is to be renewed; None while it lasts beyond the deadline or a renewal runs."""
        hold = self.standing
        if hold is None or self._renewal is not None:
            return None
        if self._wanted > hold.request.estimated_cost:
            return self.state.next_renewal_at or workflow.now()
        if self._expires_at(hold) >= self._deadline() + timedelta(seconds=self.margin_seconds):
            return None
        half_life = hold.asked_at + timedelta(seconds=hold.request.expire_in / 2)
        return max(half_life, self.state.next_renewal_at or half_life)

    def is_renewing(self) -> bool:
        return self._renewal is not None

    def has_word(self) -> bool:
        return self._renewal is not None and self._renewal.done()

    def check(self) -> None:
        """Start a renewal that is due; take up one that ended. Raises TaskFailed `credit_exhausted`."""
        if self.has_word():
            self._take_up()
        due = self.due()
        if due is not None and workflow.now() >= due:
            self._renewal = asyncio.create_task(self._renew(max(self.covered, self._wanted)))

    def want(self, amount: int) -> None:
        """The price in points as it stands: where it is above the hold, a renewal to it is due at once."""
        self._wanted = amount

    def checkpoint_passed(self) -> None:
        """A training reached a checkpoint: the last one that an uncovered task is let to reach."""
        self._checkpoint_passed = True

    async def settled_renewal(self) -> None:
        """Wait until no renewal is in flight. Raises TaskFailed `credit_exhausted`."""
        if self._renewal is not None:
            await workflow.wait([self._renewal])
            self._take_up()

    def _take_up(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.result()
        if self._exhausted is not None:
            raise TaskFailed(
                FailureCode.CREDIT_EXHAUSTED,
                f"The credits for this task ran out and could not be held anew ({self._exhausted.sentence}).",
            )

    async def _renew(self, amount: int) -> None:
        old = self.standing
        try:
            await self._take(amount, self._ask_renewing, self._may_renew)
        except HoldRefused as refused:
            if old is None or self._is_closing:
                return
            left = self._expires_at(old) - workflow.now()
            if left > LAST_SECONDS:
                self.state.next_renewal_at = workflow.now() + max(left / 2, min(left - LAST_SECONDS, LAST_SECONDS))
                return
            await self._cover_anew(old, amount, refused.refusal)
            return
        self.state.next_renewal_at = None
        if old is None:
            return
        if workflow.now() >= self._expires_at(old):
            self._tell_uncovered("The credits service did not answer until the old hold had expired.")
            self.state.uncovered_since = None
        await self._give_back_one(old, "renewed")

    async def _cover_anew(self, old: AskedHold, amount: int, refusal: Refusal) -> None:
        """The old hold is in its last minute and the balance too short for both: cancel it, take a new one at once."""
        await self._give_back_one(old, "renewed")
        self._tell_uncovered("The balance was too short to hold the renewal beside the old hold.")
        self.state.uncovered_since = since = workflow.now()
        self._checkpoint_passed = False
        while not self._is_closing:
            try:
                await self._take(amount, self._ask_renewing, self._may_renew)
            except HoldRefused as refused:
                refusal = refused.refusal
            else:
                self.state.uncovered_since = None
                return
            if self._checkpoint_passed or workflow.now() - since >= self.uncovered_limit:
                self._exhausted = refusal
                return
            await self._outside.waited(
                REFUSED_AGAIN_AFTER, lambda: self._is_closing or self._checkpoint_passed, summary="3 hold: refused"
            )

    # Give back

    async def give_back(self, reason: str) -> None:
        """The undo: every hold that may stand is cancelled, also one whose answer was lost.

        One that turns out to be committed counts as charged: such a task is completed (contract §4 *cancel refused*).
        """
        self._is_closing = True
        if self._renewal is not None:
            await workflow.wait([self._renewal])
            self._renewal.result()
            self._renewal = None
        for hold in list(self.state.asked):
            if not hold.resolved and not hold.refused:
                await self._give_back_one(hold, reason)

    async def _give_back_one(self, hold: AskedHold, reason: str) -> None:
        if hold.pre_deduct_id is None and not await self._learn(hold):
            return
        assert hold.pre_deduct_id is not None
        body = CancelHoldRequest(
            pre_deduct_id=hold.pre_deduct_id,
            tenant_id=self._task.tenant_id,
            user_id=self._task.user_id,
            reason=reason,
        )
        post = Post[CancelHoldRequest](
            call_for=self._outside.call_for, key=self._outside.key("cancel", hold.n), body=body
        )
        answer = await self._outside.until_answered(CreditsActivities.cancel_hold, post, summary="5 cancel hold")
        hold.resolved = True
        if answer is not None and answer.reply is not None:
            self._tell_given_back(hold, answer.reply.balance_after)
        elif answer is not None and answer.refusal is not None:
            await self._cancel_refused(hold, answer.refusal)

    async def _learn(self, hold: AskedHold) -> bool:
        """Repeat key and body to learn the id of a hold whose answer was lost; whether there is such a hold."""
        answer = await self._outside.until_answered(
            CreditsActivities.pre_deduct, self._post(hold), summary="5 cancel hold: learn its id"
        )
        if answer is not None and answer.reply is not None:
            hold.pre_deduct_id, hold.amount = answer.reply.pre_deduct_id, answer.reply.frozen_amount
            return True
        hold.refused = True
        if answer is not None and answer.refusal is not None and answer.refusal.message == "unreadable":
            self._record.tell_exception(
                f"undo_hold:{hold.n}",
                ExceptionCode.UNDO_UNFINISHED,
                f"The id of hold {hold.n} could not be learned; it ends by expiry. {answer.refusal.sentence}",
            )
        return False

    async def _cancel_refused(self, hold: AskedHold, refusal: Refusal) -> None:
        if refusal.message == "pre_deduct_not_found":
            return
        if refusal.message == "pre_deduct_already_processed":
            found = await self.ledger.fate_of(hold)
            self.state.charged += found.committed
            if found.fate is HoldFate.GIVEN_BACK:
                self._tell_given_back(hold, None)
            if found.fate is not HoldFate.UNKNOWN:
                return
        self._record.tell_exception(
            f"hold_left:{hold.n}",
            ExceptionCode.HOLD_LEFT_TO_EXPIRY,
            f"Hold {hold.pre_deduct_id} could not be cancelled; it ends by expiry. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
        )

    # What the record is told

    def _tell_held(self, hold: AskedHold, reply: HoldReply) -> None:
        self._record.state.credits = self.summary()
        self._record.tell(
            f"held:{hold.n}",
            EventType.CREDITS,
            credits_delta=-hold.amount,
            balance_after=reply.balance_after,
            message=f"{hold.amount} points are held.",
        )

    def _tell_given_back(self, hold: AskedHold, balance_after: int | None) -> None:
        self._record.state.credits = self.summary()
        self._record.tell(
            f"given_back:{hold.n}",
            EventType.CREDITS,
            credits_delta=hold.amount,
            balance_after=balance_after,
            message=f"{hold.amount} points were given back.",
        )

    def _tell_uncovered(self, why: str) -> None:
        now = workflow.now().isoformat()
        self._record.tell_exception(f"uncovered:{now}", ExceptionCode.UNCOVERED, why)


def _closing() -> Refusal:
    return Refusal(
        code=FailureCode.CREDITS_UNAVAILABLE, message="closing", http_status=0, sentence="The task is ending."
    )
