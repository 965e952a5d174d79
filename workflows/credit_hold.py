"""The credits held for one task: taken, topped up, renewed, given back (contract §4).

Every hold is noted before it is asked for, so that one whose answer was lost can be learned by repeating key and body.
Its life counts from the first sending. New hold first, then the old one is cancelled: the only instant without cover
is where the balance is too short for both.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow

from activities.credits import CreditsActivities
from contracts.calls import Post
from contracts.carried import AskedHold, HoldState
from contracts.credits import (
    MAX_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    Estimate,
    EstimateRequest,
    HoldReply,
    PreDeductRequest,
)
from contracts.errors import Answer, ExceptionCode, FailureCode, Refusal
from contracts.size_budget import MAX_KEPT_HOLDS
from contracts.tasks import CreditsSummary, EventType, ImageTask, SettlementState, TrainingTask
from workflows.doubled_holds import DoubledHolds
from workflows.earlier_life import is_own_key
from workflows.failures import TaskFailed
from workflows.forgotten_holds import ForgottenHolds
from workflows.hold_ends import HoldEnds
from workflows.ledger_search import LedgerSearch
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.task_ledger import Found, HoldFate
from workflows.task_record import TaskRecord

LAST_SECONDS: Final = timedelta(seconds=60)
"""A hold with less life than this is not relied on."""
SHORTEST_LIFE_SECONDS: Final = 120
"""Past the deadline, say: a hold of 60 s would be too short to rely on the moment it is granted, for ever."""
REFUSED_AGAIN_AFTER: Final = timedelta(seconds=30)
TOO_SHORT: Final = "The balance was too short to hold the renewal beside the old hold."
UNCOVERED_LIMIT_IMAGE: Final = timedelta(seconds=60)
UNCOVERED_LIMIT_TRAINING: Final = timedelta(hours=1)


Back = Callable[[Callable[[], bool]], Awaitable[None]]
"""Waits until a hold is back, in the way of who needs its points."""


class RenewalPutDown(Exception):
    """The run is about to continue as new: the next one goes on with what was asked for."""


class HoldRefused(Exception):
    """The credits service definitely refused a hold."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.sentence)


class HoldForgotten(Exception):
    """An earlier life of the task has used this hold's key."""


class CreditHold:
    """Held, then committed, cancelled or expired: each hold once, and each belongs to this task."""

    def __init__(
        self,
        task: ImageTask | TrainingTask,
        outside: OutsideCall,
        record: TaskRecord,
        deadline: Callable[[], datetime],
        carried: HoldState,
        look: RowLook | None = None,
    ) -> None:
        self._task = task
        self._outside = outside
        self._record = record
        self._deadline = deadline
        self.state = carried
        self.told_by_row: CreditsSummary | None = None
        """What an earlier life has settled: it counts, whatever this run has done since."""
        self.margin_seconds = 300.0
        self.opening_minutes = 15.0
        self.uncovered_limit = UNCOVERED_LIMIT_IMAGE if isinstance(task, ImageTask) else UNCOVERED_LIMIT_TRAINING
        self._renewal: asyncio.Task[None] | None = None
        self._leaver: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | None = None
        self._wanted = 0
        self._is_closing = False
        self._is_taking = False
        self.has_begun: Callable[[], bool] = lambda: True  # whether the deadline stands still: an attempt has begun
        self._exhausted: Refusal | None = None
        self.ledger = LedgerSearch(outside, carried)
        self.ends = HoldEnds(carried)
        self._doubled = DoubledHolds(carried, self.ledger, record, self._cancel)
        self.forgotten = ForgottenHolds(carried, self.ledger, self.ends, record, look or RowLook(outside), self._cancel)

    def carry(self) -> HoldState:
        self.state.leave_out_old()
        return self.state

    @property
    def standing(self) -> AskedHold | None:
        """The newest hold that was granted, is not resolved and not being given back."""
        granted = [hold for hold in self.state.granted_holds() if not hold.resolved and not hold.leaving]
        return granted[-1] if granted else None

    @property
    def amount(self) -> int:
        """Points of the last hold that was granted."""
        granted = self.state.granted_holds()
        return granted[-1].amount if granted else 0

    @property
    def usable(self) -> int:
        """Points of the last granted hold that may be charged: never more than were asked for."""
        granted = self.state.granted_holds()
        return granted[-1].usable if granted else 0

    @property
    def covered(self) -> int:
        """Points that the standing hold was asked for: what the present price is compared with."""
        standing = self.standing
        return standing.request.estimated_cost if standing else self.amount

    @property
    def told_as_held(self) -> int:
        """Points that events told as held and not as given back."""
        return sum(hold.told for hold in self.state.asked if not hold.told_back)

    def summary(self) -> CreditsSummary:
        """`credits` of results and queries, in points; nothing is returned while a hold stands."""
        if self.told_by_row is not None:
            return self.told_by_row
        granted = self.state.granted_holds()
        returned = 0 if any(not hold.resolved for hold in granted) else max(0, self.amount - self.state.charged)
        is_unknown = self.state.settlement is SettlementState.UNKNOWN
        ids = [hold.pre_deduct_id for hold in granted if hold.pre_deduct_id]
        return CreditsSummary(
            estimated=self.state.estimated,
            held=self.amount,
            charged=None if is_unknown else self.state.charged,
            returned=None if is_unknown else returned,
            shortfall=self.state.shortfall,
            settlement=self.state.settlement,
            pre_deduct_ids=ids[-MAX_KEPT_HOLDS:],
            pre_deduct_count=self.state.granted_before + len(ids),
        )

    # Row 2: estimate

    async def estimate(self, request: EstimateRequest, *, n: int | str) -> Estimate:
        """The credits service's own price. Raises TaskFailed, TaskStopped."""
        post = Post[EstimateRequest](
            call_for=self._outside.call_for, key=self._outside.key("estimate", n), body=request
        )
        answer = await self._outside.reading(
            CreditsActivities.estimate, post, summary="2 agree", minutes=self.opening_minutes
        )
        if is_own_key(answer, self._outside.told):
            return await self.estimate(request, n=f"{n}:{workflow.info().get_current_history_length()}")
        if answer.reply is None:
            raise TaskFailed.by_refusal(answer.refusal or _closing())
        self.state.estimated = answer.reply.selected_cost
        return answer.reply

    # Row 3: hold

    async def cover(self, cost: int) -> None:
        """Make sure that `cost` points are held; a dearer job tops the hold up first (contract §1).

        Raises TaskFailed with the refusal's code, TaskStopped, or `credits_unavailable`.
        """
        await self._renewal_over()
        old = self.standing
        if cost == 0 or (old is not None and old.request.estimated_cost >= cost):
            await self._outside.waiting.covered()
            return
        self._is_taking = True
        try:
            await self._top_up(old, cost)
        finally:
            self._is_taking = False

    async def _renewal_over(self) -> None:
        """Wait until no renewal is in flight: it may be refused for an hour. Raises as `cover`."""
        if self._is_interrupted() and self._renewal is None:
            self._begin_renewal()
        while self._renewal is not None:
            renewal, waiting = self._renewal, self._outside.waiting
            if waiting.keeps_hold():
                await waiting.in_time(
                    lambda renewal=renewal: renewal.done() or renewal is not self._renewal,  # type: ignore[misc]
                    summary="3 hold: wait for its renewal",
                )
            else:
                await self._outside.unless_stopped(renewal.done)
            if renewal is self._renewal:
                self._take_up()

    async def _top_up(self, old: AskedHold | None, cost: int) -> None:
        try:
            await self._take(cost, self._ask_opening, self._outside.may_begin, self._returned_in_time)
        except HoldRefused as refused:
            if old is None or refused.refusal.code is not FailureCode.INSUFFICIENT_BALANCE:
                raise TaskFailed.by_refusal(refused.refusal) from None
            await self._top_up_without_cover(old, cost)
            return
        if old is not None:
            await self._leave(old, "topped up")

    async def _top_up_without_cover(self, old: AskedHold, cost: int) -> None:
        await self._leave(old, "topped up", self._returned_in_time)
        self._tell_uncovered("The balance was too short to hold the dearer price beside the old hold.")
        try:
            await self._take(cost, self._ask_opening, self._outside.may_begin, self._returned_in_time)
        except HoldRefused as refused:
            raise TaskFailed.by_refusal(refused.refusal) from None
        self.state.uncovered_since = None

    async def _take(
        self,
        amount: int,
        ask: Callable[[AskedHold], Awaitable[HoldReply]],
        may_begin: Callable[[], None],
        back: Back,
        *,
        first: AskedHold | None = None,
    ) -> AskedHold:
        """Take a hold that has enough life left. Raises HoldRefused, and what `may_begin` raises before each asking.

        `first` is asked for before any new one. `back` waits until one whose answer came too late was given back: the
        balance may be too short for both.
        """
        while True:
            may_begin()
            hold, first = first or self._note(amount), None
            try:
                reply = await ask(hold)
            except HoldForgotten:
                self._forgetting = asyncio.create_task(self._give_back_forgotten(hold))
                await back(self._forgetting.done)
                continue
            hold.pre_deduct_id, hold.amount = reply.pre_deduct_id, reply.frozen_amount
            if self._life_of(hold) >= LAST_SECONDS:
                self._tell_held(hold, reply.balance_after)
                return hold
            await self._leave(hold, "its answer came too late to rely on it", back)

    async def _take_renewing(self, amount: int) -> None:
        """Take a hold beside the flow; one that was asked for before the renewal was put down comes first."""
        first = next((hold for hold in self.state.asked if hold.n == self.state.asking), None)
        await self._take(amount, self._ask_renewing, self._may_renew, self._returned_or_closing, first=first)

    async def _give_back_forgotten(self, hold: AskedHold) -> None:
        """An earlier life has taken a hold under this key: it is cancelled, and the next number asked for."""
        hold.refused = True
        if not await self.forgotten.give_back("taken before the task's run was reset"):
            self._record.tell_exception(
                f"undo_hold:{hold.n}",
                ExceptionCode.UNDO_UNFINISHED,
                f"Hold {hold.n} was taken before the run was reset, and is not shown; it ends by expiry.",
            )

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
        return self.state.note(self.forgotten.numbers_taken + 1, request, now)

    async def _ask_opening(self, hold: AskedHold) -> HoldReply:
        answer = await self._outside.opening(
            CreditsActivities.pre_deduct, self._post(hold), summary="3 hold", minutes=self.opening_minutes
        )
        return self._granted(hold, answer)

    def _may_renew(self) -> None:
        if self._is_closing:
            raise HoldRefused(_closing())
        if self._outside.is_put_down:
            raise RenewalPutDown

    async def _ask_renewing(self, hold: AskedHold) -> HoldReply:
        """An outage is no refusal: it is retried, also uncovered, and recorded."""
        is_repeat = self.state.asking == hold.n
        self.state.asking = hold.n
        answer = await self._outside.beside(
            CreditsActivities.pre_deduct, self._post(hold), summary="3 hold", give_up=lambda: self._is_closing
        )
        if answer is None and not self._is_closing:
            raise RenewalPutDown
        self.state.asking = None
        if answer is None:
            raise HoldRefused(_closing())
        answer.tries += is_repeat
        return self._granted(hold, answer)

    def _granted(self, hold: AskedHold, answer: Answer[HoldReply]) -> HoldReply:
        if is_own_key(answer, self._outside.told) or (answer.earlier_life is not None and answer.earlier_life.is_known):
            raise HoldForgotten()
        if answer.reply is None:
            refusal = answer.refusal or _closing()
            # An unreadable answer may have taken the hold all the same: it stays noted, and the undo learns of it.
            hold.refused = refusal.message != "unreadable"
            raise HoldRefused(refusal)
        self.ends.count_grant(answer.tries)
        return answer.reply

    def _post(self, hold: AskedHold) -> Post[PreDeductRequest]:
        key = self._outside.key("pre_deduct", hold.n)
        return Post[PreDeductRequest](call_for=self._outside.call_for, key=key, body=hold.request)

    def _expires_at(self, hold: AskedHold) -> datetime:
        return hold.asked_at + timedelta(seconds=hold.request.expire_in)

    def _life_of(self, hold: AskedHold) -> timedelta:
        return self._expires_at(hold) - workflow.now()

    # Renewal: beside the wait, never in its way

    def due(self) -> datetime | None:
        """When the standing hold is to be renewed; None while it lasts beyond the deadline or a renewal runs."""
        hold = self.standing
        if self._renewal is not None or self._is_taking:
            return None
        if self._is_interrupted():
            return workflow.now()
        if hold is None:
            return None
        if self._wanted > hold.request.estimated_cost:
            return self.state.next_renewal_at or workflow.now()
        spare = self._expires_at(hold) - self._deadline() - timedelta(seconds=self.margin_seconds)
        half_life = hold.asked_at + timedelta(seconds=hold.request.expire_in / 2)
        if spare >= timedelta(0):
            # Until an attempt has begun its deadline moves on with the clock.
            return None if self.has_begun() else max(half_life, workflow.now() + spare)
        return max(half_life, self.state.next_renewal_at or half_life)

    def _is_interrupted(self) -> bool:
        """Whether a renewal was put down where the run continued as new: asking, or uncovered."""
        is_uncovered = self.state.uncovered_since is not None and self.standing is None
        return self._exhausted is None and (self.state.asking is not None or is_uncovered)

    def is_needed(self) -> bool:
        """Whether a hold was ever granted: what is free has none to look after."""
        return any(hold.pre_deduct_id for hold in self.state.asked)

    def is_covered(self) -> bool:
        """Whether something may begin under the hold. Without one: a price of 0, or it was charged by somebody else."""
        hold = self.standing
        return self.state.uncovered_since is None and (hold is None or self._life_of(hold) >= LAST_SECONDS)

    def is_renewing(self) -> bool:
        return self._renewal is not None

    def has_word(self) -> bool:
        return self._renewal is not None and self._renewal.done()

    def check(self) -> None:
        """Start a renewal that is due; take up one that ended. Raises TaskFailed `credit_exhausted`."""
        if self.has_word():
            self._take_up()
        self._raise_if_exhausted()
        due = self.due()
        if due is not None and workflow.now() >= due:
            self._begin_renewal()

    def _begin_renewal(self) -> None:
        self._renewal = asyncio.create_task(self._renew(max(self.covered, self._wanted)))

    def want(self, amount: int) -> None:
        """The price in points as it stands: where it is above the hold, a renewal to it is due at once."""
        self._wanted = amount

    def checkpoint_passed(self) -> None:
        """A training reached a checkpoint: the last one that an uncovered task is let to reach."""
        self.state.checkpoint_passed = True

    async def settled_renewal(self) -> None:
        """Wait until no renewal and no give-back of an old hold is in flight. Raises TaskFailed `credit_exhausted`."""
        if self._renewal is None and self._is_interrupted():
            self._begin_renewal()
        if self._renewal is not None:
            await workflow.wait([self._renewal])
            self._take_up()
        self._raise_if_exhausted()
        self.take_up()
        await self._all_left()

    def _take_up(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.result()
        self._raise_if_exhausted()

    def _raise_if_exhausted(self) -> None:
        if self._exhausted is not None:
            raise TaskFailed(
                FailureCode.CREDIT_EXHAUSTED,
                f"The credits for this task ran out and could not be held anew ({self._exhausted.sentence}).",
            )

    async def _renew(self, amount: int) -> None:
        with suppress(RenewalPutDown):
            if self.standing is None and self.state.uncovered_since is not None:
                await self._cover_again(amount, self.state.uncovered_since)
            else:
                await self._renew_standing(amount)

    async def _renew_standing(self, amount: int) -> None:
        old = self.standing
        try:
            await self._take_renewing(amount)
        except HoldRefused:
            if old is None or self._is_closing:
                return
            left = self._life_of(old)
            if left > LAST_SECONDS:
                self.state.next_renewal_at = workflow.now() + max(left / 2, min(left - LAST_SECONDS, LAST_SECONDS))
                return
            await self._cover_anew(old, amount)
            return
        self.state.next_renewal_at = None
        if old is None:
            return
        if workflow.now() >= self._expires_at(old):
            self._tell_uncovered("The credits service did not answer until the old hold had expired.")
            self.state.uncovered_since = None
        await self._leave(old, "renewed")

    async def _cover_anew(self, old: AskedHold, amount: int) -> None:
        """The old hold is in its last minute and the balance too short for both: cancel it, take a new one at once."""
        self.state.uncovered_since = workflow.now()
        self.state.checkpoint_passed = False
        try:
            await self._leave(old, "renewed", self._returned_or_closing)
        except RenewalPutDown:
            self._tell_uncovered(TOO_SHORT)
            raise
        self._tell_uncovered(TOO_SHORT)
        self.state.uncovered_since = since = workflow.now()
        await self._cover_again(amount, since)

    async def _cover_again(self, amount: int, since: datetime) -> None:
        """Ask until it is granted, or the next checkpoint or the limit has come."""
        while not self._is_closing:
            try:
                await self._take_renewing(amount)
            except HoldRefused as refused:
                refusal = refused.refusal
            else:
                self.state.uncovered_since = None
                return
            if self.state.checkpoint_passed or workflow.now() - since >= self.uncovered_limit:
                self._exhausted = refusal
                return
            await self._outside.waited(
                REFUSED_AGAIN_AFTER, lambda: self._is_closing or self.state.checkpoint_passed, summary="3 hold: refused"
            )

    # Holds that another took the place of: given back beside the flow

    async def _leave(self, hold: AskedHold, reason: str, back: Back | None = None) -> None:
        """Give a hold back beside the flow; `back` waits for it where the balance is needed.

        The call may hang for as long as its route is away: no cancel, no deadline and no next renewal waits for it.
        """
        hold.leaving = reason
        if not workflow.patched("old-hold-given-back-beside"):
            await self._give_back_one(hold, reason)
            return
        self.take_up()
        if back is not None:
            await back(lambda: hold.resolved)

    async def _returned_in_time(self, is_back: Callable[[], bool]) -> None:
        await self._outside.waiting.in_time(is_back, summary="3 hold: wait for the old one's points")

    async def _returned_or_closing(self, is_back: Callable[[], bool]) -> None:
        await workflow.wait_condition(lambda: is_back() or self._is_closing or self._outside.is_put_down)
        if not is_back() and not self._is_closing:
            raise RenewalPutDown

    def take_up(self) -> None:
        """Go on giving back what is being left, also where it was put down."""
        if self._next_leaving() is not None and (self._leaver is None or self._leaver.done()):
            self._leaver = asyncio.create_task(self._give_back_leaving())

    def _next_leaving(self) -> AskedHold | None:
        return next((hold for hold in self.state.asked if hold.leaving and not hold.resolved), None)

    async def _give_back_leaving(self) -> None:
        """One after another: on a ledger without ids two ends in flight could not be told apart."""
        while (hold := self._next_leaving()) is not None and not self._outside.is_put_down:
            await self._give_back_one(hold, str(hold.leaving))

    async def _all_left(self) -> None:
        for task in (self._leaver, self._forgetting):
            if task is not None:
                await workflow.wait([task])
                task.result()

    # Give back

    def close(self) -> None:
        """From here no further hold is asked for."""
        self._is_closing = True

    async def give_back(self, reason: str) -> None:
        """The undo: every hold that may stand is cancelled, also one whose answer was lost.

        One that turns out to be committed counts as charged: such a task is completed (contract §4 *cancel refused*).
        """
        self._is_closing = True
        if self._renewal is not None:
            await workflow.wait([self._renewal])
            self._renewal.result()
            self._renewal = None
        await self._all_left()
        for hold in list(self.state.asked):
            if not hold.resolved and not hold.refused:
                await self._give_back_one(hold, hold.leaving or reason)
        await self._doubled.give_back(reason)

    async def _give_back_one(self, hold: AskedHold, reason: str) -> None:
        if hold.pre_deduct_id is None and not await self._learn(hold):
            return
        assert hold.pre_deduct_id is not None
        answer = await self._cancel(hold.pre_deduct_id, hold.n, reason)
        if answer is None:
            return
        if answer.refusal is not None:
            await self._cancel_refused(hold, answer.refusal)
            return
        hold.resolved = True
        if answer.reply is not None:
            self._tell_given_back(hold, answer.reply.balance_after)

    async def _cancel(self, pre_deduct_id: str, n: int | str, reason: str) -> Answer[CancelHoldReply] | None:
        body = CancelHoldRequest(
            pre_deduct_id=pre_deduct_id, tenant_id=self._task.tenant_id, user_id=self._task.user_id, reason=reason
        )
        for key in (
            self._outside.key("cancel", n),
            self._outside.key("cancel", f"{n}:{self._outside.told.life.lives}"),
        ):
            post = Post[CancelHoldRequest](call_for=self._outside.call_for, key=key, body=body)
            answer = await self._outside.beside(CreditsActivities.cancel_hold, post, summary="5 cancel hold")
            if answer is None or not is_own_key(answer, self._outside.told):
                break
        return answer

    async def _learn(self, hold: AskedHold) -> bool:
        """Repeat key and body to learn the id of a hold whose answer was lost; whether there is such a hold."""
        post = self._post(hold).model_copy(update={"is_undo": True})
        answer = await self._outside.until_answered(
            CreditsActivities.pre_deduct, post, summary="5 cancel hold: learn its id"
        )
        if answer is not None and answer.reply is not None:
            hold.pre_deduct_id, hold.amount = answer.reply.pre_deduct_id, answer.reply.frozen_amount
            self.ends.count_grant(answer.tries + 1)  # it had been asked before, or the id would be known
            return True
        hold.refused = True
        if answer is not None and answer.refusal is not None and answer.refusal.message == "unreadable":
            self.ends.left_open()
            self._record.tell_exception(
                f"undo_hold:{hold.n}",
                ExceptionCode.UNDO_UNFINISHED,
                f"The id of hold {hold.n} could not be learned; it ends by expiry. {answer.refusal.sentence}",
            )
        return False

    async def _cancel_refused(self, hold: AskedHold, refusal: Refusal) -> None:
        is_processed = refusal.message == "pre_deduct_already_processed"
        found = await self.fate_of(hold) if is_processed else None
        hold.resolved = True  # not before: a run that continues as new meanwhile asks again
        if refusal.message == "pre_deduct_not_found":
            return
        if found is not None:
            self.count_committed(found.committed)
            if found.fate is HoldFate.COMMITTED:
                self.ends.count(found.fate)
            elif found.fate is HoldFate.GIVEN_BACK:
                self._tell_given_back(hold, None)
            else:
                self._tell_end_unknown(hold, refusal)
            return
        self.ends.left_open()
        self._record.tell_exception(
            f"hold_left:{hold.n}",
            ExceptionCode.HOLD_LEFT_TO_EXPIRY,
            f"Hold {hold.pre_deduct_id} could not be cancelled; it ends by expiry. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
        )

    async def fate_of(self, hold: AskedHold) -> Found:
        """What became of a hold that commit or cancel was refused for."""
        if self._outside.told.is_possible:
            if not self.forgotten.is_done:  # while they stand the ledger does not tell this one's end apart
                await self.forgotten.give_back("taken before the task's run was reset")
            known = sum(bool(each.pre_deduct_id) for each in self.state.asked)
            return await self.ledger.fate_by_all(hold, known=known, but=self.forgotten.own_standing())
        return await self.ledger.fate_of(hold)

    def count_committed(self, points: int) -> None:
        """Points that a hold turned out to be committed for; where the ledger was read for the task it knows them."""
        if self._outside.told.is_possible:
            self.state.charged = max(self.state.charged, points)
        else:
            self.state.charged += points

    # What the record is told

    def _tell_held(self, hold: AskedHold, balance_after: int | None) -> None:
        hold.told = hold.amount
        self._record.state.credits = self.summary()
        self._record.tell(
            f"held:{hold.n}",
            EventType.CREDITS,
            credits_delta=-hold.amount,
            balance_after=balance_after,
            message=f"{hold.amount} points are held.",
        )

    def _tell_given_back(self, hold: AskedHold, balance_after: int | None) -> None:
        """One that was never relied on is told as held now, so that what comes back has gone before."""
        if not hold.told:
            self._tell_held(hold, None)
        hold.told_back = True
        self.ends.count(HoldFate.GIVEN_BACK)
        self._record.state.credits = self.summary()
        self._record.tell(
            f"given_back:{hold.n}",
            EventType.CREDITS,
            credits_delta=hold.told,
            balance_after=balance_after,
            message=f"{hold.amount} points were given back.",
        )

    def _tell_end_unknown(self, hold: AskedHold, refusal: Refusal) -> None:
        self.ends.is_unknown()
        self._record.tell_exception(
            f"hold_unknown:{hold.n}",
            ExceptionCode.SETTLEMENT_UNKNOWN,
            f"Whether hold {hold.pre_deduct_id} was charged or given back could not be learned; the ledger is looked "
            f"at again hourly for a day. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
        )

    def _tell_uncovered(self, why: str) -> None:
        now = workflow.now().isoformat()
        self._record.tell_exception(f"uncovered:{now}", ExceptionCode.UNCOVERED, why)


def _closing() -> Refusal:
    return Refusal(
        code=FailureCode.CREDITS_UNAVAILABLE, message="closing", http_status=0, sentence="The task is ending."
    )
