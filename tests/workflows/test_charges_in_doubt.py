"""What is kept of charges that may have taken effect, when they are looked for, and for how long."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow
from temporalio.exceptions import ApplicationError

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.credits import CHARGE_REASON, ChargeReply, ChargeRequest
from comfyui_temporal.contracts.errors import Answer, ExceptionCode, RefusalKind
from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE, EarlierLife
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.task_store import UnsettledTask
from comfyui_temporal.contracts.tasks import CreditsSummary, ImageTask, SettlementState
from store.unsettled import LOOKED_AT_FOR
from tests.workflows.holds_in_memory import refusal
from tests.workflows.test_ledger_search import NOON, Looks
from tests.workflows.test_task_ledger import OneHold, charge_entry, entries_of
from workflows import correction
from workflows.charges import STORE_AGAIN_AT_MOST
from workflows.credit_hold import CreditHold
from workflows.hold_ends import HoldEnds
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.settlement import Settlement
from workflows.task_ledger import TaskLedger
from workflows.task_record import TaskRecord

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_a_later_life_that_sent_more_charges_makes_a_record_of_its_own() -> None:
    """A store keeps the first record of a key. Seen: the second charge was never waited for."""
    ends, keys = HoldEnds(HoldState()), []
    for charges in (0, 1, 2):
        ends.charges = charges
        keys.append(ends.unknown_key)
    assert keys == ["settlement_unknown", "settlement_unknown:1", "settlement_unknown:2"]


@pytest.mark.parametrize(("hours", "is_awaited"), [(21, True), (23, False)])
def test_more_than_one_look_is_left_once_a_charge_counts_as_not_made(
    monkeypatch: pytest.MonkeyPatch, hours: int, *, is_awaited: bool
) -> None:
    """Looks are an hour or more apart, and one may fail. Seen: the only one left was missed, and nothing corrected."""
    monkeypatch.setattr(workflow, "now", lambda: NOW)
    task = cast(UnsettledTask, SimpleNamespace(charges=1, ended_at=NOW - timedelta(hours=hours)))
    assert correction._may_show_more(task, TaskLedger([], is_complete=True)) is is_awaited
    looked_at_after = LOOKED_AT_FOR - correction.LAST_LOOK_AFTER
    assert looked_at_after >= timedelta(hours=2)


@pytest.mark.parametrize("charges", [0, 1])
def test_a_task_whose_end_an_older_worker_does_not_name_is_not_kept_from_its_correction(charges: int) -> None:
    """Such a worker took it from the store. The pass goes on with what it says."""
    task = UnsettledTask(
        task_id="t",
        tenant_id="a",
        user_id="b",
        scene=Scene.IMAGE_GENERATE,
        priority=TaskPriority.STANDARD,
        credits=CreditsSummary(),
        charges=charges,
    )
    assert not correction._may_show_more(task, TaskLedger([]))


class FakeRecord:
    """What a settlement reports to its task's record."""

    def __init__(self) -> None:
        self.exceptions: list[str] = []

    def record_exception(self, _key: str, code: ExceptionCode, _message: str, **_: Any) -> None:
        self.exceptions.append(code.value)

    def credits_changed(self, credits: CreditsSummary) -> CreditsSummary:
        return credits

    def publish(self, *_: Any, **__: Any) -> None:
        pass


class Seen(RowLook):
    """The row was read, and names no hold that the run does not know."""

    async def once(self) -> bool:
        return True


class Service(Looks):
    """Answers commits and charges too. Each hold has ended before its commit, and the policy charges shortfalls."""

    limits = SimpleNamespace(policy=SimpleNamespace(charge_shortfall=True))

    def __init__(self, patch: pytest.MonkeyPatch, *, refuses_charges: bool = False) -> None:
        super().__init__(patch)
        self.posts: list[Post[Any]] = []
        """The commits and charges that were sent."""
        self._refuses_charges = refuses_charges

    @property
    def keys(self) -> list[str]:
        return [post.key for post in self.posts]

    def key(self, step: str, n: int | str) -> str:
        return f"t:{step}:{n}"

    async def until_answered(self, *arguments: Any, **_: Any) -> Answer[Any]:
        method, argument = arguments
        if method is CreditsActivities.ledger:
            return await super().until_answered()
        self.posts.append(argument)
        if method is CreditsActivities.commit:
            return Answer[Any](refusal=refusal(RefusalKind.HOLD_ALREADY_RESOLVED))
        assert method is CreditsActivities.charge
        return self._charge(argument.body.amount)

    def visible(self, method: Any, argument: Any, **_: Any) -> Awaitable[Any]:
        return self.until_answered(method, argument)

    def _charge(self, points: int) -> Answer[Any]:
        if self._refuses_charges:
            return Answer[Any](refusal=refusal("insufficient_balance"))
        self.shown.append(charge_entry(points, "kind"))
        return Answer[Any](reply=ChargeReply(ledger_id="c", change=-points))


class Settled:
    """The settlement of one image, whose only hold is `hold`, by what `looks` shows."""

    def __init__(self, looks: Looks, hold: OneHold | None, *, charges_sent: int = 0) -> None:
        async def of_earlier_lives() -> int:
            return charges_sent

        outside, record = cast(OutsideCall, looks), FakeRecord()
        task = ImageTask(task_id="t", tenant_id="a", user_id="b", template_id="upscale", prompt="a cat")
        self.state = HoldState(asked=[] if hold is None else [hold.requested()])
        self.held = CreditHold(task, outside, cast(TaskRecord, record), lambda: NOW, self.state, Seen(outside))
        self.settlement = Settlement(task, outside, cast(TaskRecord, record), self.held, of_earlier_lives)
        self.exceptions = record.exceptions


async def test_a_commit_of_the_whole_price_is_settled_whatever_charge_an_earlier_life_had_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That charge was never made. Looked for, it would leave a task unknown of which nothing is missing."""
    hold, looks = OneHold(1, 24, "commit", cost=24), Looks(monkeypatch)
    looks.shown = entries_of(hold, "kind")
    looks.earlier.add(EarlierLife(lives=2))
    task = Settled(looks, hold, charges_sent=1)
    await task.settlement.charge(24)
    assert (task.state.charged, task.state.settlement, task.exceptions) == (24, SettlementState.SETTLED, [])
    assert len(looks.at) == 1


async def test_what_a_charge_that_may_have_acted_leaves_of_the_price_is_no_shortfall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A commit of an earlier life took 24 points of 36, and no look shows the charge that it sent of the rest."""
    hold, looks = OneHold(1, 24, "commit", cost=24), Looks(monkeypatch)
    looks.shown = entries_of(hold, "kind")
    looks.earlier.add(EarlierLife(lives=1))
    task = Settled(looks, hold, charges_sent=1)
    await task.settlement.charge(36)
    assert (task.state.settlement, task.state.shortfall) == (SettlementState.UNKNOWN, 0)
    assert task.exceptions == ["settlement_unknown"]


async def test_a_charge_that_was_refused_is_not_tried_again_as_what_the_hold_lacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hold had expired, so all of the price was to be charged. Another try would be a second request."""
    hold, service = OneHold(1, 24, "expire"), Service(monkeypatch, refuses_charges=True)
    service.shown = entries_of(hold, "kind")
    task = Settled(service, hold)
    await task.settlement.charge(24)
    assert service.keys == ["t:commit:1", "t:charge:1"]
    assert (task.state.charged, task.state.shortfall, task.exceptions) == (0, 24, ["shortfall"])


@pytest.mark.parametrize("refuses", [False, True], ids=["charged", "refused"])
async def test_work_for_which_nothing_was_held_is_charged_or_short(
    monkeypatch: pytest.MonkeyPatch, *, refuses: bool
) -> None:
    """A task that was free, and whose price rose with its delivery."""
    service = Service(monkeypatch, refuses_charges=refuses)
    task = Settled(service, None)
    await task.settlement.charge(24)
    assert service.keys == ["t:charge:1"]
    assert (task.state.charged, task.state.shortfall) == ((0, 24) if refuses else (24, 0))
    assert (task.state.settlement, task.exceptions) == (SettlementState.SETTLED, ["shortfall"] if refuses else [])


async def test_a_charge_that_nobody_can_have_sent_before_is_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service keeps no keys, and its hold had ended. Where there was no reset, no ledger has to be waited for."""
    hold, service = OneHold(1, 24, "cancel"), Service(monkeypatch)
    service.shown = entries_of(hold, "reason")
    task = Settled(service, hold)
    await task.settlement.charge(24)
    assert (service.keys, task.state.charged) == (["t:commit:1", "t:charge:1"], 24)
    assert service.now == NOON


class StoreAway(Service):
    """The task store, which is read before each charge, is away for five minutes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch)
        self.tried_at: list[datetime] = []

    def visible(self, method: Any, argument: Any, **named: Any) -> Awaitable[Any]:
        if method is not CreditsActivities.charge:
            return super().visible(method, argument, **named)
        self.tried_at.append(self.now)
        assert len(self.tried_at) < 100, "nothing would come between two tries"
        return super().visible(method, argument) if self.now >= NOON + timedelta(minutes=5) else self._away()

    async def _away(self) -> None:
        raise ApplicationError("The task store does not answer.", type=STORE_UNAVAILABLE)


async def test_a_charge_waits_longer_and_longer_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try is kept in the run's history, which has an end."""
    hold, service = OneHold(1, 24, "expire"), StoreAway(monkeypatch)
    service.shown = entries_of(hold, "kind")
    task = Settled(service, hold)
    await task.settlement.charge(24)
    pauses = [(after - before).total_seconds() for before, after in pairwise(service.tried_at)]
    assert pauses[:4] == [2, 4, 8, 16]
    assert max(pauses) == STORE_AGAIN_AT_MOST.total_seconds()
    assert (service.keys, task.state.charged, task.exceptions) == (["t:commit:1", "t:charge:1"], 24, [])


def charge_requested(n: int, amount: int) -> Post[ChargeRequest]:
    body = ChargeRequest(
        tenant_id="a",
        user_id="b",
        template_id="upscale",
        task_id="t",
        amount=amount,
        priority=TaskPriority.STANDARD,
        reason=CHARGE_REASON,
    )
    return Post[ChargeRequest](call_for=Looks.call_for, key=f"t:charge:{n}", body=body)


async def test_a_part_before_one_that_was_refused_is_looked_for_by_a_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ended before its end was written, and the ledger shows the part late."""
    hold, looks = OneHold(1, 2_460, "cancel"), Looks(monkeypatch, paused_at=1)
    looks.shown = entries_of(hold, "reason")
    looks.shown_later = [*looks.shown, charge_entry(2_000, "reason")]
    task = Settled(looks, hold)
    parts = [charge_requested(1, 2_000), charge_requested(2, 460)]
    await task.settlement.finish(parts, 2_460, is_refused=True, has_read=True, was_completed=False)
    assert (task.state.charged, task.state.shortfall, task.exceptions) == (2_000, 460, ["shortfall"])


async def left_by_a_run(service: Service, hold: OneHold, *charges: int) -> Settled:
    """What a give-back has read of a task with this hold and these charges in its ledger."""
    service.shown = entries_of(hold, "kind") + [charge_entry(points, "kind") for points in charges]
    task = Settled(service, hold)
    await task.held.forgotten.give_back()
    return task


async def test_a_part_beside_a_commit_is_counted_once_by_a_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 points were committed and 12 charged, which is the whole price: nothing more is charged."""
    service = Service(monkeypatch)
    task = await left_by_a_run(service, OneHold(1, 24, "commit", cost=24), 12)
    parts = [charge_requested(1, 12)]
    await task.settlement.finish(parts, 36, is_refused=False, has_read=True, was_completed=False)
    assert (task.state.charged, service.posts, task.exceptions) == (36, [], [])


async def test_a_give_back_charges_what_an_earlier_life_left_to_a_run_that_requested_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2,000 points of 2,460 were charged before the reset, and the run ended before it requested the rest."""
    service = Service(monkeypatch)
    task = await left_by_a_run(service, OneHold(1, 2_460, "expire"), 2_000)
    await task.settlement.finish([], 2_460, is_refused=False, has_read=True, was_completed=False)
    assert service.keys == ["t:charge:2"]
    assert (task.state.charged, task.state.shortfall, task.exceptions) == (2_460, 0, [])


@pytest.mark.parametrize("parts", [[2_000, 460], [2_000]], ids=["requested", "not requested yet"])
async def test_what_is_surely_charged_counts_beside_a_part_that_stays_unknown(
    monkeypatch: pytest.MonkeyPatch, parts: list[int]
) -> None:
    """A give-back of a reset run: the ledger is cut off and shows the first part, never the second."""
    hold, looks = OneHold(1, 2_460, "cancel"), Looks(monkeypatch)
    looks.shown, looks.cursor = [*entries_of(hold, "reason"), charge_entry(2_000, "reason")], "cut-off"
    looks.earlier.add(EarlierLife(lives=1))
    task = Settled(looks, hold)
    requested = [charge_requested(n, amount) for n, amount in enumerate(parts, start=1)]
    await task.settlement.finish(requested, 2_460, is_refused=False, has_read=True, was_completed=False)
    assert (task.state.charged, task.state.shortfall, task.exceptions) == (2_000, 0, ["settlement_unknown"])
    assert task.state.is_unknown
