"""How a task's holds ended, as far as is known: counts, since the holds themselves are not kept for ever.

On a ledger without ids a hold's end is told apart by them: it is one more than those that are known.
"""

from __future__ import annotations

from comfyui_temporal.contracts.continuation import HoldState
from comfyui_temporal.contracts.tasks import SettlementState
from workflows.task_ledger import HoldFate


class HoldEnds:
    """Keeps the counts in the state that a continued run carries on."""

    def __init__(self, state: HoldState) -> None:
        self._state = state
        if state.granted is None:  # a first run, or one that release 0.1.0 began
            state.granted = state.granted_before + sum(hold.pre_deduct_id is not None for hold in state.asked)
            state.given_back = state.granted_before + sum(hold.resolved for hold in state.asked)

    def count_grant(self, tries: int) -> None:
        """A hold was granted, after it had been asked for this often."""
        self._state.granted = (self._state.granted or 0) + 1
        self._state.asked_again += tries > 1

    def count_refusal(self, tries: int) -> None:
        """A hold was refused, after it had been asked for this often: the first time may have taken it."""
        self._state.asked_again += tries > 1

    def count(self, fate: HoldFate) -> None:
        """How a hold ended is known."""
        if fate is HoldFate.COMMITTED:
            self._state.committed += 1
        elif fate is HoldFate.GIVEN_BACK:
            self._state.given_back = (self._state.given_back or 0) + 1

    def left_open(self) -> None:
        """A hold may stand beyond the task: its points have not come back, unless another was committed."""
        if self._state.committed == 0:
            self.is_unknown()

    def is_unknown(self) -> None:
        """What became of a hold or a charge could not be learned."""
        self._state.is_unknown = True

    def close(self) -> None:
        """The task's credits are settled, as far as could be learned."""
        self._state.settlement = SettlementState.UNKNOWN if self._state.is_unknown else SettlementState.SETTLED
