"""The judge of a task's money: what nobody can know is exempt by its name and amount, and nothing else is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from proof.simulators.admin_wire import EntrySeen, HoldSeen
from proof.simulators.credits_profile import CONTRACT, FIELD, CreditsProfile
from proof.simulators.task_money import HOLD_DOUBLED, SAY_UNKNOWN, TaskMoney

NOW = datetime.now(UTC)
DOUBLED = (HOLD_DOUBLED, {"amount": 24})
UNKNOWN = ("settlement_unknown", {"cost": 24})


def hold(amount: int, phase: str) -> HoldSeen:
    return HoldSeen.model_validate(
        {
            **{"pre_deduct_id": f"hold-{phase}", "tenant_id": "t", "user_id": "u", "task_id": "task"},
            **{"template_id": "upscale", "amount": amount, "expire_at": NOW, "phase": phase},
        }
    )


def entry(kind: str, change: int, frozen_change: int) -> EntrySeen:
    return EntrySeen.model_validate(
        {
            **{"ledger_id": "e", "tenant_id": "t", "user_id": "u", "task_id": "task", "kind": kind, "reason": kind},
            **{"change": change, "frozen_change": frozen_change, "balance_after": 0, "frozen_after": 0},
            **{"created_at": NOW, "pre_deduct_id": None},
        }
    )


COMMITTED = [entry("pre_deduct", -24, 24), entry("commit", 4, -24)]


def money(profile: CreditsProfile = FIELD, *, told: int | None = 20, **given: Any) -> TaskMoney:
    holds = given.pop("holds", [hold(24, "committed")])
    return TaskMoney(profile, holds, given.pop("entries", COMMITTED), told, given.pop("records", ()))


@pytest.mark.parametrize("profile", [CONTRACT, FIELD])
def test_a_task_that_tells_what_was_taken_is_true(profile: CreditsProfile) -> None:
    judged = money(profile)
    assert (judged.taken, judged.charges, judged.leaks(), judged.mischarges()) == (20, 1, [], [])


@pytest.mark.parametrize("told", [0, 19, 21, 24])
def test_another_charge_than_was_taken_is_seen(told: int) -> None:
    assert money(told=told).mischarges() == [f"20 points were taken, {told} are told"]
    assert money(told=told, records=[UNKNOWN]).mischarges(), "a record excuses no wrong figure"


def test_an_unknown_charge_has_to_be_recorded() -> None:
    assert money(told=None).mischarges()
    assert money(told=None, records=[DOUBLED]).mischarges()
    for code in SAY_UNKNOWN:
        assert not money(told=None, records=[(code, {})]).mischarges()


@pytest.mark.parametrize(
    ("open_points", "records", "is_true"),
    [
        ([24], [DOUBLED], True),
        ([24], [], False),
        ([24], [UNKNOWN], False),
        ([30], [DOUBLED], False),
        ([24, 24], [DOUBLED], False),
        ([24, 24], [DOUBLED, DOUBLED], True),
        ([], [DOUBLED], False),
        ([24], [(HOLD_DOUBLED, {})], False),
    ],
)
def test_a_doubled_hold_is_exempt_by_its_record_and_its_points(
    open_points: list[int], records: list[Any], is_true: bool
) -> None:
    holds = [hold(24, "committed"), *(hold(points, "open") for points in open_points)]
    assert (money(holds=holds, records=records).leaks() == []) is is_true
    still = money(CONTRACT, holds=holds, records=records).leaks()
    assert bool(still) is bool(open_points), "with keys and ids every hold can be named and given back"
