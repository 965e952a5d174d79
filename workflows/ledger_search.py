"""What became of a hold, by the ledger: asked only where commit or cancel was refused (contract §4)."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from typing import Final, NamedTuple

from temporalio import workflow

from activities.credits import CreditsActivities
from contracts.calls import LedgerQuery
from contracts.carried import AskedHold, HoldState
from contracts.credits import LedgerEntry, LedgerKind
from workflows.outside_call import OutsideCall

LOOK_FOR: Final = timedelta(minutes=10)
LOOK_AGAIN_AFTER: Final = timedelta(seconds=30)
"""Doubled with each look, up to `LOOK_AGAIN_AT_MOST`."""
LOOK_AGAIN_AT_MOST: Final = timedelta(minutes=2)


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

    def __init__(self, outside: OutsideCall, holds: HoldState) -> None:
        self._outside = outside
        self._holds = holds

    async def fate_of(self, hold: AskedHold) -> Found:
        """What became of a hold that commit or cancel was refused for."""
        until, wait = workflow.now() + LOOK_FOR, LOOK_AGAIN_AFTER
        while True:
            entries = await self._entries()
            has_kinds = any(entry.kind is not None for entry in entries)
            found = _by_kind(entries, hold) if has_kinds else _by_total(entries, hold, self._holds)
            if found.fate is not HoldFate.UNKNOWN or workflow.now() >= until:
                return found
            await workflow.sleep(min(wait, until - workflow.now()), summary="5 ledger: look again")
            wait = min(2 * wait, LOOK_AGAIN_AT_MOST)

    async def frozen_by(self, hold: AskedHold) -> int:
        """Points that a hold really has: by its own entry, else what was asked for."""
        for entry in await self._entries():
            if entry.kind is LedgerKind.PRE_DEDUCT and entry.pre_deduct_id == hold.pre_deduct_id:
                return -entry.change
        return hold.request.estimated_cost

    async def _entries(self) -> list[LedgerEntry]:
        call_for = self._outside.call_for
        query = LedgerQuery(call_for=call_for, task_id=call_for.task_id)
        answer = await self._outside.until_answered(CreditsActivities.ledger, query, summary="5 ledger")
        return answer.reply.entries if answer is not None and answer.reply is not None else []


def _by_kind(entries: list[LedgerEntry], hold: AskedHold) -> Found:
    for entry in entries:
        if entry.pre_deduct_id != hold.pre_deduct_id:
            continue
        if entry.kind is LedgerKind.COMMIT:
            frozen = -entry.frozen_change if entry.frozen_change is not None else hold.amount
            return Found(HoldFate.COMMITTED, frozen - entry.change)
        if entry.kind in (LedgerKind.CANCEL, LedgerKind.EXPIRE):
            return Found(HoldFate.GIVEN_BACK)
    return Found(HoldFate.UNKNOWN)


def _by_total(entries: list[LedgerEntry], hold: AskedHold, holds: HoldState) -> Found:
    """A ledger without kinds: only the task's total can be compared (contract §4 (field)).

    It is compared once the ledger shows every hold of the task taken and every one but those that stand ended: a total
    that lacks an entry would tell of a commit that never was, or hide one.
    """
    granted = holds.granted_before + len(holds.granted())
    standing = [each for each in holds.granted() if each is not hold and not each.resolved]
    taken = sum(entry.change < 0 for entry in entries)
    if taken != granted or len(entries) - taken != granted - len(standing):
        return Found(HoldFate.UNKNOWN)
    spent = -sum(entry.change for entry in entries) - sum(each.amount for each in standing)
    if spent == 0:
        return Found(HoldFate.GIVEN_BACK)
    return Found(HoldFate.COMMITTED, spent) if 0 < spent <= hold.amount else Found(HoldFate.UNKNOWN)
