"""Row 5, delivered: the price is charged once (contract §4 *commit refused*, §5 *Charged*). Nothing here is undone."""

from __future__ import annotations

from activities.credits import CreditsActivities
from contracts.calls import Post
from contracts.carried import AskedHold
from contracts.credits import CHARGE_REASON, MAX_CHARGE_POINTS, ChargeRequest, CommitRequest, HoldReply
from contracts.errors import Answer, ExceptionCode, Refusal
from contracts.tasks import EventType, ImageTask, TrainingTask
from workflows.credit_hold import CreditHold
from workflows.ledger_search import HoldFate
from workflows.outside_call import OutsideCall
from workflows.task_record import TaskRecord


class Settlement:
    """Commits the standing hold and decides what a refusal means."""

    def __init__(
        self, task: ImageTask | TrainingTask, outside: OutsideCall, record: TaskRecord, hold: CreditHold
    ) -> None:
        self._task = task
        self._outside = outside
        self._record = record
        self._hold = hold
        self.charge_shortfall = False
        self._charges = 0

    async def charge(self, cost: int) -> None:
        """Charge `cost` points for delivered work; what cannot be charged is recorded, and the task is completed."""
        standing = self._hold.standing
        cost -= self._hold.state.charged  # what a hold was committed for by somebody else counts
        if standing is None or cost <= 0:
            await self._hold.give_back("nothing is charged")
            self._settled(None)
            return
        charged, balance_after = await self._commit(standing, min(cost, standing.amount))
        standing.resolved = True
        self._hold.state.charged += charged or 0
        await self._hold.give_back("another hold was committed")
        missing = cost - charged if charged is not None else 0
        if missing > 0 and charged == standing.amount and self.charge_shortfall:
            more, balance_after = await self._charge_in_parts(missing, balance_after)
            self._hold.state.charged += more
            missing -= more
        if missing > 0:
            self._tell_shortfall(missing)
        self._settled(balance_after)

    async def _commit(self, hold: AskedHold, cost: int) -> tuple[int | None, int | None]:
        """Points charged (None: unknown) and the balance after."""
        answer = await self._ask_commit(hold, cost, n=1)
        if answer.reply is not None:
            return cost, answer.reply.balance_after
        if answer.refusal is not None and answer.refusal.message == "hold_insufficient":
            hold.amount = await self._hold.ledger.frozen_by(hold)
            cost = min(cost, hold.amount)
            answer = await self._ask_commit(hold, cost, n=2)
            if answer.reply is not None:
                return cost, answer.reply.balance_after
        return await self._commit_refused(hold, cost, answer.refusal)

    async def _commit_refused(
        self, hold: AskedHold, cost: int, refusal: Refusal | None
    ) -> tuple[int | None, int | None]:
        """Already processed, not found, or any other definite refusal: the ledger decides, absence is never proof."""
        found = await self._hold.ledger.fate_of(hold)
        if found.fate is HoldFate.COMMITTED:
            return found.committed, None
        if found.fate is HoldFate.GIVEN_BACK:
            return await self._charge_in_parts(cost, None)
        self._record.tell_exception(
            "settlement_unknown",
            ExceptionCode.SETTLEMENT_UNKNOWN,
            f"Whether {cost} points were charged could not be learned; nothing more is charged. "
            f"{refusal.sentence if refusal else ''}",
            pre_deduct_id=hold.pre_deduct_id,
            cost=cost,
        )
        return None, None

    async def _ask_commit(self, hold: AskedHold, cost: int, *, n: int) -> Answer[HoldReply]:
        assert hold.pre_deduct_id is not None
        body = CommitRequest(
            pre_deduct_id=hold.pre_deduct_id,
            actual_cost=cost,
            task_id=self._task.task_id,
            tenant_id=self._task.tenant_id,
            template_id=self._task.template_id,
            user_id=self._task.user_id,
        )
        post = Post[CommitRequest](call_for=self._outside.call_for, key=self._outside.key("commit", n), body=body)
        answer = await self._outside.until_answered(CreditsActivities.commit, post, summary="5 commit")
        assert answer is not None
        return answer

    async def _charge_in_parts(self, points: int, balance_after: int | None) -> tuple[int, int | None]:
        """Charge without a hold, at most 2000 points a call; a refusal leaves the rest as shortfall.

        Every part of a task has a key of its own: a repeated one would charge nothing and seem to have.
        """
        charged = 0
        for amount in _parts(points):
            self._charges += 1
            body = ChargeRequest(
                tenant_id=self._task.tenant_id,
                user_id=self._task.user_id,
                template_id=self._task.template_id,
                task_id=self._task.task_id,
                amount=amount,
                priority=self._task.priority,
                reason=CHARGE_REASON,
            )
            key = self._outside.key("charge", self._charges)
            post = Post[ChargeRequest](call_for=self._outside.call_for, key=key, body=body)
            answer = await self._outside.until_answered(CreditsActivities.charge, post, summary="5 charge")
            if answer is None or answer.reply is None:
                break
            charged, balance_after = charged + amount, answer.reply.balance_after
        return charged, balance_after

    def _tell_shortfall(self, points: int) -> None:
        self._hold.state.shortfall = points
        self._record.tell_exception(
            "shortfall",
            ExceptionCode.SHORTFALL,
            f"{points} points of this task's price could not be charged.",
            shortfall=points,
        )

    def _settled(self, balance_after: int | None) -> None:
        credits = self._record.state.credits = self._hold.summary()
        self._record.tell(
            "settled",
            EventType.CREDITS,
            credits_delta=credits.returned,
            balance_after=balance_after,
            message=f"{credits.charged} points were charged, {credits.returned} returned.",
        )


def _parts(points: int) -> list[int]:
    whole, rest = divmod(points, MAX_CHARGE_POINTS)
    return [MAX_CHARGE_POINTS] * whole + ([rest] if rest else [])
