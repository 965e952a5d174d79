"""Charges points without a hold, for delivered work whose hold had ended (contract §4 *commit refused*).

At most 2000 points a call, each part with a key of its own: with a repeated key the service would charge nothing and
answer as if it had.
A service that keeps no keys may have acted on a call without an answer. So each part is sent once; without an answer
the ledger decides whether it may be sent again.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import FailureError

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import Post, number_in
from comfyui_temporal.contracts.credits import CHARGE_REASON, MAX_CHARGE_POINTS, ChargeReply, ChargeRequest
from comfyui_temporal.contracts.errors import Answer, FailureCode
from comfyui_temporal.contracts.requests import refuses_charge
from comfyui_temporal.contracts.tasks import TaskInput
from workflows.earlier_life import EarlierLifePossible, is_of_store, raise_unless_settled
from workflows.failures import failure_from
from workflows.ledger_search import LedgerSearch, Shown
from workflows.outside_call import OutsideCall
from workflows.step_labels import wait_in

SENT_ONCE: Final = "charge-sent-once"
NUMBERED_BY_LEDGER: Final = "charge-numbered-as-the-ledger-shows-it"
ONE_TRY: Final = RetryPolicy(maximum_attempts=1)
STORE_AGAIN_AFTER: Final = timedelta(seconds=2)
"""Doubled each time, up to `STORE_AGAIN_AT_MOST`."""
STORE_AGAIN_AT_MOST: Final = timedelta(minutes=1)
MAX_SENDINGS: Final = 6
"""Of one part to a service that keeps no keys: after each the ledger did not show it for 10 minutes."""


class ChargeUnknown(Exception):
    """Whether points were charged could not be found out. `charged`: what this settlement is known to have charged."""

    def __init__(self, sentence: str, *, charged: int = 0) -> None:
        self.charged = charged
        super().__init__(sentence)


class Charged(NamedTuple):
    """Points charged in all parts, and the balance after where it is known."""

    points: int
    balance_after: int | None = None
    is_refused: bool = False
    """A part was refused: the rest stays uncharged."""


class Charges:
    """The parts of one task, numbered 1, 2, 3 … as the ledger shows them.

    A part that a reset kept from being charged leaves its number to the next one: with a number too high the ledger
    would never seem to show that one.
    """

    def __init__(self, task: TaskInput, outside: OutsideCall, ledger: LedgerSearch) -> None:
        self._task = task
        self._outside = outside
        self._ledger = ledger
        self._n = 0
        self.price: int | None = None
        """The whole price of the delivered work, in points: a give-back finds it in each request."""

    def taken_before(self) -> int:
        """Points that the ledger showed as charged when it was last read; their numbers are taken."""
        shown = self._ledger.newest
        self._n = max(self._n, len(shown.charges) if shown is not None else 0)
        return self._ledger.charged_without_hold()

    def shown_of(self, requested: list[Post[ChargeRequest]]) -> int:
        """Points of these parts that the last reading shows."""
        newest = self._ledger.newest
        shown = len(newest.charges) if newest is not None else 0
        return sum(post.body.amount for post in requested if number_in(post.key) <= shown)

    async def take(self, points: int, *, before: int = 0) -> Charged:
        """Charge `points`; after a refusal the rest stays uncharged. Raises ChargeUnknown and EarlierLifePossible.

        `before`: what was charged for the task until now, for the failure.
        """
        charged, balance_after = 0, None
        for amount in _parts(points):
            self._n += 1
            try:
                answer = await self._sent(self._post(amount))
            except ChargeUnknown as unknown:
                raise ChargeUnknown(str(unknown), charged=before + charged) from None
            except EarlierLifePossible:
                if not workflow.patched(NUMBERED_BY_LEDGER):
                    raise
                self._n -= 1
                raise EarlierLifePossible(charged=charged) from None
            if answer.reply is None:
                return Charged(charged, balance_after, is_refused=True)
            charged, balance_after = charged + amount, answer.reply.balance_after
        return Charged(charged, balance_after)

    async def learn(self, requested: list[Post[ChargeRequest]], *, by_key: bool) -> Charged:
        """What became of parts that a run had requested when it ended. Raises ChargeUnknown.

        `by_key`: each has its key's number, as charges of earlier lives may come before. False for older give-backs.
        """
        charged, balance_after = 0, None
        for post in requested:
            self._n = number_in(post.key) if by_key else self._n + 1
            try:
                answer = await self._unanswered(post, "its run had ended")
            except ChargeUnknown as unknown:
                raise ChargeUnknown(str(unknown), charged=charged) from None
            if answer.reply is None:
                return Charged(charged, balance_after, is_refused=True)
            charged, balance_after = charged + post.body.amount, answer.reply.balance_after
        return Charged(charged, balance_after)

    def _post(self, amount: int) -> Post[ChargeRequest]:
        body = ChargeRequest(
            tenant_id=self._task.tenant_id,
            user_id=self._task.user_id,
            template_id=self._task.template_id,
            task_id=self._task.task_id,
            amount=amount,
            priority=self._task.priority,
            reason=CHARGE_REASON,
        )
        key = self._outside.key("charge", self._n)
        has_read = self._outside.earlier.is_possible
        return Post[ChargeRequest](
            call_for=self._outside.call_for, key=key, body=body, has_read_ledger=has_read, price=self.price
        )

    async def _sent(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        """The answer to a part: what was charged, or a refusal. Raises ChargeUnknown."""
        if not workflow.patched(SENT_ONCE):
            return await self._repeated(post)
        newest = self._ledger.newest
        if self._outside.earlier.is_possible and not (newest is not None and newest.has_kinds):
            return await self._unanswered(post, "the task's run was reset")  # an earlier life may have sent it
        try:
            answer = await self._once(post)
        except FailureError as error:
            return await self._unanswered(post, str(failure_from(error, FailureCode.CREDITS_UNAVAILABLE)))
        return await self._decided(post, answer)

    async def _once(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        """Send it once. While the task store is away nothing is sent, and this waits. Raises FailureError."""
        wait = STORE_AGAIN_AFTER
        while True:
            handle = self._outside.visible(
                CreditsActivities.charge, post, summary=self._outside.labels.charge, retry=ONE_TRY
            )
            try:
                return await handle
            except FailureError as error:
                if not is_of_store(error):
                    raise
            await workflow.sleep(wait, summary=wait_in(self._outside.labels.charge, "the task store is away"))
            wait = min(2 * wait, STORE_AGAIN_AT_MOST)

    async def _unanswered(self, post: Post[ChargeRequest], reason: str) -> Answer[ChargeReply]:
        """A part without an answer: the ledger shows what became of it, or whether it may be sent again."""
        for _ in range(MAX_SENDINGS):
            match await self._ledger.charge_shown(self._n):
                case Shown.CHARGED:
                    return self._by_ledger(post)
                case Shown.KEEPS_KEYS:
                    return await self._decided(post, await self._repeated(post))
                case Shown.UNKNOWN:
                    break
            try:
                return await self._decided(post, await self._once(post))
            except FailureError as error:
                reason = str(failure_from(error, FailureCode.CREDITS_UNAVAILABLE))
        raise ChargeUnknown(reason)

    async def _repeated(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        answer = await self._outside.until_answered(CreditsActivities.charge, post, summary=self._outside.labels.charge)
        assert answer is not None
        return answer

    async def _decided(self, post: Post[ChargeRequest], answer: Answer[ChargeReply]) -> Answer[ChargeReply]:
        """An answer that does not say whether it was charged is looked up in the ledger."""
        raise_unless_settled(answer)
        if answer.refusal is None or refuses_charge(answer):
            return answer
        if await self._ledger.charge_shown(self._n, may_repeat=False) is Shown.CHARGED:
            return self._by_ledger(post)
        raise ChargeUnknown(answer.refusal.sentence)

    def _by_ledger(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        """The missing reply, made from the ledger."""
        return Answer(reply=ChargeReply(ledger_id=f"charge-{self._n}", change=-post.body.amount))


def _parts(points: int) -> list[int]:
    whole, rest = divmod(points, MAX_CHARGE_POINTS)
    return [MAX_CHARGE_POINTS] * whole + ([rest] if rest else [])
