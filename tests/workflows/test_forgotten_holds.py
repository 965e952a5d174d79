"""What an earlier life held and charged, as row, ledger and histories show it to a run that was reset (contract §4)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.exceptions import ApplicationError

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.credits import ChargeReply, ChargeRequest
from comfyui_temporal.contracts.errors import HOLD_NAMELESS, Answer, ExceptionCode
from comfyui_temporal.contracts.give_back import EarlierJobs
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.tasks import SettlementState
from tests.workflows.holds_in_memory import TASK, Parties, refusal
from tests.workflows.test_ledger_search import NOON
from tests.workflows.test_task_ledger import OneHold, charge_entry, entries_of
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.forgotten_holds import UNKNOWN_RECORDED
from workflows.forgotten_jobs import ForgottenJobs
from workflows.job_routes import JobRoutes
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.settlement import Settlement
from workflows.task_record import TaskRecord

RESET = EarlierLife(lives=1)


def refused_hold(n: int) -> HoldState:
    """What a run knows whose own request for a hold was refused."""
    requested = OneHold(n, 24).requested()
    requested.pre_deduct_id, requested.amount, requested.refused = None, 0, True
    return HoldState(asked=[requested])


def settlement(parties: Parties, holds: CreditHold) -> Settlement:
    return Settlement(TASK, cast(OutsideCall, parties), cast(TaskRecord, parties.records), holds)


# Holds


async def test_of_two_open_holds_the_one_that_was_taken_last_is_kept_for_the_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the row's order. Ids have none: `hold-10` sorts before `hold-9`."""
    parties = Parties(monkeypatch, OneHold(9, 24), OneHold(10, 30))
    parties.earlier.add(RESET)
    parties.hold_ids = ["hold-9", "hold-10"]
    holds = parties.credit_hold(refused_hold(3))
    await holds.forgotten.give_back(keep_one=True)
    assert parties.open_holds == ["hold-10"]
    assert holds.standing is not None
    assert (holds.standing.pre_deduct_id, holds.amount, holds.usable) == ("hold-10", 30, 30)


async def test_a_run_that_was_continued_after_a_reset_waits_for_the_row_that_knows_of_a_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is away and the ledger shows nothing yet. That there was a reset is in what was handed on."""
    parties = Parties(monkeypatch, OneHold(1, 24), shape="reason")
    parties.hold_ids, parties.shown, parties.is_store_away = ["hold-1"], [], True
    await parties.credit_hold(HoldState(lives=1)).forgotten.give_back()
    assert parties.open_holds == []


async def test_a_hold_of_before_a_reset_that_nothing_names_is_recorded_with_its_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service without keys took it for a request whose answer no life of the task had."""
    parties = Parties(monkeypatch, OneHold(1, 24), OneHold(2, 30), shape="reason")
    parties.earlier.add(RESET)
    parties.hold_ids = ["hold-1"]
    await parties.credit_hold(refused_hold(1)).forgotten.give_back()
    nameless = parties.records.exceptions[HOLD_NAMELESS]
    assert (nameless.code, nameless.details) == (ExceptionCode.HOLD_DOUBLED, {"amount": 30, "holds": 1})


@pytest.mark.parametrize("is_delivered", [True, False])
async def test_a_doubled_hold_of_before_a_reset_does_not_hide_that_nothing_was_charged(
    monkeypatch: pytest.MonkeyPatch, is_delivered: bool
) -> None:
    """A renewed training: the answer to its first request was lost, so nothing names hold 1. Hold 2 was renewed by
    hold 3 before the reset; the new run took 4, renewed by 5. Delivered work was not charged, its settlement unknown.
    """
    holds = [OneHold(1, 120), OneHold(2, 120, end="cancel"), OneHold(3, 120), OneHold(4, 120, end="cancel")]
    parties = Parties(monkeypatch, *holds, OneHold(5, 120), shape="reason")
    parties.earlier.add(RESET)
    parties.hold_ids = ["hold-2", "hold-3", "hold-4", "hold-5"]
    state = HoldState(asked=[hold.requested() for hold in (holds[3], OneHold(5, 120))], granted=2, given_back=1)
    state.asked[0].resolved = True
    credits = parties.credit_hold(state)
    await credits.forgotten.give_back(keep_one=is_delivered)
    assert parties.open_holds == ["hold-1", "hold-5"], "the new run's own hold is kept, for the commit or the undo"
    assert (credits.ends.are_unknown, state.charged, credits.forgotten.was_committed) == (False, 0, False)
    assert parties.records.codes == [ExceptionCode.HOLD_DOUBLED]
    assert parties.records.exceptions[HOLD_NAMELESS].details == {"amount": 120, "holds": 1}


async def test_an_own_hold_ends_known_beside_a_doubled_one_of_before_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = Parties(monkeypatch, OneHold(1, 24), OneHold(2, 24, end="cancel"), shape="reason")
    parties.earlier.add(RESET)
    parties.hold_ids = ["hold-2"]
    state = HoldState(asked=[OneHold(2, 24).requested()], granted=1, given_back=0)
    credits = parties.credit_hold(state)
    await credits.forgotten.give_back()
    await credits.give_back("the task is cancelled")
    assert (credits.ends.are_unknown, state.given_back) == (False, 1)


async def test_an_own_hold_ends_known_once_the_open_one_of_before_a_reset_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a ledger without ids the only end may be either hold's until both have ended."""
    parties = Parties(monkeypatch, OneHold(1, 24), OneHold(2, 24, end="cancel"), shape="reason")
    parties.earlier.add(RESET)
    parties.hold_ids = ["hold-1", "hold-2"]
    state = HoldState(asked=[OneHold(2, 24).requested()], granted=1, given_back=0)
    credits = parties.credit_hold(state)
    await credits.give_back("the task is cancelled")
    assert parties.open_holds == []
    assert (credits.ends.are_unknown, parties.records.codes) == (False, [])


async def test_a_commit_of_before_a_reset_that_is_not_shown_stays_unknown_beside_a_doubled_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ends are shown of the three holds that have surely ended: the third may be a commit."""
    holds = [OneHold(n, 24, end="cancel") for n in (2, 3)]
    parties = Parties(monkeypatch, OneHold(1, 24), *holds, OneHold(4, 24), OneHold(5, 24), shape="reason")
    parties.holds["hold-4"].end = "commit"
    parties.earlier.add(RESET)
    parties.hold_ids = ["hold-2", "hold-3", "hold-4", "hold-5"]
    state = HoldState(asked=[OneHold(5, 24).requested()], granted=1)
    credits = parties.credit_hold(state)
    await credits.forgotten.give_back(keep_one=True)
    assert credits.forgotten.is_unknown


async def test_a_commit_of_before_a_reset_that_is_cut_off_stays_unknown_beside_doubled_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many ends are shown as there are known holds. One of them is a doubled hold's, and the commit is cut off."""
    committed, doubled = OneHold(1, 24, end="commit", cost=24), [OneHold(3, 24, end="cancel"), OneHold(4, 24)]
    parties = Parties(monkeypatch, committed, OneHold(2, 24), *doubled, shape="reason")
    parties.earlier.add(RESET)
    parties.hold_ids, parties.cursor = ["hold-1", "hold-2"], "cut-off"
    parties.shown = parties.shown[len(entries_of(committed, "reason")) :]
    credits = parties.credit_hold(refused_hold(1))
    await credits.forgotten.give_back()
    assert parties.open_holds == ["hold-4"]
    assert credits.ends.are_unknown
    assert parties.records.codes == [ExceptionCode.SETTLEMENT_UNKNOWN, ExceptionCode.HOLD_DOUBLED]


async def test_ends_do_not_count_where_the_ledger_lacks_one_of_the_known_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows as many ends as known holds have to end, and no hold beside them: the missing one may be committed."""
    parties = Parties(monkeypatch, OneHold(1, 24, end="cancel"), OneHold(2, 24, end="cancel"), shape="reason")
    parties.earlier.add(RESET)
    assert await parties.search(HoldState()).once_all_ended(but=1, known=3) is None


async def test_a_hold_whose_cancel_a_long_run_had_no_time_for_is_cancelled_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that is about to continue as new makes no further call in the background."""
    parties = Parties(monkeypatch, OneHold(1, 24))
    parties.earlier.add(RESET)
    parties.hold_ids, parties.is_suspended = ["hold-1"], True
    forgotten = parties.credit_hold(HoldState()).forgotten
    await forgotten.give_back()
    assert (parties.open_holds, forgotten.left()) == (["hold-1"], ["hold-1"])
    parties.is_suspended = False
    await forgotten.give_back()
    assert (parties.open_holds, forgotten.left()) == ([], [])


async def test_a_hold_whose_cancel_is_refused_is_recorded_where_the_ledger_is_refused_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parties = Parties(monkeypatch, OneHold(1, 24))
    parties.earlier.add(RESET)
    parties.hold_ids, parties.refuses_cancels, parties.is_ledger_refused = ["hold-1"], "amount_invalid", True
    holds = parties.credit_hold(HoldState())
    await holds.forgotten.give_back()
    assert parties.records.codes == [ExceptionCode.HOLD_LEFT_TO_EXPIRY, ExceptionCode.SETTLEMENT_UNKNOWN]
    assert holds.ends.are_unknown


@pytest.mark.parametrize("end", ["expire", None])
async def test_a_hold_that_was_left_to_its_expiry_leaves_its_task_unknown_until_the_ledger_shows_its_end(
    monkeypatch: pytest.MonkeyPatch, end: str | None
) -> None:
    hold = OneHold(1, 24, end=end)
    parties = Parties(monkeypatch, hold)
    parties.earlier.add(RESET)
    state = HoldState(asked=[hold.requested()], granted=1, given_back=0, is_left=True)
    state.asked[0].resolved = True
    holds = parties.credit_hold(state)
    await holds.forgotten.give_back()
    assert (holds.ends.are_unknown, state.charged) == (end is None, 0)


def test_a_ledger_that_is_refused_shows_no_end_of_a_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Parties(monkeypatch).credit_hold(HoldState()).forgotten._have_all_ended(None, [])


@pytest.mark.parametrize(
    ("unpatched", "codes"),
    [((), [ExceptionCode.SETTLEMENT_UNKNOWN]), ((UNKNOWN_RECORDED,), [])],
    ids=["today's", "an older version's"],
)
async def test_an_unknown_end_is_recorded_in_runs_whose_history_has_that_record(
    monkeypatch: pytest.MonkeyPatch, unpatched: tuple[str, ...], codes: list[str]
) -> None:
    """A run that an older version began would be stuck: replayed, it would write what its history does not hold."""
    parties = Parties(monkeypatch, unpatched=unpatched)
    parties.earlier.add(RESET)
    parties.is_ledger_refused = True
    await parties.credit_hold(HoldState()).forgotten.give_back()
    assert parties.records.codes == codes


# Charges


async def test_where_no_charge_was_sent_none_is_missing_in_a_ledger_that_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parties = Parties(monkeypatch)
    parties.earlier.add(RESET)
    parties.is_ledger_refused = True
    forgotten = parties.credit_hold(HoldState()).forgotten
    await forgotten.give_back()
    assert await forgotten.look_for_charges(0)


async def test_a_charge_that_was_shown_is_not_recorded_as_missing_beside_a_hold_of_unknown_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parties = Parties(monkeypatch)
    parties.earlier.add(RESET)
    parties.shown = [charge_entry(24, "kind")]
    holds = parties.credit_hold(HoldState())
    await holds.forgotten.give_back()
    holds.ends.mark_unknown()
    assert await holds.forgotten.look_for_charges(1)
    assert (parties.at, parties.records.codes) == ([NOON], [])


async def test_a_charge_that_the_ledger_shows_late_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = OneHold(1, 24, end="expire")
    parties = Parties(monkeypatch, hold, paused_at=1)
    parties.earlier.add(RESET)
    parties.shown_later = [*entries_of(hold, "kind"), charge_entry(24, "kind")]
    state = HoldState()
    holds = parties.credit_hold(state)
    await holds.forgotten.give_back()
    assert state.charged == 0
    assert await holds.forgotten.look_for_charges(1)
    assert (state.charged, parties.records.codes) == (24, [])


@pytest.mark.parametrize(("is_old", "charges"), [(False, [460]), (True, [])], ids=["today's", "an older version's"])
async def test_a_give_back_charges_what_an_earlier_life_had_not_charged_yet_of_the_price(
    monkeypatch: pytest.MonkeyPatch, is_old: bool, charges: list[int]
) -> None:
    """The run that ended had requested no part. An older version did not count what the ledger shows before it
    charged: it would take the first 2,000 points twice.
    """
    parties, state = Parties(monkeypatch, OneHold(1, 2_460, end="expire")), HoldState()
    parties.earlier.add(RESET)
    parties.shown.append(charge_entry(2_000, "kind"))
    holds = parties.credit_hold(state)
    await (holds.ledger.read() if is_old else holds.forgotten.give_back())
    finished = settlement(parties, holds)
    await finished.finish([], 2_460, is_refused=False, has_read=not is_old, was_completed=False)
    assert parties.charges == charges


class Short(Parties):
    """The balance is too short for any charge."""

    def _charge(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        return Answer[ChargeReply](refusal=refusal("insufficient_balance"))


async def test_a_give_back_records_as_shortfall_what_the_balance_lacks_for_the_rest_of_a_price(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run that ended had charged the first 2,000 points."""
    parties, state = Short(monkeypatch, OneHold(1, 2_460, end="expire")), HoldState()
    parties.earlier.add(RESET)
    parties.shown.append(charge_entry(2_000, "kind"))
    holds = parties.credit_hold(state)
    await holds.forgotten.give_back()
    await settlement(parties, holds).finish([], 2_460, is_refused=False, has_read=True, was_completed=False)
    assert (state.charged, state.shortfall, parties.records.codes) == (2_000, 460, [ExceptionCode.SHORTFALL])


class Silent(Parties):
    """No charge is answered."""

    def visible(self, method: Any, argument: Any, **named: Any) -> Any:
        if method is CreditsActivities.charge:
            raise ApplicationError("The service does not answer.", type="timeout")
        return super().visible(method, argument, **named)


async def test_a_charge_without_a_hold_whose_end_is_unknown_is_recorded_with_its_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The price was 0 until the delivery, and no hold was ever taken."""
    parties, state = Silent(monkeypatch), HoldState()
    parties.is_ledger_refused = True
    await settlement(parties, parties.credit_hold(state)).charge(24)
    [unknown] = parties.records.exceptions.values()
    assert (unknown.code, unknown.details["cost"], unknown.details["pre_deduct_id"]) == (
        ExceptionCode.SETTLEMENT_UNKNOWN,
        24,
        None,
    )
    assert state.settlement is SettlementState.UNKNOWN


async def test_the_rest_of_a_hold_comes_back_in_the_events_of_a_run_that_did_not_record_what_it_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Version 0.1.0 began it. Else its events would charge the price a second time."""
    hold = OneHold(1, 24)
    parties, state = Parties(monkeypatch, hold), HoldState(asked=[hold.requested()], granted=1)
    await settlement(parties, parties.credit_hold(state)).charge(20)
    assert (state.charged, parties.records.points) == (20, 4)


async def test_a_delivery_is_committed_under_the_next_number_where_an_earlier_life_has_used_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That life's commit was refused, because its hold had expired."""
    parties = Parties(monkeypatch, OneHold(1, 24, end="expire"), OneHold(2, 24))
    parties.earlier.add(RESET)
    parties.hold_ids, parties.used_keys = ["hold-1", "hold-2"], ["t:commit:1"]
    state = HoldState(asked=[OneHold(2, 24).requested()], granted=1)
    await settlement(parties, parties.credit_hold(state)).charge(24)
    assert (parties.holds["hold-2"].end, parties.charges) == ("commit", [])
    assert (state.charged, state.settlement, parties.records.codes) == (24, SettlementState.SETTLED, [])


class Histories(Parties):
    """Of earlier runs, which sent two charges."""

    were_read = False

    async def unanswered_jobs(self) -> EarlierJobs:
        self.were_read = True
        return EarlierJobs(charges=2)

    def visible(self, *_: Any, **__: Any) -> Any:
        return self.unanswered_jobs()

    def forgotten_jobs(self) -> ForgottenJobs:
        outside, record = cast(OutsideCall, self), cast(TaskRecord, self.records)
        attempts = cast(Attempts, SimpleNamespace(asked=[]))
        return ForgottenJobs(cast(JobRoutes, None), outside, record, attempts, RowLook(outside))


@pytest.mark.parametrize(
    ("life", "unpatched", "charges"),
    [
        (RESET, (), 2),
        (EarlierLife(is_store_away=True), (), 0),
        (RESET, ("charges-of-earlier-lives-looked-for",), 0),
    ],
    ids=["reset", "the store away", "an older version's"],
)
async def test_charges_of_before_are_read_in_histories_only_where_there_was_a_reset(
    monkeypatch: pytest.MonkeyPatch, life: EarlierLife, unpatched: tuple[str, ...], charges: int
) -> None:
    """The reading waits for the store: a cancel while it is away would have no end. A run that an older version began
    would be stuck: its history does not hold that call.
    """
    histories = Histories(monkeypatch, unpatched=unpatched)
    histories.earlier.add(life)
    assert await histories.forgotten_jobs().charges_sent() == charges
    assert histories.were_read is bool(charges)
