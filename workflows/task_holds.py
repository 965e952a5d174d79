"""Every hold of one task: taken, and given back (contract §4).

Each is noted before it is asked for, so that one whose answer was lost can be learned by repeating key and body. Its
life counts from the first sending. What another hold has taken the place of is given back beside the flow.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.continuation import AskedHold, HoldState
from comfyui_temporal.contracts.credits import (
    MAX_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    HoldReply,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import Answer, ExceptionCode, FailureCode, Refusal
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.tasks import CreditsSummary, EventType, ImageTask, SettlementState, TrainingTask
from workflows.doubled_holds import DoubledHolds
from workflows.earlier_life import is_key_of_earlier_life
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
UNKNOWN_HOLD_TOLD: Final = "unknown-hold-told-as-given-back"

Back = Callable[[Callable[[], bool]], Awaitable[None]]
"""Waits until a hold is back, in the way of who needs its points."""


class HoldRefused(Exception):
    """The credits service definitely refused a hold."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.sentence)


class HoldForgotten(Exception):
    """An earlier life of the task has used this hold's key."""


class TaskHolds:
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
        self.summary_in_row: CreditsSummary | None = None
        """What an earlier life has settled: it counts, whatever this run has done since."""
        self.margin_seconds = 300.0
        self._leaver: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | None = None
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
    def published_as_held(self) -> int:
        """Points that events told as held and not as given back."""
        return sum(hold.told for hold in self.state.asked if not hold.told_back)

    def summary(self) -> CreditsSummary:
        """`credits` of results and queries, in points; nothing is returned while a hold stands."""
        if self.summary_in_row is not None:
            return self.summary_in_row
        granted = self.state.granted_holds()
        is_open = any(not hold.resolved for hold in granted)
        returned = 0 if is_open else max(0, self.amount - self.state.charged)
        ids = [hold.pre_deduct_id for hold in granted if hold.pre_deduct_id]
        is_unknown = self.state.settlement is SettlementState.UNKNOWN
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

    # Taken

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
                self._publish_held(hold, reply.balance_after)
                return hold
            await self._leave(hold, "its answer came too late to rely on it", back)

    async def _give_back_forgotten(self, hold: AskedHold) -> None:
        """An earlier life has taken a hold under this key: it is cancelled, and the next number asked for."""
        hold.refused = True
        if not await self.forgotten.give_back("taken before the task's run was reset"):
            self._record.record_exception(
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

    def _granted(self, hold: AskedHold, answer: Answer[HoldReply]) -> HoldReply:
        if is_key_of_earlier_life(answer, self._outside.earlier) or (
            answer.earlier_life is not None and answer.earlier_life.is_known
        ):
            raise HoldForgotten()
        if answer.reply is None:
            refusal = answer.refusal or no_answer()
            # An unreadable answer may have taken the hold all the same: it stays noted, and the undo learns of it.
            hold.refused = refusal.message != "unreadable"
            self.ends.count_refusal(answer.tries)
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

    # Holds that another took the place of: given back beside the flow

    async def _leave(self, hold: AskedHold, reason: str, back: Back | None = None) -> None:
        """Give a hold back beside the flow; `back` waits for it where the balance is needed.

        The call may hang for as long as its route is away: no cancel, no deadline and no next renewal waits for it.
        """
        hold.leaving = reason
        if not workflow.patched("old-hold-given-back-beside"):
            await self._give_back_one(hold, reason)
            return
        self.resume()
        if back is not None:
            await back(lambda: hold.resolved)

    def resume(self) -> None:
        """Go on giving back what is being left, also where it was put down."""
        if self._next_leaving() is not None and (self._leaver is None or self._leaver.done()):
            self._leaver = asyncio.create_task(self._give_back_leaving())

    def _next_leaving(self) -> AskedHold | None:
        return next((hold for hold in self.state.asked if hold.leaving and not hold.resolved), None)

    async def _give_back_leaving(self) -> None:
        """One after another: on a ledger without ids two ends in flight could not be told apart."""
        while (hold := self._next_leaving()) is not None and not self._outside.is_suspended:
            await self._give_back_one(hold, str(hold.leaving))

    async def _all_left(self) -> None:
        for task in (self._leaver, self._forgetting):
            if task is not None:
                await workflow.wait([task])
                task.result()

    # Give back

    async def give_back(self, reason: str) -> None:
        """The undo: every hold that may stand is cancelled, also one whose answer was lost.

        One that turns out to be committed counts as charged: such a task is completed (contract §4 *cancel refused*).
        """
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
            self.ends.count(HoldFate.GIVEN_BACK)
            self._publish_given_back(hold, answer.reply.balance_after)

    async def _cancel(self, pre_deduct_id: str, n: int | str, reason: str) -> Answer[CancelHoldReply] | None:
        body = CancelHoldRequest(
            pre_deduct_id=pre_deduct_id, tenant_id=self._task.tenant_id, user_id=self._task.user_id, reason=reason
        )
        for key in (
            self._outside.key("cancel", n),
            self._outside.key("cancel", f"{n}:{self._outside.earlier.life.lives}"),
        ):
            post = Post[CancelHoldRequest](call_for=self._outside.call_for, key=key, body=body)
            answer = await self._outside.in_background(CreditsActivities.cancel_hold, post, summary="5 cancel hold")
            if answer is None or not is_key_of_earlier_life(answer, self._outside.earlier):
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
        self.ends.count_refusal(answer.tries + 1 if answer is not None else 1)
        if answer is not None and answer.refusal is not None and answer.refusal.message == "unreadable":
            self.ends.left_open()
            self._record.record_exception(
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
            if workflow.patched(UNKNOWN_HOLD_TOLD):
                self._publish_given_back(hold, None)
            return
        if found is not None:
            self.count_committed(found.committed)
            self.ends.count(found.fate)
            if found.fate is HoldFate.GIVEN_BACK:
                self._publish_given_back(hold, None)
            elif found.fate is HoldFate.UNKNOWN:
                self._publish_end_unknown(hold, refusal)
            return
        self.ends.left_open()
        self._record.record_exception(
            f"hold_left:{hold.n}",
            ExceptionCode.HOLD_LEFT_TO_EXPIRY,
            f"Hold {hold.pre_deduct_id} could not be cancelled; it ends by expiry. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
        )

    async def fate_of(self, hold: AskedHold) -> Found:
        """What became of a hold that commit or cancel was refused for."""
        if self._outside.earlier.is_possible:
            if not self.forgotten.is_done:  # while they stand the ledger does not tell this one's end apart
                await self.forgotten.give_back("taken before the task's run was reset")
            known = sum(bool(each.pre_deduct_id) for each in self.state.asked)
            others = self.forgotten.own_standing() - (not hold.resolved)
            return await self.ledger.fate_by_all(hold, known=known, but=others)
        return await self.ledger.fate_of(hold)

    def count_committed(self, points: int) -> None:
        """Points that a hold turned out to be committed for; where the ledger was read for the task it knows them."""
        if self._outside.earlier.is_possible:
            self.state.charged = max(self.state.charged, points)
        else:
            self.state.charged += points

    # What the record is told

    def _publish_held(self, hold: AskedHold, balance_after: int | None) -> None:
        hold.told = hold.amount
        self._record.state.credits = self.summary()
        self._record.publish(
            f"held:{hold.n}",
            EventType.CREDITS,
            credits_delta=-hold.amount,
            balance_after=balance_after,
            message=f"{hold.amount} points are held.",
        )

    def publish_held(self, hold: AskedHold) -> None:
        """Tell that a hold was taken, unless that is told; a fact that the store knows is not written twice."""
        if not hold.told:
            self._publish_held(hold, None)

    def _publish_given_back(self, hold: AskedHold, balance_after: int | None) -> None:
        """One that was never relied on is told as held now, so that what comes back has gone before."""
        self.publish_held(hold)
        hold.told_back = True
        self._record.state.credits = self.summary()
        self._record.publish(
            f"given_back:{hold.n}",
            EventType.CREDITS,
            credits_delta=hold.told,
            balance_after=balance_after,
            message=f"{hold.amount} points were given back.",
        )

    def _publish_end_unknown(self, hold: AskedHold, refusal: Refusal) -> None:
        self.ends.is_unknown()
        self._record.record_exception(
            f"hold_unknown:{hold.n}",
            ExceptionCode.SETTLEMENT_UNKNOWN,
            f"Whether hold {hold.pre_deduct_id} was charged or given back could not be learned; the ledger is looked "
            f"at again hourly for a day. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
        )


def no_answer() -> Refusal:
    """What stands for an answer that is neither reply nor refusal, or is no longer waited for."""
    return Refusal(
        code=FailureCode.CREDITS_UNAVAILABLE, message="closing", http_status=0, sentence="The task is ending."
    )
