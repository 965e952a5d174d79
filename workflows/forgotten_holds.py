"""Holds of this task that an earlier life of it took and this run does not know (contract §4, earlier lives).

A hold ends once. So before one is committed every other is cancelled: a cancel that takes effect proves that the hold
was not committed, one that is refused sends us to the ledger. What the ledger does not show yet decides nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from contracts.carried import AskedHold, HoldState
from contracts.credits import CancelHoldReply
from contracts.errors import Answer, ExceptionCode, Refusal
from workflows.hold_ends import HoldEnds
from workflows.ledger_search import LedgerSearch
from workflows.row_look import RowLook
from workflows.task_ledger import TaskLedger
from workflows.task_record import TaskRecord


class ForgottenHolds:
    """Known by the task's row and by the ledger, where that tells ids."""

    def __init__(
        self,
        state: HoldState,
        ledger: LedgerSearch,
        ends: HoldEnds,
        record: TaskRecord,
        look: RowLook,
        cancel: Callable[[str, str, str], Awaitable[Answer[CancelHoldReply] | None]],
    ) -> None:
        """`cancel`: takes a hold's id, the end of the call's key and the reason."""
        self._state = state
        self._ledger = ledger
        self._ends = ends
        self._record = record
        self._look = look
        self._cancel = cancel
        self.was_committed = False
        """Whether the ledger shows a commit of any of the task's holds: the task is settled."""

    @property
    def numbers_taken(self) -> int:
        """How many numbers of holds are taken at least."""
        known = len(self._look.row.hold_ids) if self._look.row is not None else 0
        return max(known, max((hold.n for hold in self._state.asked), default=0))

    async def give_back(self, reason: str, *, keep_one: bool = False) -> bool:
        """Cancel them, and learn what the task was charged; whether there is any such hold.

        `keep_one`: one hold of the task is left standing, to be committed: this run's own, or else a forgotten one.
        """
        await self._look.once()
        ledger = await self._ledger.read()
        own = {hold.pre_deduct_id for hold in self._state.asked if hold.pre_deduct_id}
        stands = {} if ledger is None else ledger.open_holds().named
        ended = set() if ledger is None else ledger.ended_ids()
        forgotten = dict.fromkeys([*self._look.forgotten_holds(own), *(each for each in stands if each not in own)])
        open_ones = [each for each in forgotten if each not in ended]
        if keep_one and not self._has_standing(ended):
            open_ones = self._adopt(open_ones, stands)
        is_unsure = False
        for pre_deduct_id in open_ones:
            answer = await self._cancel(pre_deduct_id, f"forgotten:{pre_deduct_id}", reason)
            is_unsure |= self._is_unsure(pre_deduct_id, answer)
        if is_unsure:
            ledger = await self._ledger.once_all_ended(but=int(keep_one), known=len(own) + len(forgotten))
        self._learn_charged(ledger)
        return bool(forgotten)

    def _has_standing(self, ended: set[str]) -> bool:
        """Whether a hold of our own stands, as far as the ledger shows."""
        for hold in self._state.asked:
            if hold.pre_deduct_id in ended:
                hold.resolved = True
        return any(hold.pre_deduct_id and not hold.resolved for hold in self._state.asked)

    def _adopt(self, open_ones: list[str], stands: dict[str, int]) -> list[str]:
        """Make one that the ledger shows open our own; those that are left."""
        adopted = next((each for each in reversed(open_ones) if each in stands), None)
        like = self._state.asked[-1] if self._state.asked else None
        if adopted is None or like is None:
            return open_ones
        amount = stands[adopted]
        request = like.request.model_copy(update={"estimated_cost": amount})
        number = self.numbers_taken + 1
        self._state.asked.append(
            AskedHold(n=number, request=request, asked_at=like.asked_at, pre_deduct_id=adopted, amount=amount)
        )
        return [each for each in open_ones if each != adopted]

    def _is_unsure(self, pre_deduct_id: str, answer: Answer[CancelHoldReply] | None) -> bool:
        """Whether a hold may have been committed, by the answer to its cancel."""
        if answer is None or answer.refusal is None:
            return False
        if answer.refusal.message not in ("pre_deduct_already_processed", "pre_deduct_not_found"):
            self._tell_left(pre_deduct_id, answer.refusal)
        return answer.refusal.message == "pre_deduct_already_processed"

    def _learn_charged(self, ledger: TaskLedger | None) -> None:
        charged = None if ledger is None else ledger.charged()
        if ledger is None or charged is None:
            self._ends.is_unknown()
            return
        self.was_committed = bool(ledger.commits)
        self._state.charged = max(self._state.charged, charged)

    def _tell_left(self, pre_deduct_id: str, refusal: Refusal) -> None:
        self._ends.left_open()
        self._record.tell_exception(
            f"hold_left:{pre_deduct_id}",
            ExceptionCode.HOLD_LEFT_TO_EXPIRY,
            f"Hold {pre_deduct_id}, taken before the run was reset, could not be cancelled. {refusal.sentence}",
            pre_deduct_id=pre_deduct_id,
        )
