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
COUNTED_AS_SHOWN: Final = "charge-counted-as-the-ledger-shows-it"
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
    """Points charged in one or all parts, and the balance after where it is known."""

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
        self.may_be_sent = False
        """Whether another give-back of the task may have sent the next parts: none of its requests is read."""

    @property
    def sent(self) -> int:
        """How many charges the ledger should show: the number of the last one that was sent, or that it has shown."""
        return self._n

    def taken_before(self) -> int:
        """Points that the ledger showed as charged when it was last read; their numbers are taken."""
        shown = self._ledger.newest
        self._n = max(self._n, len(shown.charges) if shown is not None else 0)
        return self._ledger.charged_without_hold()

    @property
    def are_more_shown(self) -> bool:
        """Whether the last reading shows more charges than have a number here."""
        newest = self._ledger.newest
        return newest is not None and len(newest.charges) > self._n

    def shown_of(self, requested: list[Post[ChargeRequest]]) -> int:
        """Points of these parts that the last reading shows."""
        newest = self._ledger.newest
        shown = len(newest.charges) if newest is not None else 0
        return sum(self._shown(post, number_in(post.key)) for post in requested if number_in(post.key) <= shown)

    async def take(self, points: int, *, before: int = 0) -> Charged:
        """Charge `points`; after a refusal the rest stays uncharged. Raises ChargeUnknown and EarlierLifePossible.

        `before`: what was charged for the task until now, for the failure.
        """
        charged, balance_after = 0, None
        while charged < points:
            self._n += 1
            try:
                part = await self._sent(self._post(min(points - charged, MAX_CHARGE_POINTS)))
            except ChargeUnknown as unknown:
                raise ChargeUnknown(str(unknown), charged=before + charged) from None
            except EarlierLifePossible:
                if not workflow.patched(NUMBERED_BY_LEDGER):
                    raise
                self._n -= 1
                raise EarlierLifePossible(charged=charged) from None
            if part.is_refused:
                return Charged(charged, balance_after, is_refused=True)
            charged, balance_after = charged + part.points, part.balance_after
        return Charged(charged, balance_after)

    async def learn(self, requested: list[Post[ChargeRequest]], *, by_key: bool) -> Charged:
        """What became of parts that a run had requested when it ended. Raises ChargeUnknown.

        `by_key`: each has its key's number, as charges of earlier lives may come before. False for older give-backs.
        """
        charged, balance_after = 0, None
        for post in requested:
            self._n = number_in(post.key) if by_key else self._n + 1
            try:
                part = await self._unanswered(post, "its run had ended")
            except ChargeUnknown as unknown:
                raise ChargeUnknown(str(unknown), charged=charged) from None
            if part.is_refused:
                return Charged(charged, balance_after, is_refused=True)
            charged, balance_after = charged + part.points, part.balance_after
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

    async def _sent(self, post: Post[ChargeRequest]) -> Charged:
        """What was charged for a part, or that it was refused. Raises ChargeUnknown."""
        if not workflow.patched(SENT_ONCE):
            return _answered(post, await self._repeated(post))
        newest, was_reset = self._ledger.newest, self._outside.earlier.is_possible
        if (was_reset or self.may_be_sent) and not (newest is not None and newest.has_kinds):
            # An earlier life, or another give-back, may have sent it.
            return await self._unanswered(post, "the task's run was reset" if was_reset else "it may have been sent")
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

    async def _unanswered(self, post: Post[ChargeRequest], reason: str) -> Charged:
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

    async def _decided(self, post: Post[ChargeRequest], answer: Answer[ChargeReply]) -> Charged:
        """An answer that does not say whether it was charged is looked up in the ledger."""
        raise_unless_settled(answer)
        if answer.refusal is None or refuses_charge(answer):
            return _answered(post, answer)
        if await self._ledger.charge_shown(self._n, may_repeat=False) is Shown.CHARGED:
            return self._by_ledger(post)
        raise ChargeUnknown(answer.refusal.sentence)

    def _by_ledger(self, post: Post[ChargeRequest]) -> Charged:
        """What stands in for the missing answer."""
        return Charged(self._shown(post, self._n))

    def _shown(self, post: Post[ChargeRequest], n: int) -> int:
        """Points of charge number `n`, which the last reading shows: an earlier life may have sent it with another
        amount under the key of `post`.
        """
        newest, amount = self._ledger.newest, post.body.amount
        assert newest is not None
        points = newest.charges[-n].points  # a ledger is newest first
        return points if points != amount and workflow.patched(COUNTED_AS_SHOWN) else amount


def _answered(post: Post[ChargeRequest], answer: Answer[ChargeReply]) -> Charged:
    """What an answer says of its part."""
    if answer.reply is None:
        return Charged(0, is_refused=True)
    return Charged(post.body.amount, answer.reply.balance_after)
