"""Finds out in the ledger how a hold or a charge ended (contract §4).

An entry is proof, a missing entry is not: a ledger may lag. So what is missing is searched for again, for 10 minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from typing import Final, TypeVar

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import LedgerQuery
from comfyui_temporal.contracts.credits import LedgerEntry, LedgerKind
from comfyui_temporal.contracts.requests import HoldState, RequestedHold, RequestOutcome
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.step_labels import wait_in
from workflows.task_ledger import Found, HoldFate, OpenHolds, TaskLedger

T = TypeVar("T")

LOOK_FOR: Final = timedelta(minutes=10)
LOOK_AGAIN_AFTER: Final = timedelta(seconds=4)
"""Doubled with each look, up to `LOOK_AGAIN_AT_MOST`: a ledger that lags by seconds settles a task in seconds."""
LOOK_AGAIN_AT_MOST: Final = timedelta(minutes=2)
DOUBLED_FOR: Final = timedelta(minutes=1)
"""How long a doubled hold is searched for: no credits wait for it, but the task's end does."""
BY_KIND_OR_REASON: Final = "ledger-by-kind-or-reason"
BY_SIZE: Final = "commit-of-another-hold-by-its-size"
ALL_ENDED: Final = "no-doubled-hold-where-all-have-ended"
BY_COMMITS: Final = "fate-by-commits-without-charges"
NONE_TAKEN: Final = "charge-absent-from-a-ledger-without-any-hold"


class Shown(Enum):
    """What the ledger shows of a charge without an answer."""

    CHARGED = "charged"
    KEEPS_KEYS = "keeps_keys"
    """Nothing yet, but entries have kinds: such a service keeps keys, so the call may be repeated."""
    ABSENT = "absent"
    """Nothing for 10 minutes, in a ledger whose every entry was read and understood."""
    UNKNOWN = "unknown"


class LedgerSearch:
    """Searches the ledger of one task."""

    def __init__(self, outside: OutsideCall, holds: HoldState, look: RowLook) -> None:
        self._outside = outside
        self._holds = holds
        self._look = look
        self.newest: TaskLedger | None = None
        """The last reading."""

    async def fate_of(self, hold: RequestedHold) -> Found:
        """How a hold ended whose commit or cancel was refused."""
        if not workflow.patched(BY_KIND_OR_REASON):
            return await self._fate_by_total(hold)

        def seen(ledger: TaskLedger) -> Found | None:
            given_back, committed = self._ends(hold)
            found = ledger.fate(hold, given_back=given_back, committed=committed)
            before = ledger.fate(hold, given_back=given_back, committed=committed, by_size=False)
            if found != before and not workflow.patched(BY_SIZE):
                return None
            return self._known(found)

        return await self._search(seen, LOOK_FOR) or Found(HoldFate.UNKNOWN)

    async def read(self) -> TaskLedger | None:
        """The ledger as it is now. None where the service refuses to show it."""
        return await self._read_within(None)

    async def once_all_ended(self, *, but: int, known: int) -> TaskLedger | None:
        """The ledger once it shows a charge, or the end of all but `but` of at least `known` holds.

        None where it shows neither within 10 minutes.
        """

        def seen(ledger: TaskLedger) -> TaskLedger | None:
            stands = ledger.open_holds()
            has_all = len(ledger.holds) >= known and len(stands.named) + stands.nameless <= but
            return ledger if ledger.charged() or (has_all and ledger.charged() is not None) else None

        return await self._search(seen, LOOK_FOR)

    async def fate_by_all(self, hold: RequestedHold, *, known: int, but: int) -> Found:
        """How a hold ended that has surely ended, where an earlier life may have ended other holds of the task.

        By its id. In a ledger without ids: by the sum over the task's holds, at least `known`, once all but `but` have
        ended. Charges without a hold are no part of it.
        """

        def seen(ledger: TaskLedger) -> Found | None:
            if ledger.tells_ids:
                return self._known(ledger.fate(hold))
            stands = ledger.open_holds()
            charged = ledger.charged()
            if charged and ledger.charges and workflow.patched(BY_COMMITS):
                charged -= ledger.charged_without_hold()
            if charged:
                return Found(HoldFate.COMMITTED, charged)
            has_all = len(ledger.holds) >= known and stands.nameless <= but
            return Found(HoldFate.GIVEN_BACK) if has_all and charged == 0 else None

        return await self._search(seen, LOOK_FOR) or Found(HoldFate.UNKNOWN)

    def _ends(self, hold: RequestedHold) -> tuple[int, int]:
        """How many other holds were given back, or may have been, and how many were committed.

        The end of one that is being given back may be shown at any time.
        """
        others = [each for each in self._holds.asked if each is not hold and each.pre_deduct_id]
        stand = sum(not each.resolved and each.leaving is None for each in others)
        may_have_ended = (self._holds.granted or 0) - 1 - stand - self._holds.committed
        given_back = max(self._holds.given_back or 0, may_have_ended)
        return given_back, self._holds.committed

    @staticmethod
    def _known(found: Found) -> Found | None:
        return None if found.fate is HoldFate.UNKNOWN else found

    async def frozen_by(self, hold: RequestedHold) -> int:
        """Points that a hold really has: by its own entry, else what was requested."""
        amount = TaskLedger(await self._entries()).amount_of(hold)
        return hold.request.estimated_cost if amount is None else amount

    async def charge_shown(self, n: int, *, may_repeat: bool = True) -> Shown:
        """What the ledger shows of the task's charge number `n`; `KEEPS_KEYS` only where it `may_repeat` it."""

        def seen(ledger: TaskLedger) -> Shown | None:
            if len(ledger.charges) >= n:
                return Shown.CHARGED
            return Shown.KEEPS_KEYS if may_repeat and ledger.has_kinds else None

        self.newest = None
        shown = await self._search(seen, LOOK_FOR)
        if shown is not None:
            return shown
        last = self.newest
        is_whole = last is not None and last.is_complete and not last.unknown and self._shows_holds(last)
        if last is not None and len(last.commits) < self._holds.committed:
            is_whole = False  # it lacks entries from before the charge, so it may lack the charge as well
        return Shown.ABSENT if is_whole else Shown.UNKNOWN

    def _shows_holds(self, ledger: TaskLedger) -> bool:
        """Whether a ledger shows a hold of the task, or need not: no life of the task has taken any."""
        return bool(ledger.holds) or (not self._may_have_held() and workflow.patched(NONE_TAKEN))

    def _may_have_held(self) -> bool:
        if self._holds.granted or any(hold.outcome is not RequestOutcome.REFUSED for hold in self._holds.asked):
            return True
        row, earlier = self._look.row, self._outside.earlier
        return earlier.is_possible and (row is None or earlier.life.is_row_missing or bool(row.hold_ids))

    def charged_without_hold(self) -> int:
        """Points that the last reading shows taken by charges."""
        return self.newest.charged_without_hold() if self.newest is not None else 0

    async def doubled(self) -> OpenHolds | None:
        """Open holds of this task that no run knows. None where the ledger does not show whether there are any."""
        known = [hold.pre_deduct_id for hold in self._holds.asked if hold.pre_deduct_id]
        granted = self._holds.granted or len(known)

        def seen(ledger: TaskLedger) -> TaskLedger | None:
            doubled = ledger.doubled(known, granted=granted)
            is_more = not ledger.tells_ids and len(ledger.holds) > granted
            # It does not show the ends of our own holds yet.
            is_late = is_more and (ledger.open_holds().nameless > 0 or not workflow.patched(ALL_ENDED))
            return None if is_late and not doubled.nameless else ledger

        ledger = await self._search(seen, DOUBLED_FOR)
        if ledger is None:
            return None
        doubled = ledger.doubled(known, granted=granted)
        return doubled if doubled.named or doubled.nameless or ledger.shows_every_hold else None

    async def nameless_beside(self, own: list[int]) -> OpenHolds:
        """Open holds that a ledger without ids still shows after a minute beside our `own`, given in points."""

        def seen(ledger: TaskLedger) -> OpenHolds | None:
            return OpenHolds() if ledger.open_holds().nameless <= len(own) else None

        found = await self._search(seen, DOUBLED_FOR)
        if found is not None or self.newest is None:
            return OpenHolds()
        shown = self.newest.open_holds()
        return OpenHolds({}, shown.nameless - len(own), shown.nameless_points - sum(own))

    async def _search(self, decided: Callable[[TaskLedger], T | None], span: timedelta) -> T | None:
        """Read the ledger until `decided` returns something. None where it does not within `span`."""
        until, wait = workflow.now() + span, LOOK_AGAIN_AFTER
        while True:
            ledger = await self._read_within(None if span is LOOK_FOR else until - workflow.now())
            found = decided(ledger) if ledger is not None else None
            if found is not None or workflow.now() >= until:
                return found
            await workflow.sleep(
                min(wait, until - workflow.now()), summary=wait_in(self._outside.labels.ledger, "look again")
            )
            wait = min(2 * wait, LOOK_AGAIN_AT_MOST)

    async def _read_within(self, within: timedelta | None) -> TaskLedger | None:
        """The ledger as it is now, after an outage unless `within` limits the wait. None where it is not shown."""
        if within is None:
            answer = await self._outside.until_answered(
                CreditsActivities.ledger, self._query(), summary=self._outside.labels.ledger
            )
            reply = answer.reply if answer is not None else None
        else:
            span = max(within, timedelta(seconds=1))
            handle = self._outside.visible(
                CreditsActivities.ledger, self._query(), summary=self._outside.labels.ledger, within=span
            )
            try:
                reply = (await handle).reply
            except FailureError:
                reply = None
        if reply is None:
            return None
        self.newest = TaskLedger.of(reply)
        return self.newest

    def _query(self) -> LedgerQuery:
        call_for = self._outside.call_for
        return LedgerQuery(call_for=call_for, task_id=call_for.task_id)

    # Runs older than the patch `ledger-by-kind-or-reason`: by ids and kinds, else by the task's total

    async def _fate_by_total(self, hold: RequestedHold) -> Found:
        until, wait = workflow.now() + LOOK_FOR, timedelta(seconds=30)
        while True:
            entries = await self._entries()
            has_kinds = any(entry.kind is not None for entry in entries)
            found = _by_kind(entries, hold) if has_kinds else _by_total(entries, hold, self._holds)
            if found.fate is not HoldFate.UNKNOWN or workflow.now() >= until:
                return found
            await workflow.sleep(
                min(wait, until - workflow.now()), summary=wait_in(self._outside.labels.ledger, "look again")
            )
            wait = min(2 * wait, LOOK_AGAIN_AT_MOST)

    async def _entries(self) -> list[LedgerEntry]:
        answer = await self._outside.until_answered(
            CreditsActivities.ledger, self._query(), summary=self._outside.labels.ledger
        )
        return answer.reply.entries if answer is not None and answer.reply is not None else []


def _by_kind(entries: list[LedgerEntry], hold: RequestedHold) -> Found:
    for entry in entries:
        if entry.pre_deduct_id != hold.pre_deduct_id:
            continue
        if entry.kind is LedgerKind.COMMIT:
            frozen = -entry.frozen_change if entry.frozen_change is not None else hold.amount
            return Found(HoldFate.COMMITTED, frozen - entry.change)
        if entry.kind in (LedgerKind.CANCEL, LedgerKind.EXPIRE):
            return Found(HoldFate.GIVEN_BACK)
    return Found(HoldFate.UNKNOWN)


def _by_total(entries: list[LedgerEntry], hold: RequestedHold, holds: HoldState) -> Found:
    """A ledger without kinds shows a commit as the rest that was returned, so totals can be compared.

    Only once the ledger shows that every hold of the task was taken, and that all but the open ones have ended: a total
    that lacks an entry would show a commit that never happened, or hide one.
    """
    granted = holds.granted_before + len(holds.granted_holds())
    standing = [each for each in holds.granted_holds() if each is not hold and not each.resolved]
    taken = sum(entry.change < 0 for entry in entries)
    if taken != granted or len(entries) - taken != granted - len(standing):
        return Found(HoldFate.UNKNOWN)
    spent = -sum(entry.change for entry in entries) - sum(each.amount for each in standing)
    if spent == 0:
        return Found(HoldFate.GIVEN_BACK)
    return Found(HoldFate.COMMITTED, spent) if 0 < spent <= hold.amount else Found(HoldFate.UNKNOWN)
