"""Charges a delivery once (contract §4 *commit refused*, §5 *Charged*). Nothing here is undone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from temporalio import workflow

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.credits import ChargeRequest, CommitRequest, HoldReply
from comfyui_temporal.contracts.errors import Answer, ExceptionCode, Refusal, RefusalKind
from comfyui_temporal.contracts.requests import RequestedHold
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import SHORTFALL_KEY, SHORTFALL_TEXT
from comfyui_temporal.contracts.tasks import SettlementState, TaskInput
from workflows.charges import Charges, ChargeUnknown
from workflows.credit_hold import CreditHold
from workflows.earlier_life import EarlierLifePossible, is_key_of_earlier_life, raise_unless_settled
from workflows.outside_call import OutsideCall
from workflows.task_ledger import HoldFate
from workflows.task_record import TaskRecord

MOST_COMMITS: Final = 20
COMMIT_LOOKED_UP: Final = "commit-of-another-amount-looked-up"
SHORT_AFTER_RESET: Final = "shortfall-beside-a-commit-of-an-earlier-life"
CHARGED_BESIDE: Final = "charges-beside-a-commit-of-an-earlier-life-looked-for"
SENT_BEFORE: Final = "charges-of-earlier-lives-counted-in-what-is-unknown"
NEVER_HELD: Final = "charged-without-a-hold-where-the-price-rose-from-0"
COUNTED_ONCE: Final = "charges-of-earlier-lives-counted-once"
GIVEN_BACK_BEFORE: Final = "charge-of-another-give-back-looked-for"
SHORT_OF_ALL: Final = "shortfall-of-a-completed-task-that-was-charged-nothing"
AFTER_SHOWN: Final = "left-charges-numbered-after-those-of-earlier-lives"


class Paid(NamedTuple):
    """Points charged, and the balance after where it is known."""

    points: int
    balance_after: int | None = None


class Settlement:
    """Commits the open hold and decides what a refusal means."""

    def __init__(
        self,
        task: TaskInput,
        outside: OutsideCall,
        record: TaskRecord,
        hold: CreditHold,
        charges_sent: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        """`charges_sent`: how many charges the histories of earlier lives show; a give-back looks for these itself."""
        self._task = task
        self._outside = outside
        self._record = record
        self._hold = hold
        self._charges_sent = charges_sent
        self.charges = Charges(task, outside, hold.ledger)

    async def charge(self, cost: int) -> None:
        """Charge `cost` points for delivered work. What cannot be charged is recorded, and the task is completed.

        Raises RowEnded where an earlier life has ended the task.
        """
        self.charges.price = self._hold.ends.price = cost
        try:
            if self._outside.earlier.is_possible:
                raise EarlierLifePossible()
            await self._charge(cost)
        except EarlierLifePossible as possible:
            self._hold.add_charged(possible.charged)
            await self._charge(await self._left_by_earlier_lives(cost))

    async def _left_by_earlier_lives(self, cost: int) -> int:
        """What is left to charge of `cost` by the ledger: a commit of any hold settles the task."""
        self._outside.earlier.raise_if_ended()
        forgotten = self._hold.forgotten
        await forgotten.give_back(keep_one=True)
        self._outside.earlier.raise_if_ended()  # the give-back has read the row
        self.charges.taken_before()
        if forgotten.is_unknown:
            await self._record_unknown(self._hold.standing, cost, ChargeUnknown("The task's run was reset."))
        elif forgotten.was_committed and cost > self._hold.state.charged and workflow.patched(SHORT_AFTER_RESET):
            is_known = True
            if self._charges_sent is not None and workflow.patched(CHARGED_BESIDE):
                is_known = await forgotten.look_for_charges(await self._charges_sent())  # of what the hold lacked
            missing = cost - self._hold.state.charged
            if is_known and missing > 0:
                self.record_shortfall(missing)
        return self._hold.state.charged if forgotten.was_committed or forgotten.is_unknown else cost

    async def _charge(self, cost: int) -> None:
        standing = self._hold.standing
        if standing is not None:
            standing.told = standing.told or standing.amount  # of a run that did not record this yet
        cost -= self._hold.state.charged  # another caller may have committed a hold
        # The price of a task that was free may have risen with its delivery.
        is_due = cost > 0 and (
            standing is not None or self._outside.earlier.is_possible or workflow.patched(NEVER_HELD)
        )
        if not is_due:
            await self._hold.give_back("nothing is charged")
            self.settled(None)
            return
        if standing is None:
            await self._charge_without_hold(cost)
            return
        charged, balance_after, is_unknown = 0, None, False
        try:
            charged, balance_after = await self._commit(standing, min(cost, standing.usable))
        except ChargeUnknown as unknown:
            charged, is_unknown = unknown.charged, True
            await self._record_unknown(standing, cost, unknown)
        standing.resolved = True
        self._hold.add_charged(charged)
        await self._hold.give_back("another hold was committed")
        missing = 0 if is_unknown else cost - charged
        if missing > 0 and charged == standing.usable and self._outside.limits.policy.charge_shortfall:
            missing, balance_after = await self._charge_missing(standing, missing, balance_after)
        if missing > 0:
            self.record_shortfall(missing)
        self.settled(balance_after)

    async def _charge_without_hold(self, cost: int) -> None:
        """No hold of any life of the task is open, or none was ever taken: as where one had ended before its commit."""
        missing, balance_after = await self._charge_missing(None, cost, None)
        await self._hold.give_back("nothing is committed")
        if missing > 0:
            self.record_shortfall(missing)
        self.settled(balance_after)

    async def _charge_missing(
        self, hold: RequestedHold | None, missing: int, balance_after: int | None
    ) -> tuple[int, int | None]:
        """Charge what the hold lacked, as the policy says. Returns what is still missing, and the balance after."""
        try:
            more = await self.charges.take(missing)
        except ChargeUnknown as unknown:
            self._hold.add_charged(unknown.charged)
            await self._record_unknown(hold, missing, unknown)
            return 0, None
        self._hold.add_charged(more.points)
        return missing - more.points, more.balance_after if more.points else balance_after

    async def finish(
        self,
        requested: list[Post[ChargeRequest]],
        cost: int | None,
        *,
        is_refused: bool,
        has_read: bool,
        was_completed: bool,
    ) -> None:
        """Finish what a run had begun to charge when it ended. What cannot be charged is recorded.

        `cost`: the whole price in points; None where that is not known. `is_refused`: the last request was, so nothing
        more is charged. `has_read`: `state.charged` is what the ledger shows of the whole task, earlier lives included.
        `was_completed`: the run had handed its results out.
        Raises RowEnded where another give-back has claimed the row, or ended it.
        """
        state = self._hold.state
        sent = requested[:-1] if is_refused else requested
        if has_read:
            state.charged = max(0, state.charged - self.charges.shown_of(sent))  # each of them is learned below
        try:
            learned = await self.charges.learn(sent, by_key=has_read)
            self._hold.add_charged(learned.points)
            # An earlier life may have charged more parts than the run that ended had requested.
            if has_read and sent and self.charges.are_more_shown and workflow.patched(AFTER_SHOWN):
                self._hold.add_charged(self._not_yet_counted())
            missing = max(0, (cost or 0) - state.charged)
            has_begun = bool(requested) or (has_read and not state.is_unknown and self.charges.taken_before() > 0)
            if has_begun and missing and not (is_refused or learned.is_refused):
                self.charges.may_be_sent = workflow.patched(GIVEN_BACK_BEFORE)
                more = await self.charges.take(missing)
                self._hold.add_charged(more.points)
                missing -= more.points
        except ChargeUnknown as unknown:
            self._hold.add_charged(unknown.charged)
            await self._record_unknown(None, cost or 0, unknown)
            return
        is_short = missing > 0 and not state.is_unknown
        if is_short and (state.charged or (was_completed and workflow.patched(SHORT_OF_ALL))):
            self.record_shortfall(missing)

    async def _commit(self, hold: RequestedHold, cost: int) -> Paid:
        n = 1
        answer = await self._ask_commit(hold, cost, n=n)
        while is_key_of_earlier_life(answer, self._outside.earlier) and n < MOST_COMMITS:
            n += 1  # an earlier life's commit used the key and was refused: every other hold is cancelled
            answer = await self._ask_commit(hold, cost, n=n)
        if answer.refusal is not None and answer.refusal.kind is RefusalKind.HOLD_TOO_SMALL:
            hold.amount = await self._hold.ledger.frozen_by(hold)
            cost = min(cost, hold.amount)
            answer = await self._ask_commit(hold, cost, n=n + 1)
        if answer.reply is None:
            return await self._by_ledger(hold, cost, answer.refusal)
        charged = answer.reply.frozen_amount
        if charged != cost and workflow.patched(COMMIT_LOOKED_UP):
            return await self._by_ledger(hold, cost, None, f"The commit of {cost} points was answered with {charged}.")
        self._hold.ends.count(HoldFate.COMMITTED)
        return Paid(cost, answer.reply.balance_after)

    async def _by_ledger(self, hold: RequestedHold, cost: int, refusal: Refusal | None, said: str = "") -> Paid:
        """Already resolved, not found, any other definite refusal, or another amount: the ledger decides."""
        found = await self._hold.fate_of(hold, commit_sent=True)
        if found.fate is HoldFate.COMMITTED:
            self._hold.ends.count(HoldFate.COMMITTED)
            return Paid(found.committed)
        if found.fate is HoldFate.UNKNOWN:
            raise ChargeUnknown(refusal.sentence if refusal else said)
        self._hold.ends.count(HoldFate.GIVEN_BACK)
        charged = self._not_yet_counted()
        if charged >= cost:
            return Paid(charged)
        more = await self.charges.take(cost - charged, before=charged)
        return Paid(charged + more.points, more.balance_after)

    def _not_yet_counted(self) -> int:
        """Points that the ledger shows as charged for the task, and that `state.charged` does not hold yet."""
        charges, ledger = self.charges.taken_before(), self._hold.ledger.newest
        shown = ledger.charged() if ledger is not None else None
        more = max(0, (charges if shown is None else shown) - self._hold.state.charged)
        return more if more != charges and workflow.patched(COUNTED_ONCE) else charges

    async def _ask_commit(self, hold: RequestedHold, cost: int, *, n: int) -> Answer[HoldReply]:
        assert hold.pre_deduct_id is not None
        body = CommitRequest(
            pre_deduct_id=hold.pre_deduct_id,
            actual_cost=cost,
            task_id=self._task.task_id,
            tenant_id=self._task.tenant_id,
            template_id=self._task.template_id,
            user_id=self._task.user_id,
        )
        post = Post[CommitRequest](
            call_for=self._outside.call_for,
            key=self._outside.key("commit", n),
            body=body,
            has_read_ledger=self._outside.earlier.is_possible,
            price=self.charges.price,
        )
        answer = await self._outside.until_answered(CreditsActivities.commit, post, summary=self._outside.labels.commit)
        assert answer is not None
        raise_unless_settled(answer)
        return answer

    # Events and exception records

    async def _record_unknown(self, hold: RequestedHold | None, cost: int, unknown: ChargeUnknown) -> None:
        self._hold.ends.mark_unknown()
        sent = self.charges.sent
        if self._outside.earlier.is_possible and self._charges_sent is not None and workflow.patched(SENT_BEFORE):
            sent = max(sent, await self._charges_sent())
        self._hold.ends.charges = max(self._hold.ends.charges, sent)
        self._record.record_exception(
            self._hold.ends.unknown_key,
            ExceptionCode.SETTLEMENT_UNKNOWN,
            f"Whether {cost} points were charged could not be found out; nothing more is charged, and the ledger is "
            f"read again hourly for a day. {unknown}",
            pre_deduct_id=hold.pre_deduct_id if hold else None,
            cost=cost,
            **self._hold.ends.details,
        )

    def record_shortfall(self, points: int) -> None:
        self._hold.set_shortfall(points)
        self._record.record_exception(
            SHORTFALL_KEY,
            ExceptionCode.SHORTFALL,
            SHORTFALL_TEXT.format(points=points),
            shortfall=points,
        )

    def record_rest(self, price: int) -> None:
        """Record what earlier lives of the task did not charge of the price that they requested."""
        state = self._hold.state
        if price > state.charged and not state.is_unknown:
            self.record_shortfall(price - state.charged)

    def settled(self, balance_after: int | None) -> None:
        """Publish what was charged and returned, or that this is unknown."""
        self._hold.ends.close()
        credits = self._record.credits_changed(self._hold.summary())
        if credits.settlement is SettlementState.UNKNOWN:
            message = "Whether points were charged is not known yet; the ledger is read again."
            self._record.publish("settled", EventType.CREDITS, message=message)
            return
        self._record.publish(
            "settled",
            EventType.CREDITS,
            credits_delta=self._hold.published_as_held - (credits.charged or 0),
            balance_after=balance_after,
            message=f"{credits.charged} points were charged, {credits.returned} returned.",
        )
