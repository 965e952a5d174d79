"""How a task's holds ended, as far as is known. Counts, because the holds themselves are not all kept.

In a ledger without ids a hold's end is recognised by these counts: it is one more than the ends that are known.
"""

from __future__ import annotations

from typing import Final

from temporalio import workflow

from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.task_store import CHARGES, PRICE
from comfyui_temporal.contracts.tasks import SettlementState
from workflows.task_ledger import HoldFate

LEFT_APART: Final = "hold-left-to-expiry-apart-from-the-unknown"


class HoldEnds:
    """Keeps the counts in the state that a run takes along when it continues as new."""

    def __init__(self, state: HoldState) -> None:
        self._state = state
        self.price: int | None = None
        """The whole price of delivered work, in points, for records of what is unknown; None until it is charged."""
        self.charges = 0
        """How many charges were sent and not refused, of those of which it is not known whether they took effect."""
        if state.granted is None:  # a first run, or one that release 0.1.0 began
            state.granted = state.granted_before + sum(hold.pre_deduct_id is not None for hold in state.asked)
            state.given_back = state.granted_before + sum(hold.resolved for hold in state.asked)

    def count(self, fate: HoldFate) -> None:
        """Count a hold whose end is known."""
        if fate is HoldFate.COMMITTED:
            self._state.committed += 1
        elif fate is HoldFate.GIVEN_BACK:
            self._state.given_back = (self._state.given_back or 0) + 1

    def left_open(self) -> None:
        """A hold may outlive the task: its points are not returned, unless the task is charged."""
        if workflow.patched(LEFT_APART):
            self._state.is_left = True
        elif self._state.committed == 0:
            self.mark_unknown()

    def mark_unknown(self) -> None:
        """How a hold or a charge ended could not be found out."""
        self._state.is_unknown = True

    @property
    def details(self) -> dict[str, int]:
        """For a record `settlement_unknown`: whoever settles the task later learns there what to look for."""
        price = {} if self.price is None else {PRICE: self.price}
        return price | ({CHARGES: self.charges} if self.charges else {})

    @property
    def unknown_key(self) -> str:
        """Of that record. A later life that has sent more charges makes another one: of one key the first is kept."""
        return f"settlement_unknown:{self.charges}" if self.charges else "settlement_unknown"

    def find_out_again(self) -> None:
        """What was unknown until now is looked up again: only what stays so counts."""
        self._state.is_unknown = self._state.is_left = False

    @property
    def are_unknown(self) -> bool:
        """Whether the task would end with `settlement` unknown."""
        return self._state.is_unknown or (self._state.is_left and not self._state.charged)

    def close(self) -> None:
        """The task's credits are settled, as far as could be found out."""
        self._state.settlement = SettlementState.UNKNOWN if self.are_unknown else SettlementState.SETTLED
