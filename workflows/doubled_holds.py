"""Holds that a service without idempotency took for each time it was asked (contract §4)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from temporalio import workflow

from comfyui_temporal.contracts.continuation import HoldState
from comfyui_temporal.contracts.credits import CancelHoldReply
from comfyui_temporal.contracts.errors import Answer, ExceptionCode
from workflows.ledger_search import LedgerSearch
from workflows.task_record import TaskRecord

LOOKED_FOR: Final = "doubled-hold-looked-for"


class DoubledHolds:
    """Looked for where a hold was asked for more than once: recorded, and cancelled where its id is told."""

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
        """To be called once every hold of ours has ended: what stands then is nobody's."""
        if not self._state.asked_again or not workflow.patched(LOOKED_FOR):
            return
        self._state.asked_again = 0
        doubled = await self._ledger.doubled()
        for n, (pre_deduct_id, amount) in enumerate(doubled.named.items(), start=1):
            answer = await self._cancel(pre_deduct_id, f"doubled-{n}", reason)
            if answer is not None and answer.reply is not None:
                self._tell(pre_deduct_id, amount, "It was cancelled.", pre_deduct_id=pre_deduct_id)
        if doubled.nameless:
            whose = "Its id is not told: it ends by expiry, or the service's operator cancels it."
            self._tell("nameless", doubled.nameless_points, whose, holds=doubled.nameless)

    def _tell(self, key: str, amount: int, what_next: str, **details: Any) -> None:
        self._record.record_exception(
            f"hold_doubled:{key}",
            ExceptionCode.HOLD_DOUBLED,
            f"Another hold of {amount} points was taken when the credits service was asked again. {what_next}",
            amount=amount,
            **details,
        )
