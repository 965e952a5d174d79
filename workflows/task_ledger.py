"""Reads the ledger of one task (contract §4 *Reading a ledger*). Pure functions, for property tests.

Each entry is read by its `kind` where it has one, else by its `reason`. Any other entry is unknown, never guessed.
The two shapes show a commit differently:

    by kind      pre_deduct −24 (+24 frozen)     commit +4 (−24 frozen)                       20 were charged
    by reason    pre_deduct −24                  refund_pre_deduct +4, commit −20             20 were charged

So a sum over a task means nothing. An entry is proof, a missing entry is not: a ledger may lag. Amounts are points.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from typing import NamedTuple

from comfyui_temporal.contracts.credits import CHARGE_REASON, Ledger, LedgerEntry, LedgerKind, LedgerReason
from comfyui_temporal.contracts.requests import RequestedHold


class HoldFate(Enum):
    COMMITTED = "committed"
    GIVEN_BACK = "given_back"
    UNKNOWN = "unknown"


class Found(NamedTuple):
    """What the ledger shows of a hold; `committed` in points."""

    fate: HoldFate
    committed: int = 0


class HeldEntry(NamedTuple):
    amount: int
    pre_deduct_id: str | None


class CommitEntry(NamedTuple):
    """`points` were charged, None where the ledger does not show how many. `rest` was returned, where it shows that."""

    points: int | None
    pre_deduct_id: str | None
    rest: int | None = None


class ReturnEntry(NamedTuple):
    amount: int
    pre_deduct_id: str | None
    kind: LedgerKind
    """`cancel` or `expire`."""


class ChargeEntry(NamedTuple):
    points: int
    ledger_id: str


class OpenHolds(NamedTuple):
    """Holds whose end the ledger does not show."""

    named: dict[str, int] = {}
    """`pre_deduct_id` → amount."""
    nameless: int = 0
    """How many the ledger shows without an id."""
    nameless_points: int = 0
    """What these hold together."""

    @property
    def points(self) -> int:
        return sum(self.named.values()) + self.nameless_points


class TaskLedger:
    """The entries of one task. `is_complete`: every page was read; the ledger may still lag."""

    def __init__(self, entries: Sequence[LedgerEntry], *, is_complete: bool = True) -> None:
        self.is_complete = is_complete
        self.has_kinds = any(entry.kind is not None for entry in entries)
        """A service whose entries have kinds keeps our contract, idempotency included."""
        self.tells_ids = any(entry.pre_deduct_id is not None for entry in entries)
        self.holds: list[HeldEntry] = []
        self.commits: list[CommitEntry] = []
        self.returns: list[ReturnEntry] = []
        self.charges: list[ChargeEntry] = []
        self.refunds: list[int] = []
        """What commits returned, where that is an entry of its own."""
        self.unknown: list[LedgerEntry] = []
        commits: list[LedgerEntry] = []
        for entry in entries:
            kind = _kind_of(entry)
            if kind is LedgerKind.COMMIT:
                commits.append(entry)  # reading one may need its hold's amount
            elif not self._take(entry, kind):
                self.unknown.append(entry)
        self.commits = [self._commit(entry) for entry in commits]

    @classmethod
    def of(cls, reply: Ledger) -> TaskLedger:
        """Read a ledger's answer that holds the entries of one task."""
        return cls(reply.entries, is_complete=not reply.cursor)

    def _take(self, entry: LedgerEntry, kind: LedgerKind | None) -> bool:
        """Keep an entry that is no commit. Returns whether it could be read."""
        match kind:
            case LedgerKind.PRE_DEDUCT if entry.change <= 0:
                self.holds.append(HeldEntry(-entry.change, entry.pre_deduct_id))
            case LedgerKind.CANCEL | LedgerKind.EXPIRE if entry.change >= 0:
                self.returns.append(ReturnEntry(entry.change, entry.pre_deduct_id, kind))
            case LedgerKind.CHARGE if entry.change <= 0:
                self.charges.append(ChargeEntry(-entry.change, entry.ledger_id))
            case LedgerKind.GRANT:
                pass  # a grant to the account has nothing to do with the task
            case None if entry.kind is None and entry.reason == LedgerReason.REFUND and entry.change >= 0:
                self.refunds.append(entry.change)
            case _:
                return False
        return True

    def _commit(self, entry: LedgerEntry) -> CommitEntry:
        named = entry.pre_deduct_id
        if entry.change < 0:  # a commit lowers no balance: this is its cost
            return CommitEntry(-entry.change, named)
        if entry.kind is None:
            return CommitEntry(None, named)
        rest = entry.change
        frozen = next((hold.amount for hold in self.holds if named and hold.pre_deduct_id == named), None)
        if entry.frozen_change is not None:
            frozen = -entry.frozen_change
        return CommitEntry(frozen - rest if frozen is not None and frozen >= rest else None, named, rest)

    # The task

    def charged(self) -> int | None:
        """Points that this task was charged; None where an unknown entry could hide some."""
        if self.unknown or any(commit.points is None for commit in self.commits):
            return None
        if len(self.refunds) > len(self.commits):
            return None  # the commit that this rest belongs to is not shown yet
        return sum(commit.points or 0 for commit in self.commits) + self.charged_without_hold()

    def charged_without_hold(self) -> int:
        """Points taken by `charge`."""
        return sum(charge.points for charge in self.charges)

    # One hold

    def fate(self, hold: RequestedHold, *, given_back: int = 0, committed: int = 0, by_size: bool = True) -> Found:
        """How a hold ended.

        `given_back` and `committed`: how many of the task's other holds are known to have ended so. In a ledger without
        ids an end counts as this hold's only if it is one more than those. `by_size`: a commit of more points than the
        hold has is another hold's.
        """
        for commit in self.commits:
            if commit.pre_deduct_id is not None and commit.pre_deduct_id == hold.pre_deduct_id:
                return _committed(commit, hold)
        if any(back.pre_deduct_id is not None and back.pre_deduct_id == hold.pre_deduct_id for back in self.returns):
            return Found(HoldFate.GIVEN_BACK)
        nameless = [commit for commit in self.commits if commit.pre_deduct_id is None]
        may_be_its = not by_size or any(_fits(commit, hold) for commit in nameless)
        if len(nameless) > committed and may_be_its:
            return self._nameless_commit(nameless, hold, among=committed + 1)
        returned = [back.amount for back in self.returns if back.pre_deduct_id is None]
        if len(returned) > given_back and hold.amount in returned:
            return Found(HoldFate.GIVEN_BACK)
        return Found(HoldFate.UNKNOWN)

    def _nameless_commit(self, commits: list[CommitEntry], hold: RequestedHold, *, among: int) -> Found:
        """This hold's commit, where it is the only one that fits. More commits than `among` are ambiguous."""
        fitting = [commit for commit in commits if _fits(commit, hold)]
        if len(commits) > among or len(fitting) != 1:
            return Found(HoldFate.UNKNOWN)
        return _committed(fitting[0], hold)

    def amount_of(self, hold: RequestedHold) -> int | None:
        """Points that a hold really has, by its own entry; None where several entries may be its own."""
        for entry in self.holds:
            if entry.pre_deduct_id is not None and entry.pre_deduct_id == hold.pre_deduct_id:
                return entry.amount
        amounts = {entry.amount for entry in self.holds}
        return amounts.pop() if len(amounts) == 1 else None

    # Open holds

    @property
    def shows_every_hold(self) -> bool:
        """Whether no hold of this task can be missing but by a lag, or none can be doubled: its service keeps keys."""
        return self.is_complete or self.has_kinds

    def open_holds(self) -> OpenHolds:
        """The holds whose end is not shown."""
        ended = {entry.pre_deduct_id for entry in self.commits} | {entry.pre_deduct_id for entry in self.returns}
        named = {
            entry.pre_deduct_id: entry.amount
            for entry in self.holds
            if entry.pre_deduct_id is not None and entry.pre_deduct_id not in ended
        }
        held = [entry.amount for entry in self.holds if entry.pre_deduct_id is None]
        back = [entry.amount for entry in self.returns if entry.pre_deduct_id is None]
        commits = [commit for commit in self.commits if commit.pre_deduct_id is None]
        nameless = max(0, len(held) - len(back) - len(commits))
        spent = sum(commit.points or 0 for commit in commits) + sum(commit.rest or 0 for commit in commits)
        points = max(0, sum(held) - sum(back) - spent - sum(self.refunds))
        return OpenHolds(named, nameless, points if nameless else 0)

    def ended_ids(self) -> set[str]:
        """Holds whose end is shown, in a ledger with ids."""
        ended = {entry.pre_deduct_id for entry in self.commits} | {entry.pre_deduct_id for entry in self.returns}
        return {each for each in ended if each is not None}

    def doubled(self, known: Collection[str], *, granted: int) -> OpenHolds:
        """Open holds of this task that no run knows: a service without idempotency took them for repeated requests.

        `known`: the ids of our holds. `granted`: how many were granted in all; all of them must have ended but those
        that the ledger names. One hold more than these is an entry, so a lag cannot invent it.
        """
        stands = self.open_holds()
        named = {pre_deduct_id: amount for pre_deduct_id, amount in stands.named.items() if pre_deduct_id not in known}
        if self.tells_ids:
            return OpenHolds(named)
        more = len(self.holds) - granted
        is_sure = stands.nameless == more or granted == 0  # the ends of all our own holds must be shown
        return OpenHolds({}, stands.nameless, stands.nameless_points) if more > 0 and is_sure else OpenHolds()


def _fits(commit: CommitEntry, hold: RequestedHold) -> bool:
    """Whether a commit without an id may be this hold's."""
    return commit.points is None or commit.points <= hold.amount


def _committed(commit: CommitEntry, hold: RequestedHold) -> Found:
    points = commit.points
    if points is None and commit.rest is not None:
        points = hold.amount - commit.rest
    return Found(HoldFate.COMMITTED, points) if points is not None and points >= 0 else Found(HoldFate.UNKNOWN)


def _kind_of(entry: LedgerEntry) -> LedgerKind | None:
    """An entry's kind, else by its reason; None for any other reason, and for a commit's refund."""
    if entry.kind is not None:
        return entry.kind
    if entry.reason == CHARGE_REASON:
        return LedgerKind.CHARGE
    return _KINDS_BY_REASON.get(entry.reason)


_KINDS_BY_REASON: dict[str, LedgerKind] = {
    LedgerReason.PRE_DEDUCT: LedgerKind.PRE_DEDUCT,
    LedgerReason.COMMIT: LedgerKind.COMMIT,
    LedgerReason.CANCEL: LedgerKind.CANCEL,
}
