"""How long the ledger is searched, and by which look something counts as missing."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow

from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.credits import Ledger, LedgerEntry, LedgerKind
from comfyui_temporal.contracts.errors import Answer, FailureCode, Refusal
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.task_store import TaskRow
from tests.workflows.test_task_ledger import OneHold, charge_entry, entries_of
from workflows.earlier_life import EarlierLives
from workflows.ledger_search import (
    BY_KIND_OR_REASON,
    BY_SIZE,
    DOUBLED_FOR,
    LOOK_AGAIN_AT_MOST,
    LOOK_FOR,
    LedgerSearch,
    Shown,
)
from workflows.outside_call import UNREADABLE_FOR, OutsideCall
from workflows.row_look import RowLook
from workflows.step_labels import STEP_LABELS
from workflows.task_ledger import Found, HoldFate, OpenHolds

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
PAUSE = timedelta(minutes=40)
REFUSED = Answer[Ledger](
    refusal=Refusal(
        code=FailureCode.NOT_AUTHORIZED, message="account_not_found", http_status=404, sentence="There is no account."
    )
)


class Looks:
    """Replaces the calls of a task. `paused_at`: with the answer of which look the run is paused, for `pause`.

    `is_old_run`: it began before ledgers were read by kind or reason.
    """

    call_for = CallFor(task_id="t", tenant_id="a", user_id="b", scene=Scene.IMAGE_GENERATE)
    labels = STEP_LABELS[Scene.IMAGE_GENERATE]

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *,
        paused_at: int | None = None,
        pause: timedelta = PAUSE,
        is_old_run: bool = False,
    ) -> None:
        self.now = NOON
        self.at: list[datetime] = []
        """When the ledger was looked at."""
        self.shown: list[LedgerEntry] = []
        self.shown_later: list[LedgerEntry] = []
        """What it shows once the run was paused."""
        self.earlier = EarlierLives()
        self.cursor: str | None = None
        """Of a ledger that is cut off: what is older than `shown` may be missing."""
        self.is_refused = False
        """Whether the service does not show the ledger."""
        self.row: TaskRow | None = None
        """The task's row, where it was read."""
        self._paused_at, self._pause = paused_at, pause
        patch.setattr(workflow, "now", lambda: self.now)
        patch.setattr(workflow, "patched", lambda change: not (is_old_run and change == BY_KIND_OR_REASON))
        patch.setattr(workflow, "sleep", self._sleep)

    async def _sleep(self, span: timedelta, **_: Any) -> None:
        assert span > timedelta(0)
        self.now += span

    def key(self, step: str, n: int | str) -> str:
        return f"t:{step}:{n}"

    async def until_answered(self, *_: Any, **__: Any) -> Answer[Ledger]:
        self.at.append(self.now)
        reply = Ledger(entries=self.shown[::-1], cursor=self.cursor)
        if len(self.at) == self._paused_at:
            self.now += self._pause
            self.shown = self.shown_later
        return REFUSED if self.is_refused else Answer[Ledger](reply=reply)

    def visible(self, *_: Any, **__: Any) -> Awaitable[Answer[Ledger]]:
        return self.until_answered()

    def search(self, holds: HoldState) -> LedgerSearch:
        look = RowLook(cast(OutsideCall, self))
        look.row = self.row
        return LedgerSearch(cast(OutsideCall, self), holds, look)


def one_hold() -> tuple[OneHold, HoldState]:
    hold = OneHold(1, 24, end="expire")
    return hold, HoldState(asked=[hold.requested()], granted=1, given_back=0)


async def test_what_no_look_shows_within_its_time_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, (hold, state) = Looks(monkeypatch), one_hold()
    looks.shown = entries_of(hold, "kind")[:1]
    assert (await looks.search(state).fate_of(state.asked[0])).fate is HoldFate.UNKNOWN
    assert looks.at[-1] == NOON + LOOK_FOR, "nothing is looked for any longer"


@pytest.mark.parametrize("paused_at", [1, 4, 9])
async def test_an_end_that_came_while_the_run_was_paused_is_found(
    monkeypatch: pytest.MonkeyPatch, paused_at: int
) -> None:
    """A look from before the pause decided, when the time was over: the settlement was unknown."""
    looks, (hold, state) = Looks(monkeypatch, paused_at=paused_at), one_hold()
    looks.shown_later = entries_of(hold, "kind")
    looks.shown = looks.shown_later[:1]
    assert (await looks.search(state).fate_of(state.asked[0])).fate is HoldFate.GIVEN_BACK
    assert len(looks.at) == paused_at + 1
    assert looks.at[-1] - looks.at[-2] <= PAUSE + LOOK_AGAIN_AT_MOST


async def test_a_charge_that_came_while_the_run_was_paused_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, (hold, state) = Looks(monkeypatch, paused_at=3), one_hold()
    looks.shown = entries_of(hold, "reason")
    charge = LedgerEntry(ledger_id="c", task_id="t", change=-24, kind=LedgerKind.CHARGE)
    looks.shown_later = [*looks.shown, charge]
    assert await looks.search(state).charge_shown(1, may_repeat=False) is Shown.CHARGED


async def test_after_a_pause_one_look_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, (hold, state) = Looks(monkeypatch, paused_at=3), one_hold()
    looks.shown = looks.shown_later = entries_of(hold, "kind")[:1]
    assert (await looks.search(state).fate_of(state.asked[0])).fate is HoldFate.UNKNOWN
    assert len(looks.at) == 4


async def test_the_end_of_a_doubled_hold_is_not_taken_for_that_of_the_own_one_while_its_commit_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A commit that acted was answered with another amount, and the whole price was charged again."""
    doubled, own = OneHold(1, 24, end="cancel"), OneHold(2, 24, end="commit", cost=23)
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch, paused_at=2)
    looks.shown = [*entries_of(doubled, "reason"), *entries_of(own, "reason")[:1]]
    looks.shown_later = [*entries_of(doubled, "reason"), *entries_of(own, "reason")]
    assert await looks.search(state).fate_of(state.asked[0], commit_sent=True) == Found(HoldFate.COMMITTED, 23)


async def test_a_hold_beside_a_doubled_one_is_given_back_where_no_look_shows_a_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, doubled = OneHold(1, 24, end="cancel"), OneHold(2, 24, end="cancel")
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch)
    looks.shown = [*entries_of(own, "reason"), *entries_of(doubled, "reason")[:1]]
    assert (await looks.search(state).fate_of(state.asked[0], commit_sent=True)).fate is HoldFate.GIVEN_BACK
    assert looks.at[-1] == NOON + LOOK_FOR


async def test_a_hold_that_was_never_to_be_committed_is_given_back_at_once_beside_a_doubled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, doubled = OneHold(1, 24, end="cancel"), OneHold(2, 24)
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch)
    looks.shown = [*entries_of(own, "reason"), *entries_of(doubled, "reason")]
    assert (await looks.search(state).fate_of(state.asked[0])).fate is HoldFate.GIVEN_BACK
    assert looks.at == [NOON]


@pytest.mark.parametrize(
    ("cut_off", "lives", "shown"),
    [(0, 0, Shown.ABSENT), (2, 0, Shown.UNKNOWN), (0, 1, Shown.UNKNOWN)],
    ids=["its hold in sight", "its hold cut off", "an earlier life may have charged before"],
)
async def test_a_charge_is_absent_from_a_ledger_that_is_cut_before_a_hold_of_the_task(
    monkeypatch: pytest.MonkeyPatch, cut_off: int, lives: int, shown: Shown
) -> None:
    """A charge is newer than the task's holds. The rest stays unpaid where it counts as unknown."""
    looks, hold = Looks(monkeypatch), OneHold(1, 24, end="cancel")
    state = HoldState(asked=[hold.requested()], granted=1, given_back=1)
    looks.cursor, looks.shown = "cut-off", entries_of(hold, "reason")[cut_off:]
    looks.earlier.add(EarlierLife(lives=lives))
    assert await looks.search(state).charge_shown(1, may_repeat=False) is shown


@pytest.mark.parametrize(
    ("life", "hold_ids", "shown"),
    [
        (EarlierLife(), None, Shown.ABSENT),
        (EarlierLife(lives=1), [], Shown.ABSENT),
        (EarlierLife(lives=1), ["hold-1"], Shown.UNKNOWN),
        (EarlierLife(lives=1), None, Shown.UNKNOWN),
        (EarlierLife(lives=1, is_row_missing=True), [], Shown.UNKNOWN),
    ],
    ids=["no reset", "a row without holds", "a row with a hold", "no row was read", "the row was lost"],
)
async def test_a_charge_is_absent_from_an_empty_ledger_only_where_no_life_of_the_task_took_a_hold(
    monkeypatch: pytest.MonkeyPatch, life: EarlierLife, hold_ids: list[str] | None, shown: Shown
) -> None:
    """A hold that is not shown means that the ledger is behind. Where none was taken, none is missing."""
    looks = Looks(monkeypatch)
    looks.earlier.add(life)
    if hold_ids is not None:
        looks.row = cast(TaskRow, SimpleNamespace(hold_ids=hold_ids))
    assert await looks.search(HoldState()).charge_shown(1, may_repeat=False) is shown


async def test_a_hold_beside_a_doubled_one_is_given_back_in_a_cut_ledger_that_shows_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, doubled = OneHold(1, 24, end="cancel"), OneHold(2, 24)
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch)
    looks.cursor, looks.shown = "cut-off", [*entries_of(own, "reason"), *entries_of(doubled, "reason")]
    assert (await looks.search(state).fate_of(state.asked[0], commit_sent=True)).fate is HoldFate.GIVEN_BACK
    assert looks.at[-1] == NOON + LOOK_FOR


@pytest.mark.parametrize("cursor", [None, "cut-off"], ids=["whole", "cut off"])
async def test_a_doubled_hold_is_found_where_the_ledger_shows_it_late(
    monkeypatch: pytest.MonkeyPatch, cursor: str | None
) -> None:
    doubled, own = OneHold(1, 24), OneHold(2, 24, end="cancel")
    state = HoldState(asked=[own.requested()], granted=1, given_back=1)
    looks = Looks(monkeypatch, paused_at=1)
    looks.cursor, looks.shown_later = cursor, [*entries_of(doubled, "reason"), *entries_of(own, "reason")]
    assert await looks.search(state).doubled() == OpenHolds({}, 1, 24)


async def test_whether_a_hold_was_doubled_stays_open_where_the_ledger_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request that was answered came last: an older one may be cut off."""
    own = OneHold(1, 24, end="cancel")
    state = HoldState(asked=[own.requested()], granted=1, given_back=1)
    looks = Looks(monkeypatch)
    looks.cursor, looks.shown = "cut-off", entries_of(own, "reason")
    assert await looks.search(state).doubled() is None


async def test_whether_a_hold_was_doubled_stays_open_where_the_end_of_the_own_one_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The own hold could not be cancelled. Of two that stand, which one is whose is not shown."""
    own, doubled = OneHold(1, 24), OneHold(2, 24)
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch)
    looks.shown = [*entries_of(own, "reason"), *entries_of(doubled, "reason")]
    assert await looks.search(state).doubled() is None
    assert looks.at[-1] == NOON + DOUBLED_FOR


async def test_a_hold_is_given_back_at_once_where_a_commit_is_of_more_points_than_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That commit is another hold's. The task's end would wait for ten minutes."""
    own, larger = OneHold(1, 24, end="cancel"), OneHold(2, 36, end="commit", cost=36)
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch)
    looks.shown = [*entries_of(own, "reason"), *entries_of(larger, "reason")]
    assert await looks.search(state).fate_of(state.asked[0]) == Found(HoldFate.GIVEN_BACK)
    assert looks.at == [NOON]


async def test_an_end_that_was_counted_for_the_delivered_hold_is_not_taken_for_that_of_a_replaced_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work is being charged without the hold, which still counts as open, while the replaced one's cancel is
    refused: the one end that the ledger shows is known already.
    """
    delivered, replaced = OneHold(2, 24, end="cancel"), OneHold(1, 24)
    state = HoldState(asked=[replaced.requested(), delivered.requested()], granted=2, given_back=1)
    state.asked[0].leaving = "renewed"
    looks = Looks(monkeypatch)
    looks.shown = [*entries_of(replaced, "reason"), *entries_of(delivered, "reason")]
    assert (await looks.search(state).fate_of(state.asked[0])).fate is HoldFate.UNKNOWN


@pytest.mark.parametrize(("first", "shown"), [(2_000, Shown.ABSENT), (0, Shown.UNKNOWN)], ids=["shown", "hidden"])
async def test_a_part_of_a_charge_is_absent_only_where_the_part_before_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, first: int, shown: Shown
) -> None:
    """A ledger that lags hides both. The second would be sent again, and charged twice."""
    looks, hold = Looks(monkeypatch), OneHold(1, 2_460, end="cancel")
    state = HoldState(asked=[hold.requested()], granted=1, given_back=1)
    looks.shown = entries_of(hold, "reason")
    if first:
        looks.shown.append(charge_entry(first, "reason"))
    assert await looks.search(state).charge_shown(2, may_repeat=False) is shown


# A task that was reset


async def test_a_hold_of_a_reset_task_is_given_back_once_all_that_have_ended_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without ids the sum over the task's holds decides. A hold that is not shown may have been committed."""
    before, own = OneHold(1, 24, end="cancel"), OneHold(2, 24, end="cancel")
    looks, state = Looks(monkeypatch, paused_at=2, pause=timedelta(0)), HoldState(asked=[own.requested()])
    looks.shown = entries_of(before, "reason")
    looks.shown_later = [*entries_of(before, "reason"), *entries_of(own, "reason")]
    found = await looks.search(state).fate_by_all(state.asked[0], known=2, but=0)
    assert (found, len(looks.at)) == (Found(HoldFate.GIVEN_BACK), 3)


# A service that does not show the ledger


async def test_how_a_hold_ended_is_unknown_where_the_ledger_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, (_, state) = Looks(monkeypatch), one_hold()
    looks.is_refused = True
    assert await looks.search(state).fate_of(state.asked[0]) == Found(HoldFate.UNKNOWN)


async def test_a_ledger_that_stays_unreadable_for_longer_than_a_search_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task's end waits for the search. An answer that cannot be read is no first answer that makes it longer."""
    looks, (_, state) = Looks(monkeypatch, paused_at=1, pause=UNREADABLE_FOR), one_hold()
    looks.is_refused = True
    assert await looks.search(state).fate_of(state.asked[0]) == Found(HoldFate.UNKNOWN)
    assert (looks.at, looks.now) == ([NOON], NOON + UNREADABLE_FOR)


async def test_no_other_hold_is_recorded_where_the_ledger_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, (_, state) = Looks(monkeypatch), one_hold()
    looks.is_refused = True
    assert await looks.search(state).nameless_beside([24]) == OpenHolds()


async def test_a_hold_has_the_points_that_were_requested_where_the_ledger_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its commit was refused as too large: the flow goes on, and commits what was requested at most."""
    looks, (hold, state) = Looks(monkeypatch), one_hold()
    looks.is_refused = True
    assert await looks.search(state).frozen_by(state.asked[0]) == hold.amount


# Runs that older versions began


@pytest.mark.parametrize(
    ("other", "looks_for"), [(None, timedelta(0)), ("larger", LOOK_FOR)], ids=["alone", "beside a larger commit"]
)
async def test_a_run_that_began_before_commits_were_told_apart_by_size_looks_again_only_beside_such_a_commit(
    monkeypatch: pytest.MonkeyPatch, other: str | None, looks_for: timedelta
) -> None:
    """Its history holds these looks: with more of them, or fewer, it would be stuck."""
    own, larger = OneHold(1, 24, end="cancel"), OneHold(2, 36, end="commit", cost=36)
    state = HoldState(asked=[own.requested()], granted=1, given_back=0)
    looks = Looks(monkeypatch)
    monkeypatch.setattr(workflow, "patched", lambda change: change != BY_SIZE)
    looks.shown = [*entries_of(own, "reason"), *(entries_of(larger, "reason") if other else [])]
    await looks.search(state).fate_of(state.asked[0])
    assert looks.now == NOON + looks_for


# Runs older than the patch `ledger-by-kind-or-reason`


async def test_an_older_run_looks_again_until_the_ledger_shows_how_its_hold_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, (hold, state) = Looks(monkeypatch, paused_at=1, pause=timedelta(0), is_old_run=True), one_hold()
    looks.shown_later = entries_of(hold, "kind")
    looks.shown = looks.shown_later[:1]
    assert await looks.search(state).fate_of(state.asked[0]) == Found(HoldFate.GIVEN_BACK)
    assert len(looks.at) == 2


async def test_an_older_run_looks_every_two_minutes_at_least_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, (hold, state) = Looks(monkeypatch, is_old_run=True), one_hold()
    looks.shown = entries_of(hold, "kind")[:1]
    assert (await looks.search(state).fate_of(state.asked[0])).fate is HoldFate.UNKNOWN
    assert looks.at[-1] == NOON + LOOK_FOR
    assert max(later - at for at, later in pairwise(looks.at)) == LOOK_AGAIN_AT_MOST


async def test_an_older_run_does_not_take_the_end_of_another_hold_for_that_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that it replaced was cancelled after the commit, which would count as none: charged once more."""
    looks = Looks(monkeypatch, is_old_run=True)
    replaced, newest = OneHold(1, 24, "cancel"), OneHold(2, 24, "commit", 20)
    state = HoldState(asked=[replaced.requested(), newest.requested()])
    looks.shown = [*entries_of(newest, "kind"), *entries_of(replaced, "kind")]
    assert await looks.search(state).fate_of(state.asked[1]) == Found(HoldFate.COMMITTED, 20)


async def test_an_older_run_reads_a_ledger_by_kind_where_not_every_entry_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, hold = Looks(monkeypatch, is_old_run=True), OneHold(1, 24, end="commit", cost=20)
    state = HoldState(asked=[hold.requested()])
    bonus = LedgerEntry(ledger_id="b", task_id="t", change=5, reason="bonus")
    looks.shown = [bonus, *entries_of(hold, "kind")]
    assert await looks.search(state).fate_of(state.asked[0]) == Found(HoldFate.COMMITTED, 20)


@pytest.mark.parametrize("other", ["stands", "was given back"])
@pytest.mark.parametrize(
    ("rest", "found"), [(24, Found(HoldFate.GIVEN_BACK)), (4, Found(HoldFate.COMMITTED, 20))], ids=["back", "committed"]
)
async def test_an_older_run_compares_totals_of_the_holds_that_have_ended(
    monkeypatch: pytest.MonkeyPatch, rest: int, found: Found, other: str
) -> None:
    """Without kinds each end is one entry: what was returned."""
    looks, replaced, newest = Looks(monkeypatch, is_old_run=True), OneHold(1, 36), OneHold(2, 24)
    state = HoldState(asked=[replaced.requested(), newest.requested()])
    state.asked[0].resolved = other == "was given back"
    changes = [-36, -24, rest, *([36] if state.asked[0].resolved else [])]
    looks.shown = [LedgerEntry(ledger_id="e", task_id="t", change=change, reason="words") for change in changes]
    assert await looks.search(state).fate_of(state.asked[1]) == found
