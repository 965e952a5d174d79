"""A task's own holds: which counts as cover, which are undone, and what is recorded of a doubled one (contract §4)."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, cast

import pytest

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.credits import CancelHoldReply
from comfyui_temporal.contracts.errors import Answer, ExceptionCode, FailureCode, Refusal, RefusalKind
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.requests import HoldState
from tests.workflows.holds_in_memory import Parties, once, refusal
from tests.workflows.test_ledger_search import NOON
from tests.workflows.test_task_ledger import OneHold
from workflows.credit_hold import CreditHold
from workflows.doubled_holds import DoubledHolds
from workflows.failures import RowEnded
from workflows.task_record import TaskRecord


def own(hold: OneHold, **known: Any) -> HoldState:
    """What a run knows that has taken this hold at noon."""
    requested = hold.requested()
    requested.asked_at = NOON
    return HoldState(asked=[requested], granted=1, given_back=0, **known)


@pytest.mark.parametrize(("seconds", "phases"), [(60, [None]), (59, ["cancel", None])], ids=["60 s", "59 s"])
async def test_a_hold_with_less_than_a_minute_left_is_cancelled_and_taken_again(
    monkeypatch: pytest.MonkeyPatch, seconds: int, phases: list[str | None]
) -> None:
    """Five minutes are left until the deadline, and a hold outlasts it by five more."""
    parties = Parties(monkeypatch)
    parties.answers_after = timedelta(seconds=600 - seconds)
    await parties.credit_hold(HoldState()).cover(24)
    assert [hold.end for hold in parties.holds.values()] == phases


async def test_a_renewal_that_was_stopped_after_a_lost_answer_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first sending took a hold; the second was not made, because the task's row had ended."""
    first = OneHold(1, 24)
    parties = Parties(monkeypatch, first)
    parties.first_answer = Answer(refusal=refusal(RefusalKind.TASK_ENDED), tries=2)
    held = parties.credit_hold(own(first))
    held.require(36)
    held.check()
    await once(lambda: len(parties.holds) == 2)
    await held.give_back("the task has ended")
    assert parties.open_holds == []
    assert parties.records.codes == []


async def test_a_hold_that_lasts_just_as_long_as_its_task_may_need_is_not_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every hold is requested for just that long: each renewal takes the payer's points twice for a while."""
    parties = Parties(monkeypatch)
    held = parties.credit_hold(HoldState())
    await held.cover(24)
    parties.now += timedelta(seconds=400)
    held.check()
    assert (parties.open_holds, held.is_renewing()) == (["hold-1"], False)


def test_while_no_hold_stands_the_last_one_that_was_granted_says_what_was_covered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A training's price is compared with it: one that was held before is not to be confirmed again in a gap."""
    over, refused = OneHold(1, 24, end="cancel"), OneHold(2, 36).requested()
    state = own(over, uncovered_since=NOON)
    state.asked[0].resolved, refused.pre_deduct_id, refused.refused = True, None, True
    state.asked.append(refused)
    held = Parties(monkeypatch, over).credit_hold(state)
    assert (held.standing, held.covered) == (None, 24)


class LongWhileShort(Parties):
    """The balance is too short beside a hold of before the reset. The run continues as new while that is cancelled."""

    async def until_answered(self, *arguments: Any, **named: Any) -> Answer[Any]:
        if arguments[0] is CreditsActivities.pre_deduct:
            code, message = FailureCode.INSUFFICIENT_BALANCE, "insufficient_balance"
            return Answer(refusal=Refusal(code=code, message=message, http_status=402, sentence="It is too short."))
        if arguments[0] is CreditsActivities.cancel_hold:
            self.is_suspended = True
            await asyncio.Event().wait()
        return await super().until_answered(*arguments, **named)


async def test_a_run_that_continues_as_new_while_it_gives_back_a_hold_of_before_leaves_the_rest_to_the_next_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That hold's points will be enough for the first hold of a training that was free: it is not without cover."""
    parties = LongWhileShort(monkeypatch, OneHold(1, 24))
    parties.earlier.add(EarlierLife(lives=1))
    parties.hold_ids = ["hold-1"]
    state = HoldState()
    held = parties.credit_hold(state)
    held.require(24)
    held.check()
    await once(held.has_update)
    held.check()
    assert (parties.records.codes, state.uncovered_since) == ([], None)


class Slow(Parties):
    """With a credits service that takes its time to grant a hold."""

    requests = 0

    async def in_background(self, method: Any, argument: Any, **named: Any) -> Answer[Any] | None:
        if method is CreditsActivities.pre_deduct:
            self.requests += 1
            for _ in range(20):
                await asyncio.sleep(0)
        return await super().in_background(method, argument, **named)


async def test_a_renewal_in_flight_is_waited_for_and_not_requested_again_before_a_settlement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service without keys would take another hold for a second request."""
    first = OneHold(1, 24)
    parties, state = Slow(monkeypatch, first), own(first)
    held = parties.credit_hold(state)
    held.require(36)
    held.check()
    await once(lambda: parties.requests == 1)
    await held.settled_renewal()
    assert (parties.requests, state.asked_again) == (1, 0)
    assert parties.open_holds == ["hold-2"]


class Ended(Parties):
    """The task's row has ended: no call that begins something is sent."""

    async def setup(self, *_: Any, **__: Any) -> Answer[Any]:
        raise RowEnded(is_unsent=True)


@pytest.mark.parametrize(
    ("unpatched", "ends"),
    [((), []), (("unsent-hold-not-undone",), ["cancel"])],
    ids=["today's", "an older version's"],
)
async def test_a_hold_that_was_never_requested_is_not_taken_by_its_undo(
    monkeypatch: pytest.MonkeyPatch, unpatched: tuple[str, ...], ends: list[str]
) -> None:
    """The undo repeats a request to learn its id. A run that an older version began would be stuck without that: its
    history holds the call.
    """
    parties = Ended(monkeypatch, unpatched=unpatched)
    held = parties.credit_hold(HoldState())
    with pytest.raises(RowEnded):
        await held.cover(24)
    await held.give_back("the task has ended")
    assert [hold.end for hold in parties.holds.values()] == ends


async def test_a_dearer_hold_is_taken_once_the_renewal_in_flight_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = OneHold(1, 24)
    parties = Parties(monkeypatch, first)
    held = parties.credit_hold(own(first))
    held.require(30)
    held.check()
    async with asyncio.timeout(5):
        await held.cover(36)
        await once(lambda: parties.open_holds == ["hold-3"])
    assert [hold.amount for hold in parties.holds.values()] == [24, 30, 36]
    assert not held.is_renewing()


class Kept(Parties):
    """While a hold is requested the standing one is kept alive, as in every wait of a run."""

    held: CreditHold

    async def setup(self, method: Any, argument: Any, **_: Any) -> Answer[Any]:
        self.held.check()
        await asyncio.sleep(0)
        return await super().setup(method, argument)


async def test_no_hold_is_renewed_while_a_dearer_one_is_taken_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The payer's points would be held three times over, or be too few."""
    first = OneHold(1, 24)
    parties = Kept(monkeypatch, first)
    parties.held = held = parties.credit_hold(own(first))
    held.require(36)
    await held.cover(36)
    await once(lambda: "hold-1" not in parties.open_holds)
    assert [hold.amount for hold in parties.holds.values()] == [24, 36]
    assert parties.open_holds == ["hold-2"]


async def test_no_end_waits_for_a_doubled_hold_once_the_ledger_shows_the_end_of_the_own_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No keys, no ids: the end that was answered is later than every request, and so is what shows it."""
    hold = OneHold(1, 24)
    parties = Parties(monkeypatch, hold, shape="reason")
    await parties.credit_hold(own(hold, asked_again=1)).give_back("the task was cancelled")
    assert (parties.open_holds, parties.records.codes) == ([], [])
    assert parties.at == [NOON], "one look is enough"


async def test_no_end_waits_for_a_doubled_hold_of_a_service_that_keeps_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a service takes no second one, however late its ledger is."""
    hold = OneHold(1, 24)
    parties = Parties(monkeypatch, hold, shape="kind")
    await parties.credit_hold(own(hold, asked_again=1)).give_back("the task was cancelled")
    assert (parties.open_holds, parties.records.codes, parties.at) == ([], [], [NOON])


async def test_a_run_that_goes_on_while_its_old_hold_is_given_back_takes_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The balance was too short for both, and the run before continued as new between the two."""
    old = OneHold(1, 24)
    parties, state = Parties(monkeypatch, old), own(old, uncovered_since=NOON)
    state.asked[0].leaving = "renewed"
    held = parties.credit_hold(state)
    held.check()
    await once(held.is_covered)
    assert parties.open_holds == ["hold-2"]


class Hanging(Parties):
    """With a credits service that takes its time to cancel a hold."""

    cancels = 0

    async def in_background(self, method: Any, argument: Any, **named: Any) -> Answer[Any] | None:
        if method is CreditsActivities.cancel_hold:
            self.cancels += 1
            for _ in range(20):
                await asyncio.sleep(0)
        return await super().in_background(method, argument, **named)


async def test_a_replaced_hold_whose_cancel_hangs_is_not_cancelled_again_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted twice as given back, the end of another hold would be taken for shown."""
    old = OneHold(1, 24)
    parties, state = Hanging(monkeypatch, old), own(old)
    state.asked[0].leaving, state.asked[0].told = "renewed", 24
    held = parties.credit_hold(state)
    held.resume()
    await once(lambda: parties.cancels == 1)
    held.resume()
    await held.give_back("the task was cancelled")
    assert parties.open_holds == []
    assert (parties.cancels, state.given_back, parties.records.points) == (1, 1, 24)


async def test_nothing_counts_as_returned_while_a_hold_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = OneHold(1, 24)
    held = Parties(monkeypatch, hold).credit_hold(own(hold))
    assert (held.summary().held, held.summary().returned) == (24, 0)
    await held.give_back("the task was cancelled")
    assert (held.summary().held, held.summary().returned) == (24, 24)


@pytest.mark.parametrize(
    ("end", "refuses"),
    [("expire", None), (None, RefusalKind.HOLD_NOT_FOUND)],
    ids=["expired", "unknown to the service"],
)
async def test_a_hold_that_was_over_before_its_cancel_is_published_as_given_back(
    monkeypatch: pytest.MonkeyPatch, end: str | None, refuses: str | None
) -> None:
    """Else the points of the task's events would not add up, or its settlement would be unknown."""
    hold = OneHold(1, 24, end=end)
    parties, state = Parties(monkeypatch, hold), own(hold)
    parties.refuses_cancels, state.asked[0].told = refuses, 24
    held = parties.credit_hold(state)
    await held.give_back("the task was cancelled")
    assert (parties.records.points, parties.records.codes, held.ends.are_unknown) == (24, [], False)


@pytest.mark.parametrize(("charged", "points"), [(0, 24), (24, 0)], ids=["nothing was charged", "it was charged"])
def test_a_hold_whose_end_was_in_doubt_is_published_as_given_back_where_the_last_reading_shows_no_charge(
    monkeypatch: pytest.MonkeyPatch, charged: int, points: int
) -> None:
    hold = OneHold(1, 24)
    parties, state = Parties(monkeypatch, hold), own(hold, charged=charged)
    state.asked[0].resolved, state.asked[0].told = True, 24
    parties.credit_hold(state).publish_ends_seen()
    assert parties.records.points == points


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(reply=CancelHoldReply(pre_deduct_id="hold-2")), "It was cancelled."),
        (Answer(refusal=refusal("pre_deduct_not_found")), "It had ended before it was to be cancelled. It was refused"),
        (Answer(refusal=refusal("amount_invalid")), "It could not be cancelled: it ends by expiry"),
        (None, "It could not be cancelled: it ends by expiry"),
    ],
    ids=["cancelled", "over", "refused", "not answered"],
)
async def test_a_doubled_hold_is_recorded_with_what_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch, answer: Answer[CancelHoldReply] | None, said: str
) -> None:
    parties = Parties(monkeypatch, OneHold(1, 24, end="cancel"), OneHold(2, 30))
    state = own(OneHold(1, 24), asked_again=1)

    sent = list[tuple[str, ...]]()

    async def cancel(*call: str) -> Answer[CancelHoldReply] | None:
        sent.append(call)
        return answer

    record = cast(TaskRecord, parties.records)
    await DoubledHolds(state, parties.search(state), record, cancel).give_back("the task was cancelled")
    assert sent == [("hold-2", "doubled-1", "the task was cancelled")]
    [doubled] = parties.records.exceptions.values()
    assert (doubled.code, doubled.details) == (ExceptionCode.HOLD_DOUBLED, {"amount": 30, "pre_deduct_id": "hold-2"})
    assert said in doubled.message
    reason = "The call was not answered." if answer is None else answer.refusal.sentence if answer.refusal else ""
    assert reason in doubled.message
