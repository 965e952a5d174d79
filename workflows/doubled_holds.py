"""Holds that a service without idempotency took once for each request (contract §4)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from temporalio import workflow

from comfyui_temporal.contracts.credits import CancelHoldReply
from comfyui_temporal.contracts.errors import HOLD_NAMELESS, HOLD_OUT_OF_SIGHT, Answer, ExceptionCode, RefusalKind
from comfyui_temporal.contracts.requests import HoldState
from workflows.ledger_search import LedgerSearch
from workflows.task_record import TaskRecord

LOOKED_FOR: Final = "doubled-hold-looked-for"
OUT_OF_SIGHT: Final = "doubled-hold-out-of-sight"
LEFT_RECORDED: Final = "doubled-hold-recorded-where-its-cancel-is-refused"


class DoubledHolds:
    """Searched for where a hold was requested more than once; recorded, and cancelled where the ledger shows the id."""

    def __init__(
        self,
        state: HoldState,
        ledger: LedgerSearch,
        record: TaskRecord,
        cancel: Callable[[str, str, str], Awaitable[Answer[CancelHoldReply] | None]],
    ) -> None:
        """`cancel`: takes a hold's id, the end of the call's key and the reason."""
        self._state = state
        self._ledger = ledger
        self._record = record
        self._cancel = cancel

    async def give_back(self, reason: str) -> None:
        """Call this once every hold of ours has ended: a hold that is still open then is a doubled one."""
        if not self._state.asked_again or not workflow.patched(LOOKED_FOR):
            return
        self._state.asked_again = 0
        doubled = await self._ledger.doubled()
        if doubled is None:
            self._record_out_of_sight()
            return
        for n, (pre_deduct_id, amount) in enumerate(doubled.named.items(), start=1):
            answer = await self._cancel(pre_deduct_id, f"doubled-{n}", reason)
            if answer is not None and answer.reply is not None:
                what_next = "It was cancelled."
            elif workflow.patched(LEFT_RECORDED):
                what_next = self._left(answer)
            else:
                continue
            self._record_doubled(f"hold_doubled:{pre_deduct_id}", amount, what_next, pre_deduct_id=pre_deduct_id)
        if doubled.nameless:
            whose = "The ledger does not show its id: it ends by expiry, or the service's operator cancels it."
            self._record_doubled(HOLD_NAMELESS, doubled.nameless_points, whose, holds=doubled.nameless)

    @staticmethod
    def _left(answer: Answer[CancelHoldReply] | None) -> str:
        """What becomes of a hold whose cancel did not act, in words for operators.

        The settlement stays known: such a hold is neither charged nor part of what counts as held or returned.
        """
        refusal = answer.refusal if answer is not None else None
        why = refusal.sentence if refusal is not None else "The call was not answered."
        if refusal is not None and refusal.kind in (RefusalKind.HOLD_NOT_FOUND, RefusalKind.HOLD_ALREADY_RESOLVED):
            return f"It had ended before it was to be cancelled. {why}"
        return f"It could not be cancelled: it ends by expiry, or the service's operator cancels it. {why}"

    def _record_out_of_sight(self) -> None:
        if not workflow.patched(OUT_OF_SIGHT):
            return
        self._record.record_exception(
            HOLD_OUT_OF_SIGHT,
            ExceptionCode.UNDO_UNFINISHED,
            "A request for a hold was repeated, and the ledger does not show whether the credits service took another "
            "hold for it. Compare this task's pre_deduct entries in the ledger with its hold.",
        )

    def _record_doubled(self, key: str, amount: int, what_next: str, **details: Any) -> None:
        self._record.record_exception(
            key,
            ExceptionCode.HOLD_DOUBLED,
            f"The credits service took another hold of {amount} points for a repeated request. {what_next}",
            amount=amount,
            **details,
        )
