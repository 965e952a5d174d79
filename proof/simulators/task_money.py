"""The judge of one task's money: what the service has against what the task tells (invariants 1 and 2).

The same for every test that runs on a simulated credits service. What nobody can know under a profile is exempt here,
by its name and its amount, and nothing else is:

hold_doubled        Without idempotency a repeat after a lost answer is a second hold, and without ids in the ledger
                    nobody can name it to cancel it. It stands, and the task has recorded its points: all of them, and
                    no more.
settlement_unknown  The task tells no charge (null), and a record says why it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from comfyui_temporal.contracts.credits import LedgerKind
from comfyui_temporal.contracts.errors import ExceptionCode
from proof.simulators.admin_wire import EntrySeen, HoldSeen
from proof.simulators.credits_profile import CreditsProfile

HOLD_DOUBLED: Final = ExceptionCode.HOLD_DOUBLED.value
SAY_UNKNOWN: Final = frozenset(
    {
        ExceptionCode.SETTLEMENT_UNKNOWN.value,
        ExceptionCode.HOLD_LEFT_TO_EXPIRY.value,
        ExceptionCode.UNDO_UNFINISHED.value,
    }
)
"""Exception records of which one says why a settlement is unknown."""
_CHARGING: Final = (LedgerKind.COMMIT, LedgerKind.CHARGE)


@dataclass(frozen=True)
class TaskMoney:
    """One task. `told`: the charge that it tells, null for unknown; `records`: its exceptions, as code and details."""

    profile: CreditsProfile
    holds: Sequence[HoldSeen]
    entries: Sequence[EntrySeen]
    told: int | None
    records: Sequence[tuple[str, Mapping[str, Any]]] = ()

    @property
    def taken(self) -> int:
        """Points that the task has cost its payer."""
        return -sum(entry.change + entry.frozen_change for entry in self.entries)

    @property
    def charges(self) -> int:
        """How many commits and charges the service has made."""
        return sum(entry.kind in _CHARGING for entry in self.entries)

    def leaks(self) -> list[str]:
        """Holds that stand though the task has ended, in sentences."""
        left = [hold for hold in self.holds if hold.phase == "open"]
        points, known = sum(hold.amount for hold in left), self._doubled_points()
        if points == known:
            return []
        named = ", ".join(f"{hold.pre_deduct_id} ({hold.amount})" for hold in left) or "none"
        told = f", {known} of their points are recorded as doubled" if known else ""
        return [f"holds still stand: {named}{told}"]

    def mischarges(self) -> list[str]:
        """Where the task tells another charge than the service has made, in sentences."""
        if self.told is None:
            is_said = any(code in SAY_UNKNOWN for code, _ in self.records)
            return [] if is_said else [f"{self.taken} points were taken, no charge is told, and no record says why"]
        return [] if self.taken == self.told else [f"{self.taken} points were taken, {self.told} are told"]

    def _doubled_points(self) -> int:
        """Points of holds that nobody could name; where the ledger tells ids a doubled one has been cancelled."""
        if self.profile.keeps_keys or self.profile.tells_kinds:
            return 0
        return sum(int(details.get("amount", 0)) for code, details in self.records if code == HOLD_DOUBLED)
