"""Every hold of one task: taken, and given back (contract §4).

Each is recorded before its request, so that the undo can find one whose answer was lost by repeating key and body. Its
life counts from the first request. A hold that another one has replaced is given back in the background.
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
from comfyui_temporal.contracts.credits import (
    MAX_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    HoldReply,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import (
    Answer,
    ExceptionCode,
    FailureCode,
    Refusal,
    RefusalKind,
)
from comfyui_temporal.contracts.requests import HoldState, RequestedHold, RequestOutcome, is_key_conflict
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskInput
from workflows.doubled_holds import DoubledHolds
from workflows.earlier_life import are_not_of_earlier_life, is_key_of_earlier_life, was_stopped
from workflows.forgotten_holds import ForgottenHolds
from workflows.hold_ends import HoldEnds
from workflows.ledger_search import LedgerSearch
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.task_ledger import Found, HoldFate
from workflows.task_record import TaskRecord

LAST_SECONDS: Final = timedelta(seconds=60)
"""A hold with less life left than this does not count as cover."""
SHORTEST_LIFE_SECONDS: Final = 120
"""Past the deadline, for example. A hold of 60 s would be too short as soon as it is granted, again and again."""
STOPPED_MAY_BE_HELD: Final = "stopped-renewal-may-be-held"
CONFLICT_LOOKED_UP: Final = "cancel-under-a-taken-key-looked-up"
ALL_LIVES_COUNTED: Final = "holds-of-all-lives-counted-in-an-end"
UNKNOWN_HOLD_PUBLISHED: Final = "unknown-hold-told-as-given-back"
ENDS_SEEN_PUBLISHED: Final = "hold-given-back-once-the-last-reading-shows-it"

ALWAYS_KNOWN: Final = Refusal(
    code=FailureCode.TASK_CONFLICT,
    message="hold_known",
    http_status=0,
    sentence="The credits service answers each request for a hold with one from before the task's run was reset.",
)

Back = Callable[[Callable[[], bool]], Awaitable[None]]
"""Waits until a hold is given back, interruptible as its caller needs."""


class HoldRefused(Exception):
    """The credits service definitely refused a hold."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.sentence)


class HoldForgotten(Exception):
    """An earlier life of the task has used this hold's key. `refusal`: where each further key would be used too."""

    def __init__(self, refusal: Refusal | None) -> None:
        self.refusal = refusal or ALWAYS_KNOWN
        super().__init__()


class TaskHolds:
    """Each hold of this task is resolved once: committed, cancelled or expired."""

    def __init__(
        self,
        task: TaskInput,
        outside: OutsideCall,
        record: TaskRecord,
        deadline: Callable[[], datetime],
        state: HoldState,
        look: RowLook | None = None,
    ) -> None:
        self._task = task
        self._outside = outside
        self._record = record
        self._deadline = deadline
        self.state = state
        self._summary_in_row: CreditsSummary | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | asyncio.Task[bool] | None = None
        self._look = look or RowLook(outside)
        self.ledger = LedgerSearch(outside, state, self._look)
        self.ends = HoldEnds(state)
        self._doubled = DoubledHolds(state, self.ledger, record, self._cancel)
        self.forgotten = ForgottenHolds(state, self.ledger, self.ends, record, self._look, self._cancel)

    def carry(self) -> HoldState:
        self.state.leave_out_old()
        return self.state

    @property
    def standing(self) -> RequestedHold | None:
        """The open hold: the newest that was granted, is not resolved and is not being given back."""
        granted = [hold for hold in self.state.granted_holds() if not hold.resolved and not hold.leaving]
        return granted[-1] if granted else None

    @property
    def amount(self) -> int:
        """Points of the last granted hold."""
        granted = self.state.granted_holds()
        return granted[-1].amount if granted else 0

    @property
    def usable(self) -> int:
        """Points of the last granted hold that may be charged: never more than were requested."""
        granted = self.state.granted_holds()
        return granted[-1].usable if granted else 0

    @property
    def published_as_held(self) -> int:
        """Points that events have shown as held and not as given back."""
        return sum(hold.told for hold in self.state.asked if not hold.told_back)

    def copy_row(self, credits: CreditsSummary) -> None:
        """An earlier life has settled the task: its summary counts, not what this run has done since."""
        self._summary_in_row = credits

    def summary(self) -> CreditsSummary:
        """`credits` of results and queries, in points. Nothing counts as returned while a hold is open."""
        if self._summary_in_row is not None:
            return self._summary_in_row
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
        request: Callable[[RequestedHold], Awaitable[HoldReply]],
        may_begin: Callable[[], None],
        back: Back,
        *,
        first: RequestedHold | None = None,
    ) -> RequestedHold:
        """Take a hold that has enough life left. Raises HoldRefused, and before each request as `may_begin`.

        `first` is requested before any new one. `back` waits until a hold whose answer came too late is given back: the
        balance may be too short for both.
        """
        taken = 0
        while True:
            may_begin()
            hold, first = first or self._new_hold(amount), None
            try:
                reply = await request(hold)
            except HoldForgotten as forgotten:
                self._forgetting = asyncio.create_task(self._give_back_forgotten(hold))
                await back(self._forgetting.done)
                taken += 1
                if are_not_of_earlier_life(taken, known=self.forgotten.known):
                    raise HoldRefused(forgotten.refusal) from forgotten
                continue
            if self._life_of(hold) >= LAST_SECONDS:
                self._publish_held(hold, reply.balance_after)
                return hold
            await self._release(hold, "its answer came too late to rely on it", back)

    async def _give_back_forgotten(self, hold: RequestedHold) -> None:
        """An earlier life has taken a hold under this key: cancel it. The caller requests the next number."""
        hold.refused = True
        if not await self.forgotten.give_back():
            self._record.record_exception(
                f"undo_hold:{hold.n}",
                ExceptionCode.UNDO_UNFINISHED,
                f"Hold {hold.n} was taken before the run was reset, and is not in the ledger; it ends by expiry.",
            )

    @property
    def _margin_seconds(self) -> float:
        """How long a hold lasts beyond the deadline."""
        return self._outside.limits.policy.hold_margin_seconds

    def _new_hold(self, amount: int) -> RequestedHold:
        now = workflow.now()
        seconds = math.ceil((self._deadline() - now).total_seconds() + self._margin_seconds)
        request = PreDeductRequest(
            task_id=self._task.task_id,
            template_id=self._task.template_id,
            tenant_id=self._task.tenant_id,
            user_id=self._task.user_id,
            scene=self._task.scene,
            estimated_cost=amount,
            expire_in=min(MAX_HOLD_SECONDS, max(SHORTEST_LIFE_SECONDS, seconds)),
        )
        return self.state.add(self.forgotten.numbers_taken + 1, request, now)

    def _granted(self, hold: RequestedHold, answer: Answer[HoldReply]) -> HoldReply:
        self.state.learn_lives(answer)
        if is_key_of_earlier_life(answer, self._outside.earlier) or (
            answer.earlier_life is not None and answer.earlier_life.is_known
        ):
            raise HoldForgotten(answer.refusal)
        self.state.answered(hold, answer)
        if answer.reply is None:
            is_open = hold.outcome is RequestOutcome.UNKNOWN
            if is_open and was_stopped(answer) and not workflow.patched(STOPPED_MAY_BE_HELD):
                hold.refused = True
            raise HoldRefused(answer.refusal or no_answer())
        return answer.reply

    def _post(self, hold: RequestedHold) -> Post[PreDeductRequest]:
        key = self._outside.key("pre_deduct", hold.n)
        return Post[PreDeductRequest](call_for=self._outside.call_for, key=key, body=hold.request)

    def _expires_at(self, hold: RequestedHold) -> datetime:
        return hold.asked_at + timedelta(seconds=hold.request.expire_in)

    def _life_of(self, hold: RequestedHold) -> timedelta:
        return self._expires_at(hold) - workflow.now()

    # Replaced holds: given back in the background

    async def _release(self, hold: RequestedHold, reason: str, back: Back | None = None) -> None:
        """Give a hold back in the background; `back` waits for it where the balance is needed.

        The call may hang for as long as its route is away. No cancel, deadline or next renewal waits for it.
        """
        hold.leaving = reason
        if not workflow.patched("old-hold-given-back-beside"):
            await self._give_back_one(hold, reason)
            return
        self.resume()
        if back is not None:
            await back(lambda: hold.resolved)

    def resume(self) -> None:
        """Go on giving back replaced holds, also after this was suspended."""
        if self._next_leaving() is not None and (self._releasing is None or self._releasing.done()):
            self._releasing = asyncio.create_task(self._give_back_replaced())

    def _next_leaving(self) -> RequestedHold | None:
        return next((hold for hold in self.state.asked if hold.leaving and not hold.resolved), None)

    async def _give_back_replaced(self) -> None:
        """One after another: in a ledger without ids two ends in flight could not be distinguished."""
        while (hold := self._next_leaving()) is not None and not self._outside.is_suspended:
            await self._give_back_one(hold, str(hold.leaving))

    async def _all_released(self) -> None:
        for task in (self._releasing, self._forgetting):
            if task is not None:
                await workflow.wait([task])
                task.result()

    # Give back

    async def give_back(self, reason: str) -> None:
        """The undo: cancel every hold that may be open, also one whose answer was lost.

        One that turns out to be committed counts as charged: such a task is completed (contract §4 *cancel refused*).
        """
        await self._all_released()
        for hold in list(self.state.asked):
            if hold.needs_undo:
                await self._give_back_one(hold, hold.leaving or reason)
        await self._doubled.give_back(reason)

    async def _give_back_one(self, hold: RequestedHold, reason: str) -> None:
        if hold.pre_deduct_id is None and not await self._learn(hold):
            return
        assert hold.pre_deduct_id is not None
        answer = await self._cancel(hold.pre_deduct_id, hold.n, reason)
        if answer is None:
            return
        if answer.refusal is not None:
            await self._cancel_refused(hold, answer.refusal)
            return
        hold.cancel_answered(answer)
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
            answer = await self._outside.in_background(
                CreditsActivities.cancel_hold, post, summary=self._outside.labels.cancel_hold
            )
            if answer is None or not self._is_key_taken(answer):
                break
        return answer

    def _is_key_taken(self, answer: Answer[CancelHoldReply]) -> bool:
        """Whether another life of the task cancelled the hold for another reason: nobody else uses the key."""
        if not is_key_conflict(answer):
            return False
        return self._outside.earlier.is_possible or workflow.patched(CONFLICT_LOOKED_UP)

    async def _learn(self, hold: RequestedHold) -> bool:
        """Repeat key and body to learn the id of a hold whose answer was lost. Returns whether there is such a hold."""
        post = self._post(hold).model_copy(update={"is_undo": True})
        answer = await self._outside.until_answered(
            CreditsActivities.pre_deduct, post, summary=f"{self._outside.labels.cancel_hold}: learn its id"
        )
        if answer is not None:
            self.state.answered(hold, answer, earlier_tries=1)  # it was sent before, or its id would be known
        if hold.outcome is not RequestOutcome.UNKNOWN:
            return hold.outcome is RequestOutcome.MADE
        hold.refused = True
        if answer is not None and answer.refusal is not None:
            self.ends.left_open()
            self._record.record_exception(
                f"undo_hold:{hold.n}",
                ExceptionCode.UNDO_UNFINISHED,
                f"The id of hold {hold.n} could not be found out; it ends by expiry. {answer.refusal.sentence}",
            )
        return False

    async def _cancel_refused(self, hold: RequestedHold, refusal: Refusal) -> None:
        is_over = refusal.kind is RefusalKind.HOLD_ALREADY_RESOLVED or (
            refusal.kind is RefusalKind.KEY_CONFLICT and workflow.patched(CONFLICT_LOOKED_UP)
        )
        found = await self.fate_of(hold) if is_over else None
        hold.resolved = True  # only now: a run that continues as new before this has to cancel again
        if refusal.kind is RefusalKind.HOLD_NOT_FOUND:
            if workflow.patched(UNKNOWN_HOLD_PUBLISHED):
                self._publish_given_back(hold, None)
            return
        if found is not None:
            self.count_committed(found.committed)
            self.ends.count(found.fate)
            if found.fate is HoldFate.GIVEN_BACK:
                self._publish_given_back(hold, None)
            elif found.fate is HoldFate.UNKNOWN:
                self._record_end_unknown(hold, refusal)
            return
        self.ends.left_open()
        self._record.record_exception(
            f"hold_left:{hold.n}",
            ExceptionCode.HOLD_LEFT_TO_EXPIRY,
            f"Hold {hold.pre_deduct_id} could not be cancelled; it ends by expiry. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
        )

    async def fate_of(self, hold: RequestedHold, *, commit_sent: bool = False) -> Found:
        """How a hold ended whose commit or cancel was refused."""
        if self._outside.earlier.is_possible:
            if not self.forgotten.is_done:  # while they are open the ledger cannot show which end is this hold's
                await self.forgotten.give_back()
            known = sum(bool(each.pre_deduct_id) for each in self.state.asked)
            # A ledger that lags may show the end of an earlier life's hold, and this one not at all.
            if self.forgotten.known > known and workflow.patched(ALL_LIVES_COUNTED):
                known = self.forgotten.known
            others = self.forgotten.own_standing() - (not hold.resolved)
            return await self.ledger.fate_by_all(hold, known=known, but=others)
        return await self.ledger.fate_of(hold, commit_sent=commit_sent)

    def count_committed(self, points: int) -> None:
        """Count the points of a hold that turned out to be committed, unless the ledger was read for the whole task."""
        if self._outside.earlier.is_possible:
            total = points + self.ledger.charged_without_hold() if points else 0
            self.state.charged = max(self.state.charged, total)
        else:
            self.state.charged += points

    def add_charged(self, points: int) -> None:
        """Count points that this run charged, by commit or charge."""
        self.state.charged += points

    def set_shortfall(self, points: int) -> None:
        """Points of the price that could not be charged."""
        self.state.shortfall = points

    # Events and exception records

    def _publish_held(self, hold: RequestedHold, balance_after: int | None) -> None:
        hold.told = hold.amount
        self._record.credits_changed(self.summary())
        self._record.publish(
            f"held:{hold.n}",
            EventType.CREDITS,
            credits_delta=-hold.amount,
            balance_after=balance_after,
            message=f"{hold.amount} points are held.",
        )

    def publish_held(self, hold: RequestedHold) -> None:
        """Publish that a hold was taken, unless that is published; the store does not write a known fact twice."""
        if not hold.told:
            self._publish_held(hold, None)

    def _publish_given_back(self, hold: RequestedHold, balance_after: int | None) -> None:
        """A hold that was never relied on is published as held first, so that the events add up."""
        self.publish_held(hold)
        hold.told_back = True
        self._record.credits_changed(self.summary())
        self._record.publish(
            f"given_back:{hold.n}",
            EventType.CREDITS,
            credits_delta=hold.told,
            balance_after=balance_after,
            message=f"{hold.amount} points were given back.",
        )

    def publish_ends_seen(self) -> None:
        """Publish as given back what was in doubt until a last reading showed that nothing was charged."""
        doubtful = [hold for hold in self.state.granted_holds() if hold.is_doubtful]
        is_known = not self.ends.are_unknown and not self.state.charged
        if doubtful and is_known and workflow.patched(ENDS_SEEN_PUBLISHED):
            for hold in doubtful:
                self._publish_given_back(hold, None)

    def _record_end_unknown(self, hold: RequestedHold, refusal: Refusal) -> None:
        self.ends.mark_unknown()
        self._record.record_exception(
            f"hold_unknown:{hold.n}",
            ExceptionCode.SETTLEMENT_UNKNOWN,
            f"Whether hold {hold.pre_deduct_id} was charged or given back could not be found out; the ledger is read "
            f"again hourly for a day. {refusal.sentence}",
            pre_deduct_id=hold.pre_deduct_id,
            **self.ends.details,
        )


def no_answer() -> Refusal:
    """The refusal that replaces an answer that is no longer waited for."""
    return Refusal(
        code=FailureCode.CREDITS_UNAVAILABLE, message="closing", http_status=0, sentence="The task is ending."
    )
