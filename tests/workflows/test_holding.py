"""Estimate, prices and pre-deduct: one hold or a typed failure, and the job cancelled (contract §4, §5)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from temporalio.client import WorkflowExecutionStatus

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended
from tests.workflows.payers import holds_of, kinds_of, lost, new_payer
from tests.workflows.platform import Platform, task_id_of

HD = 18 + 6
"""The price of a standard image, in points."""
TRAINING = 120


# Lost and late answers


async def test_a_pre_deduct_whose_answer_is_lost_holds_once(quick_platform: Platform) -> None:
    task = quick_platform.image()
    await quick_platform.simulators.admin.credits.fault("drop", route="pre_deduct", task_id=task["task_id"])
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD)
    *doubled, hold = await holds_of(quick_platform, handle)
    assert [other.phase for other in doubled] == lost(quick_platform)
    assert ending.result["credits"]["pre_deduct_ids"] == [hold.pre_deduct_id]
    assert ending.exceptions == ["hold_doubled"] * len(doubled)


async def late_answer(platform: Platform, task: dict[str, Any], route: str) -> Any:
    """Start a task of one minute whose hold, of 8 minutes, is answered when under a minute of it is left."""
    admin = platform.simulators.admin
    await admin.comfyui.fault("job_duration", route=route, task_id=task["task_id"], seconds=60)
    lost = await admin.credits.fault("drop", route="pre_deduct", task_id=task["task_id"])
    away = await admin.credits.fault("rate_limit", route="pre_deduct", task_id=task["task_id"], seconds=60, times=None)
    handle = await platform.start(task)
    await platform.until_hit("pre_deduct", lost)
    await platform.pass_time(handle, 410)
    await admin.credits.remove_fault(away)
    await platform.pass_time(handle, 60)
    return handle


async def test_a_hold_with_under_a_minute_left_is_cancelled_and_taken_again(
    patient_platform: Platform,
) -> None:
    handle = await late_answer(patient_platform, patient_platform.training(), "create_training")
    await patient_platform.pass_time(handle, 70)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, TRAINING)
    assert [hold.phase for hold in await holds_of(patient_platform, handle)] == ["cancelled", "committed"]


async def test_an_answer_that_comes_past_the_deadline_ends_in_timeout_or_delivery(patient_platform: Platform) -> None:
    """The image was delivered meanwhile: it is charged under a hold that can be relied on."""
    handle = await late_answer(patient_platform, patient_platform.image(), "submit_job")
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD)
    assert [hold.phase for hold in await holds_of(patient_platform, handle)] == ["cancelled", "committed"]


# Refusals


@pytest.mark.by_contract("keys are kept")
async def test_a_key_that_another_has_used_is_a_conflict_and_the_others_hold_stays(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform)
    task = payer.image()
    others = await payer.post(
        "pre-deduct",
        f"{task['task_id']}:pre_deduct:1",
        {"task_id": "another", "template_id": "upscale", "scene": "image.generate", "estimated_cost": 5},
    )
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert ending.code == "task_conflict"
    assert await holds_of(quick_platform, handle) == []
    holds = await quick_platform.simulators.admin.credits.holds("another")
    assert [(hold.pre_deduct_id, hold.phase) for hold in holds] == [(others["pre_deduct_id"], "open")]


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ({"phase": "missing"}, "not_authorized"),
        ({"phase": "revoked"}, "not_authorized"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "not_authorized"),
        ({"quota": 0}, "quota_exceeded"),
    ],
    ids=["not found", "revoked", "expired", "quota exceeded"],
)
async def test_a_template_that_may_not_be_used_fails_by_name(
    quick_platform: Platform, order: dict[str, Any], code: str
) -> None:
    payer = await new_payer(quick_platform)
    await payer.may_use("text-to-image", **order)
    handle = await quick_platform.start(payer.image())
    ending = await ended(quick_platform, handle)
    assert ending.code == code
    assert await kinds_of(quick_platform, handle) == []


@pytest.mark.parametrize("scene", ["image", "training"])
async def test_a_balance_that_is_a_point_short_fails_by_name(quick_platform: Platform, scene: str) -> None:
    payer = await new_payer(quick_platform, (HD if scene == "image" else TRAINING) - 1)
    handle = await quick_platform.start(payer.image() if scene == "image" else payer.training())
    ending = await ended(quick_platform, handle)
    assert ending.code == "insufficient_balance"
    assert await kinds_of(quick_platform, handle) == []


async def test_a_balance_of_exactly_the_price_is_enough(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform, HD)
    ending = await ended(quick_platform, await quick_platform.start(payer.image()))
    assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, HD, 0)


@pytest.mark.parametrize(
    ("route", "status", "number", "message", "code"),
    [
        ("pre_deduct", 402, "40201", "insufficient_balance", "insufficient_balance"),
        ("pre_deduct", 409, "40302", "authorization_quota_exceeded", "quota_exceeded"),
        ("estimate", 403, "40302", "authorization_missing", "not_authorized"),
        ("estimate", 422, "42201", "payload_invalid", "input_invalid"),
    ],
)
async def test_a_refusal_is_read_by_its_message_not_its_status(
    quick_platform: Platform, route: str, status: int, number: str, message: str, code: str
) -> None:
    task = quick_platform.image()
    await quick_platform.simulators.admin.credits.fault(
        "answer",
        route=route,
        task_id=task["task_id"],
        status=status,
        body={"detail": {"code": number, "message": message}},
        times=None,
    )
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert ending.code == code


# Outages


@pytest.mark.parametrize("route", ["estimate", "pre_deduct"])
async def test_credits_away_for_15_minutes_are_unavailable(patient_platform: Platform, route: str) -> None:
    task = patient_platform.image()
    credits = patient_platform.simulators.admin.credits
    away = await credits.fault("rate_limit", route=route, task_id=task["task_id"], seconds=60, times=None)
    handle = await patient_platform.start(task)
    await patient_platform.until_hit(route, away)

    async def is_tried_visibly() -> bool:
        """The 15 minutes count from here: an estimate has a short local try before."""
        return bool((await handle.describe()).raw_description.pending_activities)

    await patient_platform.until(is_tried_visibly)
    await patient_platform.pass_time(handle, 13 * 60)
    assert (await patient_platform.progress(handle))["status"] == "queued"
    await patient_platform.pass_time(handle, 2.5 * 60)
    # Whether a hold was taken can be learned only once the service is back: until then the task is not over.
    assert route == "estimate" or (await handle.describe()).status is WorkflowExecutionStatus.RUNNING
    await credits.remove_fault(away)
    if route == "pre_deduct":
        await patient_platform.pass_time(handle, 60)
    ending = await ended(patient_platform, handle)
    assert ending.code == "credits_unavailable"


# Prices


@pytest.mark.parametrize(
    ("job", "estimate", "held"), [(30, HD, 30), (HD, 31, 31), (20, 22, 22)], ids=["job", "estimate", "all"]
)
async def test_prices_that_differ_are_all_recorded_and_the_larger_is_held(
    quick_platform: Platform, job: int, estimate: int, held: int
) -> None:
    task = quick_platform.image()
    admin, named = quick_platform.simulators.admin, {"task_id": task["task_id"]}
    await admin.comfyui.fault("job_lie", route="submit_job", **named, reply={"estimated_cost": job})
    await admin.credits.fault("alter", route="estimate", **named, fields={"selected_cost": estimate})
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    credits = ending.result["credits"]
    assert (credits["estimated"], credits["held"]) == (estimate, held)
    assert "prices_differ" in ending.exceptions
    row = await quick_platform.store.task(task_id_of(handle))
    assert row is not None and row.prices is not None
    assert row.prices.model_dump() == {"job": job, "estimate": estimate, "table": HD}


async def test_a_trainings_estimate_that_differs_from_the_table_is_recorded(quick_platform: Platform) -> None:
    task = quick_platform.training()
    admin, named = quick_platform.simulators.admin, {"task_id": task["task_id"]}
    await admin.credits.fault("alter", route="estimate", **named, fields={"selected_cost": 150}, times=None)
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert (ending.result["credits"]["held"], ending.charged, ending.exceptions) == (150, 120, ["prices_differ"])
    row = await quick_platform.store.task(task_id_of(handle))
    assert row is not None and row.prices is not None
    assert row.prices.model_dump() == {"job": None, "estimate": 150, "table": 120}


@pytest.mark.parametrize(
    ("cost", "max_credits", "is_taken"),
    [(2 * HD, None, True), (2 * HD + 1, None, False), (HD, HD, True), (HD, HD - 1, False)],
    ids=["at twice the table", "above it", "at max_credits", "above max_credits"],
)
async def test_an_image_above_its_ceiling_is_a_price_mismatch(
    quick_platform: Platform, cost: int, max_credits: int | None, is_taken: bool
) -> None:
    task = quick_platform.image(**({"max_credits": max_credits} if max_credits else {}))
    await quick_platform.simulators.admin.comfyui.fault(
        "job_lie", route="submit_job", task_id=task["task_id"], reply={"estimated_cost": cost}
    )
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert ending.code == (None if is_taken else "price_mismatch")
    assert ending.result["credits"]["held"] == (cost if is_taken else 0)


async def test_what_costs_nothing_needs_no_hold(quick_platform: Platform) -> None:
    task = quick_platform.image()
    admin, named = quick_platform.simulators.admin, {"task_id": task["task_id"]}
    lie = {"reply": {"estimated_cost": 0}, "fields": {"actual_cost": 0}}
    await admin.comfyui.fault("job_lie", route="submit_job", **named, at=0, **lie)
    await admin.credits.fault("alter", route="estimate", **named, fields={"selected_cost": 0})
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 0)
    assert await kinds_of(quick_platform, handle) == []
