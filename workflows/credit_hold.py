"""The credits held for one task: estimated, held, topped up, and renewed during any wait of the run (contract §4).

The new hold is taken first, then the old one is cancelled. The task is without cover only where the balance is too
short for both. A renewal that hangs is suspended when the run continues as new; the next run repeats its key and body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.credits import Estimate, EstimateRequest, HoldReply
from comfyui_temporal.contracts.errors import CREDITS_ERRORS, ExceptionCode, FailureCode, Refusal
from comfyui_temporal.contracts.requests import HoldState, RequestedHold
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.tasks import TaskInput
from workflows.earlier_life import is_key_of_earlier_life
from workflows.failures import RowEnded, TaskFailed
from workflows.outside_call import OutsideCall
from workflows.row_look import LOOK_AGAIN_AT_MOST, RowLook
from workflows.step_labels import HOLD, wait_in
from workflows.task_holds import LAST_SECONDS, Back, HoldRefused, TaskHolds, no_answer
from workflows.task_record import TaskRecord

REFUSED_AGAIN_AFTER: Final = timedelta(seconds=30)
LOOK_AGAIN_AFTER: Final = timedelta(seconds=1)
LEFT_FOR_LATE: Final = 0.75
"""The share of a hold's life after which it is renewed even while the hold before is still being given back."""
POINTS_AWAITED: Final = "points-of-the-old-hold-awaited-by-the-next-run"
FIRST_HOLD: Final = "free-training-held-once-its-price-rises"
NOTHING_HELD: Final = "Nothing was held for the task's price, and the hold was refused."
FORGOTTEN_FIRST: Final = "hold-of-an-earlier-life-given-back-where-the-balance-is-short"
FORGOTTEN_BESIDE: Final = "hold-of-an-earlier-life-given-back-before-an-own-one"
FORGOTTEN_BEFORE_FIRST: Final = "hold-of-an-earlier-life-given-back-before-the-first-hold"
LANDED_FIRST: Final = "calls-of-an-earlier-life-awaited-where-the-balance-is-short"
TOO_SHORT: Final = "The balance was too short for the renewal and the old hold together."

_TOP_UP: Final = next(row.advice for row in CREDITS_ERRORS if row.failure is FailureCode.INSUFFICIENT_BALANCE)


def _always() -> bool:
    return True


class RenewalSuspended(Exception):
    """The run is about to continue as new: the next one repeats the request."""


class CreditHold(TaskHolds):
    """The one open hold, renewed before it ends. Two are open only during a renewal."""

    def __init__(
        self,
        task: TaskInput,
        outside: OutsideCall,
        record: TaskRecord,
        deadline: Callable[[], datetime],
        state: HoldState,
        look: RowLook | None = None,
        *,
        deadline_is_fixed: Callable[[], bool] = _always,
    ) -> None:
        """`deadline_is_fixed`: False before an attempt has begun, while the deadline moves with the present."""
        super().__init__(task, outside, record, deadline, state, look)
        self._uncovered_limit = SCENES[task.scene].uncovered_limit
        self._deadline_is_fixed = deadline_is_fixed
        self._renewal: asyncio.Task[None] | None = None
        self._required = 0
        self._is_closing = False
        self._is_taking = False
        self._exhausted: Refusal | None = None

    @property
    def covered(self) -> int:
        """Points requested for the open hold, or else the last one: the present price is compared with them."""
        granted = [hold for hold in self.state.asked if hold.pre_deduct_id]
        newest = self.standing or (granted[-1] if granted else None)
        return newest.request.estimated_cost if newest else 0

    # Estimate

    async def estimate(self, request: EstimateRequest, *, n: int | str, summary: str) -> Estimate:
        """The credits service's price. `n`: for the key. Raises as `OutsideCall.setup`, TaskFailed for a refusal."""
        post = Post[EstimateRequest](
            call_for=self._outside.call_for, key=self._outside.key("estimate", n), body=request
        )
        answer = await self._outside.read(CreditsActivities.estimate, post, summary=summary)
        if is_key_of_earlier_life(answer, self._outside.earlier):
            again = f"{n}:{workflow.info().get_current_history_length()}"
            return await self.estimate(request, n=again, summary=summary)
        if answer.reply is None:
            raise TaskFailed.by_refusal(answer.refusal or no_answer())
        self.state.estimated = answer.reply.selected_cost
        return answer.reply

    async def check_balance(self, estimate: Estimate) -> None:
        """Raise TaskFailed `insufficient_balance` where the balance cannot cover the estimate.

        Not where the service tells no balance. Not where a hold stands or an earlier life may have one: its points are
        no longer in the balance. Nothing before has read the row, so it is read here. Raises RowEnded too, and while
        the store is away as `InterruptibleWaits.until`.
        """
        cost, balance = estimate.selected_cost, estimate.current_balance
        is_held = self.standing is not None or self._outside.earlier.is_possible
        if balance is None or balance >= cost or is_held:
            return
        if workflow.patched("row-looked-at-before-the-balance-is-too-short") and await self._has_earlier_life():
            return
        raise TaskFailed(
            FailureCode.INSUFFICIENT_BALANCE,
            f"The task would cost {cost} points and the balance is {balance}; nothing was submitted. {_TOP_UP}",
        )

    async def _has_earlier_life(self) -> bool:
        while not await self._look.once():
            wait = wait_in(self._outside.labels.read_row, "once the store is back")
            await self._outside.waits.until(lambda: False, at=workflow.now() + LOOK_AGAIN_AT_MOST, summary=wait)
        self._outside.earlier.raise_if_ended()
        return self._outside.earlier.life.is_sure

    # Row 3: hold

    async def cover(self, cost: int) -> None:
        """Make sure that `cost` points are held; a dearer job tops the hold up first (contract §1).

        A start that waits is answered then. Raises TaskFailed with the refusal's code, and as `OutsideCall.setup`.
        """
        await self._covered(cost)
        self._record.answers.held()

    async def _covered(self, cost: int) -> None:
        await self._renewal_over()
        old = self.standing
        if cost == 0 or (old is not None and old.request.estimated_cost >= cost):
            await self._outside.waits.covered()
            return
        self._is_taking = True
        try:
            await self._top_up(old, cost)
        finally:
            self._is_taking = False
        # The pause followed a refusal beside the old hold.
        if self.state.next_renewal_at is not None and workflow.patched("new-hold-ends-the-pause"):
            self.state.next_renewal_at = None

    async def _renewal_over(self) -> None:
        """Wait until no renewal is in flight. It may be refused for an hour. Raises as `cover`."""
        if self._is_interrupted() and self._renewal is None:
            self._begin_renewal()
        while self._renewal is not None:
            renewal, waits = self._renewal, self._outside.waits
            if waits.keeps_hold():
                await waits.in_time(
                    lambda renewal=renewal: renewal.done() or renewal is not self._renewal,  # type: ignore[misc]
                    summary=wait_in(HOLD, "its renewal"),
                )
            else:
                await self._outside.wait_unless_stopped(renewal.done)
            if renewal is self._renewal:
                self._finish_renewal()

    async def _top_up(self, old: RequestedHold | None, cost: int) -> None:
        try:
            await self._take(cost, self._request_setup, self._outside.may_begin, self._returned_in_time)
        except HoldRefused as refused:
            is_short = refused.refusal.code is FailureCode.INSUFFICIENT_BALANCE
            if is_short and await self._forgotten_given_back(self._returned_in_time):
                await self._top_up(old, cost)
                return
            if old is None or not is_short:
                raise TaskFailed.by_refusal(refused.refusal) from None
            await self._top_up_without_cover(old, cost)
            return
        if old is not None:
            await self._release(old, "topped up")

    async def _forgotten_given_back(self, back: Back) -> bool:
        """Give back what an earlier life holds: a service without keys takes a second hold. Once. Whether one ended."""
        if self.forgotten.is_done or not self._outside.earlier.is_possible or not workflow.patched(FORGOTTEN_FIRST):
            return False
        was_covered = self.standing is not None
        if was_covered and not workflow.patched(FORGOTTEN_BESIDE):
            return False
        before = self.forgotten.cancelled
        self._forgetting = giving_back = asyncio.create_task(self._forgotten_back())
        await back(giving_back.done)
        if not giving_back.done():
            return False
        giving_back.result()
        if self.forgotten.cancelled == before:
            return False
        if not was_covered:
            self._record_uncovered("The balance was too short for a hold beside that from before the run was reset.")
        return True

    async def _forgotten_back(self) -> None:
        """A call of the earlier life may be in flight still: its hold has no id in the row before it has ended."""
        if workflow.patched(LANDED_FIRST):
            await self._look.once()
            await self._look.once_all_has_landed()
        await self.forgotten.give_back()

    async def _top_up_without_cover(self, old: RequestedHold, cost: int) -> None:
        await self._release(old, "topped up", self._returned_in_time)
        self._record_uncovered("The balance was too short for the higher price and the old hold together.")
        try:
            await self._take(cost, self._request_setup, self._outside.may_begin, self._returned_in_time)
        except HoldRefused as refused:
            raise TaskFailed.by_refusal(refused.refusal) from None
        self.state.uncovered_since = None

    async def _returned_in_time(self, is_back: Callable[[], bool]) -> None:
        await self._outside.waits.in_time(is_back, summary=wait_in(HOLD, "the old one's points"))

    async def _request_setup(self, hold: RequestedHold) -> HoldReply:
        try:
            answer = await self._outside.setup(CreditsActivities.pre_deduct, self._post(hold), summary=HOLD)
        except RowEnded as end:
            if end.is_unsent and workflow.patched("unsent-hold-not-undone"):
                hold.refused = True
            raise
        return self._granted(hold, answer)

    # Kept alive while the run waits

    def is_needed(self) -> bool:
        """Whether a hold was ever granted, or is being requested: a free task has none to keep."""
        return self._renewal is not None or any(hold.pre_deduct_id for hold in self.state.asked)

    def is_covered(self) -> bool:
        """Whether work may begin under the hold. Without one: the price is 0, or another caller has charged it."""
        hold = self.standing
        return self.state.uncovered_since is None and (hold is None or self._life_of(hold) >= LAST_SECONDS)

    def due(self) -> datetime | None:
        """When to renew the open hold, or to take the first one; None while it lasts beyond the deadline, the task is
        free, or a renewal is running.
        """
        hold = self.standing
        if self._renewal is not None or self._is_taking:
            return None
        if self._is_interrupted():
            return workflow.now()
        if hold is None:
            return workflow.now() if self._is_first_due() else None
        due = self._due_of(hold)
        if due is None or self._releasing is None:
            return due
        # A third hold is taken only where the open one would run out.
        return max(due, hold.asked_at + timedelta(seconds=hold.request.expire_in * LEFT_FOR_LATE))

    def _due_of(self, hold: RequestedHold) -> datetime | None:
        if self._required > hold.request.estimated_cost:
            return self.state.next_renewal_at or workflow.now()
        spare = self._expires_at(hold) - self._deadline() - timedelta(seconds=self._margin_seconds)
        half_life = hold.asked_at + timedelta(seconds=hold.request.expire_in / 2)
        if spare >= timedelta(0):
            return None if self._deadline_is_fixed() else max(half_life, workflow.now() + max(spare, LOOK_AGAIN_AFTER))
        return max(half_life, self.state.next_renewal_at or half_life)

    def _is_first_due(self) -> bool:
        """Whether a task that was free until now has a price: nothing is held, and nothing was charged."""
        is_priced = self._required > 0 and not self.state.charged and self._exhausted is None
        return is_priced and workflow.patched(FIRST_HOLD)

    def _is_interrupted(self) -> bool:
        """Whether a renewal was suspended when the run continued as new: in its request, or without cover."""
        is_uncovered = self.state.uncovered_since is not None and self.standing is None
        return self._exhausted is None and (self.state.asking is not None or is_uncovered)

    def is_renewing(self) -> bool:
        return self._renewal is not None

    def has_update(self) -> bool:
        return any(task is not None and task.done() for task in (self._renewal, self._releasing))

    def check(self) -> None:
        """Start a renewal that is due; finish one that has ended. Raises TaskFailed `credit_exhausted`."""
        if self._renewal is not None and self._renewal.done():
            self._finish_renewal()
        if self._releasing is not None and self._releasing.done():
            self._releasing.result()
            self._releasing = None
        self._raise_if_exhausted()
        due = self.due()
        if due is not None and workflow.now() >= due:
            self._begin_renewal()

    def require(self, amount: int) -> None:
        """Set the present price in points. Where it is above the hold, a renewal to it is due at once."""
        self._required = amount

    def checkpoint_passed(self) -> None:
        """A training reached a checkpoint. A task without cover is stopped at its next one."""
        self.state.checkpoint_passed = True

    def _finish_renewal(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.result()
        self._raise_if_exhausted()

    def _raise_if_exhausted(self) -> None:
        if self._exhausted is not None:
            raise TaskFailed(
                FailureCode.CREDIT_EXHAUSTED,
                f"The credits for this task ran out and could not be held again ({self._exhausted.sentence}).",
            )

    # Renewal: in the background

    def _begin_renewal(self) -> None:
        # Neither is known of a first hold that the run before had requested.
        amount = max(self.covered, self._required) or self.state.asked[-1].request.estimated_cost
        self._renewal = asyncio.create_task(self._renew(amount))

    async def _renew(self, amount: int) -> None:
        with suppress(RenewalSuspended):
            if self.standing is None and self.state.uncovered_since is not None:
                await self._old_points_back()
                await self._cover_after_gap(amount, self.state.uncovered_since)
            else:
                await self._renew_standing(amount)

    async def _old_points_back(self) -> None:
        """A renewal that was suspended without cover may not have its old hold's points back: wait for them first."""
        if self._next_leaving() is None or not workflow.patched(POINTS_AWAITED):
            return
        self.resume()
        await self._returned_or_closing(lambda: self._next_leaving() is None)
        self.state.uncovered_since = workflow.now()

    async def _renew_standing(self, amount: int) -> None:
        old = self.standing
        try:
            await self._take_renewing(amount)
        except HoldRefused as refused:
            if self._is_closing:
                return
            if old is None:
                await self._first_refused(amount, refused.refusal)
                return
            is_last = self._life_of(old) <= LAST_SECONDS
            if is_last or not await self._taken_again(amount, refused.refusal):
                await self._refused_beside(old, amount)
                return
            if self.standing is old:
                return
        self.state.next_renewal_at = None
        if old is None:
            return
        if workflow.now() >= self._expires_at(old):
            self._record_uncovered("The credits service did not answer until the old hold had expired.")
            self.state.uncovered_since = None
        await self._release(old, "renewed")

    async def _refused_beside(self, old: RequestedHold, amount: int) -> None:
        """The old hold is kept while it lasts."""
        left = self._life_of(old)
        if left > LAST_SECONDS:
            self.state.next_renewal_at = workflow.now() + max(left / 2, min(left - LAST_SECONDS, LAST_SECONDS))
            return
        await self._replace_without_cover(old, amount)

    async def _first_refused(self, amount: int, refusal: Refusal) -> None:
        """A task that was free has a price now, and no hold: it is without cover."""
        if not workflow.patched(FIRST_HOLD) or await self._taken_again(amount, refusal):
            return
        self._record_uncovered(NOTHING_HELD)
        self.state.uncovered_since = since = workflow.now()
        self.state.checkpoint_passed = False
        await self._cover_after_gap(amount, since)

    async def _taken_again(self, amount: int, refusal: Refusal) -> bool:
        """Where an earlier life holds the points: give them back. Returns whether they are held now, or need not be."""
        is_short = refusal.code is FailureCode.INSUFFICIENT_BALANCE and self._outside.earlier.is_possible
        if not is_short or not workflow.patched(FORGOTTEN_BEFORE_FIRST):
            return False
        if await self._forgotten_given_back(self._returned_or_closing):
            with suppress(HoldRefused):
                await self._take_renewing(amount)
                return True
        return self._is_closing

    async def _replace_without_cover(self, old: RequestedHold, amount: int) -> None:
        """In the old hold's last minute, with a balance too short for both: cancel it and take a new one at once."""
        self.state.uncovered_since = workflow.now()
        self.state.checkpoint_passed = False
        try:
            await self._release(old, "renewed", self._returned_or_closing)
        except RenewalSuspended:
            self._record_uncovered(TOO_SHORT)
            raise
        self._record_uncovered(TOO_SHORT)
        self.state.uncovered_since = since = workflow.now()
        await self._cover_after_gap(amount, since)

    async def _cover_after_gap(self, amount: int, since: datetime) -> None:
        """Request a hold until it is granted, the next checkpoint is reached or the limit has passed."""
        while not self._is_closing:
            try:
                await self._take_renewing(amount)
            except HoldRefused as refused:
                refusal = refused.refusal
            else:
                self.state.uncovered_since = None
                return
            if self.state.checkpoint_passed or workflow.now() - since >= self._uncovered_limit:
                self._exhausted = refusal
                return
            await self._outside.wait_for(
                REFUSED_AGAIN_AFTER,
                lambda: self._is_closing or self.state.checkpoint_passed,
                summary=wait_in(HOLD, "refused"),
            )

    async def _take_renewing(self, amount: int) -> None:
        """Take a hold in the background. One that was requested before the renewal was suspended comes first."""
        first = next((hold for hold in self.state.asked if hold.n == self.state.asking), None)
        await self._take(amount, self._request_renewal, self._may_renew, self._returned_or_closing, first=first)

    def _may_renew(self) -> None:
        if self._is_closing:
            raise HoldRefused(no_answer())
        if self._outside.is_suspended:
            raise RenewalSuspended

    async def _request_renewal(self, hold: RequestedHold) -> HoldReply:
        """An outage is no refusal: the call is retried, also without cover, and recorded."""
        is_repeat = self.state.asking == hold.n
        self.state.asking = hold.n
        answer = await self._outside.in_background(
            CreditsActivities.pre_deduct, self._post(hold), summary=HOLD, give_up=lambda: self._is_closing
        )
        if answer is None and not self._is_closing:
            raise RenewalSuspended
        self.state.asking = None
        if answer is None:
            raise HoldRefused(no_answer())
        answer.tries += is_repeat
        return self._granted(hold, answer)

    async def _returned_or_closing(self, is_back: Callable[[], bool]) -> None:
        await workflow.wait_condition(lambda: is_back() or self._is_closing or self._outside.is_suspended)
        if not is_back() and not self._is_closing:
            raise RenewalSuspended

    # Before anything is settled or given back

    async def settled_renewal(self) -> None:
        """Wait until no renewal and no give-back of an old hold is in flight. Raises TaskFailed `credit_exhausted`."""
        if self._renewal is None and self._is_interrupted():
            self._begin_renewal()
        if self._renewal is not None:
            await workflow.wait([self._renewal])
            self._finish_renewal()
        self._raise_if_exhausted()
        self.resume()
        await self._all_released()

    def close(self) -> None:
        """Request no further hold."""
        self._is_closing = True

    async def give_back(self, reason: str) -> None:
        """The undo. No further hold is requested, and a renewal in flight ends first."""
        self._is_closing = True
        if self._renewal is not None:
            await workflow.wait([self._renewal])
            self._renewal.result()
            self._renewal = None
        await super().give_back(reason)

    def _record_uncovered(self, reason: str) -> None:
        now = workflow.now().isoformat()
        self._record.record_exception(f"uncovered:{now}", ExceptionCode.UNCOVERED, reason)
