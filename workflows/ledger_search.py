"""What became of a hold, by the ledger: asked only where commit or cancel was refused (contract §4)."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from typing import Final, NamedTuple

from temporalio import workflow

from activities.credits import CreditsActivities
from contracts.calls import LedgerQuery
from contracts.carried import AskedHold
from contracts.credits import LedgerEntry, LedgerKind
from workflows.outside_call import OutsideCall

LOOK_FOR: Final = timedelta(minutes=10)
LOOK_AGAIN_AFTER: Final = timedelta(seconds=30)


class HoldFate(Enum):
    COMMITTED = "committed"
    GIVEN_BACK = "given_back"
    UNKNOWN = "unknown"


class Found(NamedTuple):
    """What the ledger says of a hold; `committed` in points."""

    fate: HoldFate
    committed: int = 0


class LedgerSearch:
    """Looks for a hold's resolution, for 10 minutes: absence is never proof, a ledger may lag."""

    def __init__(self, outside: OutsideCall) -> None:
        self._outside = outside

    def query(self) -> LedgerQuery:
        return LedgerQuery(call_for=self._outside.call_for, task_id=self._outside.call_for.task_id)

    async def fate_of(self, hold: AskedHold) -> Found:
        until = workflow.now() + LOOK_FOR
        while True:
            found = await self._look(hold)
            if found.fate is not HoldFate.UNKNOWN or workflow.now() >= until:
                return found
            await workflow.sleep(LOOK_AGAIN_AFTER, summary="5 ledger: look again")

    async def _look(self, hold: AskedHold) -> Found:
        answer = await self._outside.until_answered(CreditsActivities.ledger, self.query(), summary="5 ledger")
        if answer is None or answer.reply is None:
            return Found(HoldFate.UNKNOWN)
        entries = [entry for entry in answer.reply.entries if entry.task_id == self.query().task_id]
        if any(entry.kind is not None for entry in entries):
            return _by_kind(entries, hold)
        return _by_total(entries, hold)


def _by_kind(entries: list[LedgerEntry], hold: AskedHold) -> Found:
    own = [entry for entry in entries if entry.pre_deduct_id == hold.pre_deduct_id]
    for entry in own:
        if entry.kind is LedgerKind.COMMIT:
            return Found(HoldFate.COMMITTED, hold.amount - entry.change)
    if any(entry.kind in (LedgerKind.CANCEL, LedgerKind.EXPIRE) for entry in own):
        return Found(HoldFate.GIVEN_BACK)
    return Found(HoldFate.UNKNOWN)


def _by_total(entries: list[LedgerEntry], hold: AskedHold) -> Found:
    """A ledger without kinds: only the task's total can be compared (contract §4 (field)).

    A total that equals a hold still standing proves nothing, so it stays unknown.
    """
    if not entries:
        return Found(HoldFate.UNKNOWN)
    total = sum(entry.change for entry in entries)
    if total == 0:
        return Found(HoldFate.GIVEN_BACK)
    if -hold.amount < total < 0:
        return Found(HoldFate.COMMITTED, -total)
    return Found(HoldFate.UNKNOWN)
