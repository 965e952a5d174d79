"""Finds out in the ledger how a hold or a charge ended (contract §4).

An entry is proof, a missing entry is not: a ledger may lag. So what is missing is searched for again, for 10 minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
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
LAST_LOOK: Final = "ledger-looked-at-once-more-where-a-look-outlasts-the-search"
SURELY_ABSENT: Final = "charge-absent-only-where-the-last-look-would-show-it"
FROM_FIRST: Final = "ledger-searched-from-its-first-answer-on"
OWN_SHOWN: Final = "doubled-hold-looked-for-until-the-own-ones-are-shown"
DOUBLED_COUNTED: Final = "end-of-a-doubled-hold-not-taken-for-the-own-ones"
CUT_SEARCHED: Final = "doubled-hold-looked-for-in-a-cut-ledger-as-long"
BESIDE_DOUBLED: Final = "ends-counted-beside-a-doubled-hold-at-the-last-look"
CUT_BEFORE: Final = "ends-absent-from-a-ledger-that-is-cut-before-the-holds"


class Shown(Enum):
    """What the ledger shows of a charge without an answer."""

    CHARGED = "charged"
    KEEPS_KEYS = "keeps_keys"
    """Nothing yet, but entries have kinds: such a service keeps keys, so the call may be repeated."""
    ABSENT = "absent"
    """Nothing for 10 minutes, up to the last look, in a ledger that was understood and hides nothing as new as it."""
    UNKNOWN = "unknown"


class LedgerSearch:
    """Searches the ledger of one task."""

    def __init__(self, outside: OutsideCall, holds: HoldState, look: RowLook) -> None:
        self._outside = outside
        self._holds = holds
        self._look = look
        self.newest: TaskLedger | None = None
        """The last reading."""
        self._is_shown = False
        """Whether the last look was answered with it."""

    async def fate_of(self, hold: RequestedHold, *, commit_sent: bool = False) -> Found:
        """How a hold ended whose commit or cancel was refused.

        `commit_sent`: it may have acted, so the end of a doubled hold must not be taken for this one's.
        """
        if not workflow.patched(BY_KIND_OR_REASON):
            return await self._fate_by_total(hold)

        def seen(ledger: TaskLedger) -> Found | None:
            given_back, committed = self._ends(hold)
            found = ledger.fate(hold, given_back=given_back, committed=committed)
            before = ledger.fate(hold, given_back=given_back, committed=committed, by_size=False)
            if found != before and not workflow.patched(BY_SIZE):
                return None
            if commit_sent and self._may_be_a_doubled_ones(found, ledger, hold) and workflow.patched(DOUBLED_COUNTED):
                return None
            return self._known(found)

        return await self._search(seen, LOOK_FOR) or self._given_back_by_last_look(hold)

    def _may_be_a_doubled_ones(self, found: Found, ledger: TaskLedger, hold: RequestedHold) -> bool:
        """Whether a give-back is also that of a hold which no run knows, and a commit may still be hidden."""
        if found.fate is not HoldFate.GIVEN_BACK or len(ledger.holds) <= (self._holds.granted or 0):
            return False
        given_back, committed = self._ends(hold, shown=len(ledger.holds))
        return ledger.fate(hold, given_back=given_back, committed=committed).fate is HoldFate.UNKNOWN

    def _given_back_by_last_look(self, hold: RequestedHold) -> Found:
        """A give-back that may be a doubled hold's, once a commit would have been shown."""
        last = self.newest if self._is_shown else None
        if last is None or not self._shows_ends(last) or last.unknown:
            return Found(HoldFate.UNKNOWN)
        given_back, committed = self._ends(hold)
        found = last.fate(hold, given_back=given_back, committed=committed)
        return found if self._may_be_a_doubled_ones(found, last, hold) else Found(HoldFate.UNKNOWN)

    async def read(self) -> TaskLedger | None:
        """The ledger as it is now. None where the service refuses to show it."""
        return await self._read_within(None)

    async def once_all_ended(self, *, but: int, known: int) -> TaskLedger | None:
        """The ledger once it shows a charge, or the end of all but `but` of at least `known` holds.

        None where it shows neither within 10 minutes. A ledger without ids may show more holds than `known`: then as
        many ends are enough at the last look. Before it one may be a doubled hold's, while a commit is still hidden.
        """

        def seen(ledger: TaskLedger) -> TaskLedger | None:
            stands = ledger.open_holds()
            has_all = len(ledger.holds) >= known and len(stands.named) + stands.nameless <= but
            return ledger if ledger.charged() or (has_all and ledger.charged() is not None) else None

        found = await self._search(seen, LOOK_FOR)
        if found is None and self._shows_ends_beside_doubled(but=but, known=known):
            return self.newest
        return found

    def _shows_ends_beside_doubled(self, *, but: int, known: int) -> bool:
        """Whether the last look shows the ends of all but `but` known holds, beside a hold that no run knows."""
        last = self.newest if self._is_shown else None
        if last is None or last.tells_ids or not last.is_complete or last.commits or last.charged() is None:
            return False
        is_more = len(last.holds) > known
        return is_more and len(last.returns) >= known - but and workflow.patched(BESIDE_DOUBLED)

    async def once_shown(self, known: int) -> TaskLedger | None:
        """The ledger once it shows `known` holds, and so what came before the last of them; None after 10 minutes."""
        return await self._search(lambda ledger: ledger if len(ledger.holds) >= known else None, LOOK_FOR)

    async def fate_by_all(self, hold: RequestedHold, *, known: int, but: int) -> Found:
        """How a hold ended that has surely ended, where an earlier life may have ended other holds of the task.

        By its id. In a ledger without ids: by the sum over the task's holds, at least `known`, once all but `but` have
        ended, as `once_all_ended`. Charges without a hold are no part of it.
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

        found = await self._search(seen, LOOK_FOR)
        if found is None and self._shows_ends_beside_doubled(but=but, known=known):
            return Found(HoldFate.GIVEN_BACK)
        return found or Found(HoldFate.UNKNOWN)

    def _ends(self, hold: RequestedHold, *, shown: int = 0) -> tuple[int, int]:
        """How many other holds were given back, or may have been, and how many were committed.

        The end of one that is being given back may be shown at any time. `shown`: how many holds the ledger shows.
        """
        others = [each for each in self._holds.asked if each is not hold and each.pre_deduct_id]
        stand = sum(not each.resolved and each.leaving is None for each in others)
        may_have_ended = max(self._holds.granted or 0, shown) - 1 - stand - self._holds.committed
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
        is_whole = last is not None and self._shows_ends(last) and not last.unknown and self._shows_holds(last)
        if last is not None and len(last.commits) < self._holds.committed:
            is_whole = False  # it lacks entries from before the charge, so it may lack the charge as well
        lacks_parts = last is not None and len(last.charges) < n - 1
        if is_whole and (lacks_parts or not self._is_shown) and workflow.patched(SURELY_ABSENT):
            is_whole = False
        return Shown.ABSENT if is_whole else Shown.UNKNOWN

    def _shows_ends(self, ledger: TaskLedger) -> bool:
        """Whether a commit or charge can be missing by a lag only. A cut loses what is older, and they are newer than
        the task's holds; those of an earlier life may be older than the holds that are shown.
        """
        if ledger.is_complete:
            return True
        return bool(ledger.holds) and not self._outside.earlier.is_possible and workflow.patched(CUT_BEFORE)

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

        def is_late(ledger: TaskLedger) -> bool:
            """Whether it does not show all of our own holds and ends yet."""
            is_more = not ledger.tells_ids and len(ledger.holds) > granted
            lacks_ends = is_more and (ledger.open_holds().nameless > 0 or not workflow.patched(ALL_ENDED))
            if lacks_ends and not ledger.doubled(known, granted=granted).nameless:
                return True
            return self._lacks_own(ledger, granted) and workflow.patched(OWN_SHOWN)

        def seen(ledger: TaskLedger) -> TaskLedger | None:
            if is_late(ledger):
                return None
            return None if self._may_lack_more(ledger, granted) and workflow.patched(OWN_SHOWN) else ledger

        ledger = await self._search(seen, DOUBLED_FOR)
        if ledger is None and self._is_shown and self.newest is not None and not is_late(self.newest):
            ledger = self.newest
        if ledger is None:
            return None
        doubled = ledger.doubled(known, granted=granted)
        return doubled if doubled.named or doubled.nameless or ledger.shows_every_hold else None

    def _lacks_own(self, ledger: TaskLedger, granted: int) -> bool:
        """Whether a ledger does not show every hold and end that this run knows of, and may show them later."""
        if not self._may_show_later(ledger):
            return False
        return len(ledger.holds) < granted or len(ledger.returns) + len(ledger.commits) < self._known_ends

    def _may_lack_more(self, ledger: TaskLedger, granted: int) -> bool:
        """Whether nothing in it is later than every request: an own end is, where that of each own hold is known."""
        if not self._may_show_later(ledger):
            return False
        if granted == 0:
            return not ledger.holds
        return self._known_ends < granted or self._outside.earlier.is_possible

    @staticmethod
    def _may_show_later(ledger: TaskLedger) -> bool:
        """Whether a doubled hold is worth a wait: no service that keeps keys takes one. A cut ledger may lag too."""
        keeps_keys = ledger.has_kinds or ledger.tells_ids
        return not keeps_keys and (ledger.is_complete or workflow.patched(CUT_SEARCHED))

    @property
    def _known_ends(self) -> int:
        """How many of this run's holds are known to have been given back or committed."""
        return (self._holds.given_back or 0) + self._holds.committed

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
        begun, wait = workflow.now(), LOOK_AGAIN_AFTER
        until, answered_at = begun + span, None
        while True:
            looked_at = workflow.now()
            ledger = await self._read_within(None if span is LOOK_FOR else until - looked_at)
            found = decided(ledger) if ledger is not None else None
            if found is not None:
                return found
            if ledger is not None and answered_at is None:
                answered_at = workflow.now()
            if workflow.now() >= until and span is LOOK_FOR:
                until = _from_first_answer(until, begun, answered_at)
            if workflow.now() >= until:
                # A run that was paused meanwhile, or had no worker, has seen a ledger of before.
                if ledger is not None and looked_at < until and workflow.patched(LAST_LOOK):
                    continue
                return None
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
        self._is_shown = reply is not None
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


def _from_first_answer(until: datetime, begun: datetime, answered_at: datetime | None) -> datetime:
    """When a search is over that would be over `until`: an outage before its first answer is no part of it."""
    if answered_at is None or answered_at - begun <= LOOK_AGAIN_AFTER:
        return until
    later = answered_at + LOOK_FOR
    return later if workflow.now() < later and workflow.patched(FROM_FIRST) else until


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
