"""A task's ledger is read by kind or by reason, entry by entry; nothing is guessed (contract §4 *Reading a ledger*)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyui_temporal.contracts.credits import CHARGE_REASON, Ledger, LedgerEntry, LedgerKind, PreDeductRequest
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.requests import RequestedHold
from workflows.task_ledger import Found, HoldFate, OpenHolds, TaskLedger

SHAPES = ("kind", "reason")


@dataclass
class OneHold:
    """A hold as it truly was: `end` is commit, cancel, expire or None; `cost` is what a commit took."""

    n: int
    amount: int
    end: str | None = None
    cost: int = 0

    @property
    def pre_deduct_id(self) -> str:
        return f"hold-{self.n}"

    def requested(self) -> RequestedHold:
        request = PreDeductRequest(
            task_id="t",
            template_id="x",
            tenant_id="a",
            user_id="b",
            scene=Scene.IMAGE_GENERATE,
            estimated_cost=self.amount,
            expire_in=600,
        )
        at = datetime(2026, 1, 1, tzinfo=UTC)
        return RequestedHold(
            n=self.n, request=request, asked_at=at, pre_deduct_id=self.pre_deduct_id, amount=self.amount
        )


def entry(shape: str, kind: LedgerKind, change: int, hold: OneHold | None, **more: Any) -> LedgerEntry:
    """An entry as a ledger of this shape shows it; `more` overrides its fields."""
    named: dict[str, Any] = {"kind": kind, "reason": "words"} if shape == "kind" else {"reason": kind.value}
    if shape == "kind" and hold is not None:
        named["pre_deduct_id"] = hold.pre_deduct_id
    return LedgerEntry(ledger_id="e", task_id="t", change=change, **{**named, **more})


def entries_of(hold: OneHold, shape: str) -> list[LedgerEntry]:
    """The entries of one hold's life, oldest first."""
    taken = [entry(shape, LedgerKind.PRE_DEDUCT, -hold.amount, hold, frozen_change=hold.amount)]
    if shape == "reason":
        taken = [entry(shape, LedgerKind.PRE_DEDUCT, -hold.amount, hold)]
    rest = hold.amount - hold.cost
    match (hold.end, shape):
        case (None, _) | ("expire", "reason"):
            return taken
        case ("commit", "kind"):
            return [*taken, entry(shape, LedgerKind.COMMIT, rest, hold, frozen_change=-hold.amount)]
        case ("commit", _):
            back = [entry(shape, LedgerKind.COMMIT, rest, hold, reason="refund_pre_deduct")] if rest else []
            return [*taken, *back, entry(shape, LedgerKind.COMMIT, -hold.cost, hold)]
        case (end, _):
            return [*taken, entry(shape, LedgerKind(end), hold.amount, hold)]


def charge_entry(points: int, shape: str) -> LedgerEntry:
    return entry(shape, LedgerKind.CHARGE, -points, None, reason=CHARGE_REASON)


@dataclass
class Life:
    """What a task's credits truly went through, and its entries, oldest first."""

    holds: list[OneHold]
    charges: list[int]
    entries: list[LedgerEntry] = field(default_factory=list)

    @property
    def charged(self) -> int:
        return sum(hold.cost for hold in self.holds) + sum(self.charges)


@st.composite
def holds(draw: st.DrawFn, n: int) -> OneHold:
    hold = OneHold(n, draw(st.integers(1, 5_000)), draw(st.sampled_from([None, "commit", "cancel", "expire"])))
    hold.cost = draw(st.integers(1, hold.amount)) if hold.end == "commit" else 0
    return hold


@st.composite
def lives(draw: st.DrawFn, shapes: tuple[str, ...] = SHAPES, *, mixed: bool = False) -> Life:
    """Some holds, each with its end, and charges; their entries interleaved, each hold's own in order."""
    life = Life(
        [draw(holds(n)) for n in range(1, draw(st.integers(1, 5)) + 1)],
        draw(st.lists(st.integers(1, 2_000), max_size=3)),
    )
    shape = draw(st.sampled_from(shapes))

    def each() -> str:
        return draw(st.sampled_from(shapes)) if mixed else shape

    rows = [entries_of(hold, each()) for hold in life.holds] + [
        [charge_entry(points, each())] for points in life.charges
    ]
    while any(rows):
        row = draw(st.sampled_from([row for row in rows if row]))
        life.entries.append(row.pop(0))
    return life


@given(st.one_of(lives(), lives(mixed=True)))
def test_a_whole_ledger_of_any_shape_shows_what_was_charged(life: Life) -> None:
    assert TaskLedger(life.entries).charged() == life.charged


def test_a_commit_of_more_points_than_a_hold_has_is_another_holds() -> None:
    """A run that was reset does not know of that commit; its own smaller hold was given back."""
    small, large = OneHold(1, 24, "cancel"), OneHold(2, 36, "commit")
    large.cost = 36
    ledger = TaskLedger([row for hold in (small, large) for row in entries_of(hold, "reason")])
    assert ledger.fate(small.requested()).fate is HoldFate.GIVEN_BACK
    assert ledger.fate(large.requested()) == Found(HoldFate.COMMITTED, 36)


@given(lives(), st.data())
def test_the_order_of_the_entries_changes_nothing(life: Life, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(life.entries))
    one, other = TaskLedger(life.entries), TaskLedger(shuffled)
    assert (one.charged(), one.open_holds()) == (other.charged(), other.open_holds())


@given(lives(), st.data())
def test_a_lagging_ledger_never_shows_more_than_is_true(life: Life, data: st.DataObject) -> None:
    """Its newest entries are not shown yet: what it shows of a hold is true, or it shows nothing."""
    shown = data.draw(st.integers(0, len(life.entries)))
    reading = TaskLedger(life.entries[:shown])
    assert (reading.charged() or 0) <= life.charged
    hold = data.draw(st.sampled_from(life.holds))
    others = [other.end for other in life.holds if other is not hold]
    found = reading.fate(hold.requested(), given_back=others.count("cancel"), committed=others.count("commit"))
    match found.fate:
        case HoldFate.COMMITTED:
            assert (hold.end, found.committed) == ("commit", hold.cost)
        case HoldFate.GIVEN_BACK:
            assert hold.end in ("cancel", "expire")
    assert reading.doubled({hold.pre_deduct_id for hold in life.holds}, granted=len(life.holds)) == OpenHolds()


@given(lives(("kind",)))
def test_by_kind_every_end_of_every_hold_is_found(life: Life) -> None:
    reading = TaskLedger(life.entries)
    for hold in life.holds:
        ends = {None: Found(HoldFate.UNKNOWN), "commit": Found(HoldFate.COMMITTED, hold.cost)}
        assert reading.fate(hold.requested()) == ends.get(hold.end, Found(HoldFate.GIVEN_BACK))
    open_holds = {hold.pre_deduct_id: hold.amount for hold in life.holds if hold.end is None}
    assert reading.open_holds() == OpenHolds(open_holds)


@given(lives(("reason",)))
def test_by_reason_open_holds_are_counted(life: Life) -> None:
    """An expiry has no entry there: such a hold is not seen to have ended."""
    amounts = [hold.amount for hold in life.holds if hold.end in (None, "expire")]
    assert TaskLedger(life.entries).open_holds() == OpenHolds({}, len(amounts), sum(amounts))


@given(lives(), st.sampled_from(["bonus", "", "expired"]), st.integers(-30, 30))
def test_an_entry_without_a_known_kind_or_reason_leaves_the_sum_unknown(life: Life, reason: str, change: int) -> None:
    strange = LedgerEntry(ledger_id="x", task_id="t", change=change, reason=reason)
    reading = TaskLedger([strange, *life.entries])
    assert reading.charged() is None
    assert reading.unknown == [strange]


# The platform's own ledger, as it was seen: −24 for the hold and −24 for its commit


@pytest.mark.parametrize(("cost", "rest"), [(24, 0), (20, 4), (1, 23)])
def test_a_committed_hold_shows_twice_by_reason_and_is_charged_once(cost: int, rest: int) -> None:
    hold = OneHold(1, 24, "commit", cost)
    reading = TaskLedger(entries_of(hold, "reason"))
    assert reading.fate(hold.requested()) == Found(HoldFate.COMMITTED, cost)
    assert (reading.charged(), reading.refunds) == (cost, [rest] if rest else [])
    assert reading.open_holds() == OpenHolds()


def test_a_rest_that_is_shown_before_its_commit_is_no_settlement() -> None:
    hold = OneHold(1, 24, "commit", 20)
    reading = TaskLedger(entries_of(hold, "reason")[:2])
    assert (reading.charged(), reading.fate(hold.requested()).fate) == (None, HoldFate.UNKNOWN)


def test_a_charge_counts_by_our_reason_alone_where_there_is_no_kind() -> None:
    ours = charge_entry(24, "reason")
    other = LedgerEntry(ledger_id="y", task_id="t", change=-24, reason="charged by support")
    assert TaskLedger([ours]).charged() == 24
    assert TaskLedger([ours, other]).charged() is None
    by_kind = LedgerEntry(ledger_id="z", task_id="t", change=-5, reason="charged by support", kind=LedgerKind.CHARGE)
    assert TaskLedger([ours, by_kind]).charged() == 29


def test_a_commit_that_shows_only_its_rest_is_charged_from_its_hold() -> None:
    hold = OneHold(1, 24, "commit", 20)
    [_, commit] = entries_of(hold, "kind")
    bare = commit.model_copy(update={"frozen_change": None})
    assert TaskLedger([bare]).fate(hold.requested()) == Found(HoldFate.COMMITTED, 20)
    assert TaskLedger([bare]).charged() is None, "without its hold's entry the ledger alone does not show it"


@pytest.mark.parametrize("end", [None, "commit", "cancel"])
def test_an_old_hold_whose_end_is_known_hides_no_other(end: str | None) -> None:
    """Renewed: the first of 24 was cancelled, the second ended so."""
    first, second = OneHold(1, 24, "cancel"), OneHold(2, 24, end, 24 if end == "commit" else 0)
    reading = TaskLedger([*entries_of(first, "reason"), *entries_of(second, "reason")])
    found = reading.fate(second.requested(), given_back=1)
    ends = {None: Found(HoldFate.UNKNOWN), "commit": Found(HoldFate.COMMITTED, 24)}
    assert found == ends.get(end, Found(HoldFate.GIVEN_BACK))


@pytest.mark.parametrize(("end", "fate"), [(None, HoldFate.UNKNOWN), ("cancel", HoldFate.GIVEN_BACK)])
def test_a_commit_that_is_known_to_be_another_holds_is_not_taken_for_this_ones(end: str | None, fate: HoldFate) -> None:
    """Counted twice, the task would report twice what it was charged."""
    committed, other = OneHold(1, 24, "commit", 24), OneHold(2, 24, end)
    reading = TaskLedger([*entries_of(committed, "reason"), *entries_of(other, "reason")])
    assert reading.fate(other.requested(), committed=1) == Found(fate)


def test_a_hold_has_the_points_of_its_own_entry_or_those_of_each_where_no_entry_is_named() -> None:
    """A commit that was refused as too large is made again with them."""
    replaced, newest = OneHold(1, 36, "cancel"), OneHold(2, 24)
    named = TaskLedger([row for hold in (newest, replaced) for row in entries_of(hold, "kind")])
    assert (named.amount_of(newest.requested()), named.amount_of(replaced.requested())) == (24, 36)
    nameless = TaskLedger([row for hold in (newest, replaced) for row in entries_of(hold, "reason")])
    assert nameless.amount_of(newest.requested()) is None, "either entry may be its own"
    assert TaskLedger(entries_of(newest, "reason")).amount_of(newest.requested()) == 24


@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_only_an_entry_with_a_kind_shows_that_a_service_keeps_keys(shape: str | None) -> None:
    """A charge without an answer is sent again at once where keys are kept: elsewhere it would be charged twice."""
    bonus = LedgerEntry(ledger_id="b", task_id="t", change=5, reason="bonus")
    entries = [] if shape is None else [bonus, *entries_of(OneHold(1, 24), shape)]
    assert TaskLedger(entries).has_kinds is (shape == "kind")


# A doubled hold


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["commit", "cancel"])
def test_a_hold_that_was_taken_twice_is_found(shape: str, end: str) -> None:
    ours, double = OneHold(1, 24, end, 20 if end == "commit" else 0), OneHold(2, 24)
    reading = TaskLedger([*entries_of(ours, shape), *entries_of(double, shape)])
    found = reading.doubled({ours.pre_deduct_id}, granted=1)
    assert (found.points, found.nameless, set(found.named)) == (
        (24, 1, set()) if shape == "reason" else (24, 0, {double.pre_deduct_id})
    )


def test_a_page_that_is_not_the_last_says_so() -> None:
    assert not TaskLedger.of(Ledger(entries=[], cursor="more")).is_complete
    assert TaskLedger.of(Ledger(entries=[])).is_complete
