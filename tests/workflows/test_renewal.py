"""A hold is renewed before it ends: new first, then the old one cancelled (contract §4 *Renewal*)."""

from __future__ import annotations

import asyncio

import pytest

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended
from tests.workflows.payers import (
    Payer,
    holds_of,
    kinds_of,
    lost,
    new_payer,
    refuse_cancels,
    start_long_training,
    until_kinds,
    until_started,
)
from tests.workflows.platform import Handle, Platform, task_id_of

TRAINING = 120
RENEWED = ["pre_deduct", "pre_deduct", "cancel"]
SWAPPED = ["pre_deduct", "cancel", "pre_deduct"]


async def start_slow_image(platform: Platform, payer: Payer) -> Handle:
    """Start an image that stalls once it has started, with an hour's estimate: its hold lives 29 minutes.

    It was taken for a deadline of 24 minutes; the later estimate moves that beyond the hold's end.
    """
    task = payer.image()
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], at=0.5)
    handle = await platform.start(task)
    run = await until_started(platform, handle)
    await comfyui.act(run.run_id, "lie", fields={"estimated_time": 60})
    return handle


async def finish(platform: Platform, handle: Handle) -> None:
    [run] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(run.run_id, "finish")


async def test_a_hold_is_renewed_at_half_its_life_new_first(patient_platform: Platform) -> None:
    handle = await start_long_training(patient_platform, patient_platform.training())
    await patient_platform.pass_time(handle, 1_790)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct"]
    await patient_platform.pass_time(handle, 20)
    await until_kinds(patient_platform, handle, RENEWED)
    await finish(patient_platform, handle)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, TRAINING)
    assert "uncovered" not in ending.exceptions
    assert await kinds_of(patient_platform, handle) == [*RENEWED, "commit"]
    assert len(ending.result["credits"]["pre_deduct_ids"]) == 2


async def test_a_balance_of_exactly_the_cost_lasts_through_an_hours_training(patient_platform: Platform) -> None:
    """Too short for two holds: the old one is kept until its last minute, then swapped, which is recorded."""
    payer = await new_payer(patient_platform, TRAINING)
    handle = await start_long_training(patient_platform, payer.training())
    await patient_platform.pass_time(handle, 1_810)
    await patient_platform.pass_time(handle, 1_700)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct"], "the old hold is kept while it lasts"
    await patient_platform.pass_time(handle, 60)
    await until_kinds(patient_platform, handle, SWAPPED)
    await finish(patient_platform, handle)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, TRAINING, 0)
    assert "uncovered" in ending.exceptions


async def test_a_payer_who_tops_up_is_covered_without_a_gap(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform, TRAINING)
    handle = await start_long_training(patient_platform, payer.training())
    await patient_platform.pass_time(handle, 1_810)
    await payer.has(TRAINING)
    await patient_platform.pass_time(handle, 1_000)
    await until_kinds(patient_platform, handle, RENEWED)
    await finish(patient_platform, handle)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, TRAINING)
    assert "uncovered" not in ending.exceptions


async def in_the_last_minute(platform: Platform, payer: Payer, handle: Handle, *, life: float) -> None:
    """Refuse every renewal from now on and pass the life of the hold but for half a minute: it has been cancelled."""
    await payer.may_use("text-to-image", phase="revoked")
    await payer.may_use("lora-train", phase="revoked")
    await platform.pass_time(handle, life / 2)
    await platform.pass_time(handle, life / 2 - 30)
    await until_kinds(platform, handle, ["pre_deduct", "cancel"])


async def test_an_image_that_cannot_be_covered_for_a_minute_is_exhausted(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform)
    handle = await start_slow_image(patient_platform, payer)
    await in_the_last_minute(patient_platform, payer, handle, life=29 * 60)
    await patient_platform.pass_time(handle, 90)
    ending = await ended(patient_platform, handle)
    assert ending.code == "credit_exhausted"
    assert {"uncovered", "credit_exhausted"} <= set(ending.exceptions)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel"]


@pytest.mark.slow
async def test_delivered_work_that_cannot_be_covered_is_not_charged_and_is_withheld(
    patient_platform: Platform,
) -> None:
    payer = await new_payer(patient_platform)
    handle = await start_slow_image(patient_platform, payer)
    await in_the_last_minute(patient_platform, payer, handle, life=29 * 60)
    await finish(patient_platform, handle)
    await patient_platform.until_settled(handle)
    assert await patient_platform.cancel(handle) == "too_late", "it was delivered before"
    await patient_platform.pass_time(handle, 90)
    assert (await ended(patient_platform, handle)).code == "credit_exhausted"


async def test_no_next_attempt_begins_without_cover_and_a_cancel_takes_effect_meanwhile(
    patient_platform: Platform,
) -> None:
    payer = await new_payer(patient_platform)
    handle = await start_long_training(patient_platform, payer.training())
    await in_the_last_minute(patient_platform, payer, handle, life=3_600)
    [run] = await patient_platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await patient_platform.simulators.admin.comfyui.act(run.run_id, "preempt")
    await patient_platform.pass_time(handle, 35)
    await patient_platform.until_settled(handle)
    assert len(await patient_platform.simulators.admin.comfyui.jobs(task_id_of(handle))) == 1
    async with asyncio.timeout(10):
        assert await patient_platform.cancel(handle) == "accepted"
    assert (await ended(patient_platform, handle)).status is TaskStatus.CANCELLED


async def test_a_training_that_cannot_be_covered_is_exhausted_at_its_next_checkpoint(
    patient_platform: Platform,
) -> None:
    payer = await new_payer(patient_platform)
    handle = await start_long_training(patient_platform, payer.training())
    await in_the_last_minute(patient_platform, payer, handle, life=3_600)
    await patient_platform.pass_time(handle, 120)
    assert (await patient_platform.progress(handle))["status"] == "running", "it is let to reach its next checkpoint"
    await patient_platform.simulators.admin.advance(3_600)
    await patient_platform.pass_time(handle, 40)
    ending = await ended(patient_platform, handle)
    assert ending.code == "credit_exhausted"
    assert "task.checkpoint training" in ending.kinds


@pytest.mark.slow
@pytest.mark.by_contract("the old hold expires during the outage")
async def test_an_outage_during_renewal_leaves_the_task_uncovered_and_is_recorded(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform)
    handle = await start_slow_image(patient_platform, payer)
    away = await patient_platform.simulators.admin.credits.fault(
        "rate_limit", route="pre_deduct", tenant_id=payer.tenant_id, seconds=60, times=None
    )
    await patient_platform.pass_time(handle, 15 * 60)
    await patient_platform.until_hit("pre_deduct", away)
    await patient_platform.pass_time(handle, 15 * 60)
    await patient_platform.simulators.admin.credits.remove_fault(away)
    await patient_platform.pass_time(handle, 70)
    await until_kinds(patient_platform, handle, ["pre_deduct", "expire", "pre_deduct"])
    await finish(patient_platform, handle)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 24, ["uncovered"])


@pytest.mark.parametrize("comes", ["delivery", "cancel"])
@pytest.mark.parametrize("fault", ["act_late", "drop"])
async def test_a_renewal_in_flight_when_the_end_comes(patient_platform: Platform, fault: str, comes: str) -> None:
    """It finishes before anything is settled: one hold is charged or none, and none is left."""
    payer = await new_payer(patient_platform)
    handle = await start_slow_image(patient_platform, payer)
    in_flight = await patient_platform.simulators.admin.credits.fault(
        fault, route="pre_deduct", tenant_id=payer.tenant_id, seconds=0.7
    )
    await patient_platform.pass_time(handle, 15 * 60)
    await patient_platform.until_hit("pre_deduct", in_flight)
    if comes == "delivery":
        await finish(patient_platform, handle)
    else:
        assert await patient_platform.cancel(handle) == "accepted"
    if fault == "drop":
        await patient_platform.pass_time(handle, 5)
    ending = await ended(patient_platform, handle)
    phases = [hold.phase for hold in await holds_of(patient_platform, handle)]
    doubled = lost(patient_platform) if fault == "drop" else []
    if comes == "delivery":
        assert (ending.status, ending.charged, phases) == (
            TaskStatus.COMPLETED,
            24,
            ["cancelled", *doubled, "committed"],
        )
    else:
        assert (ending.status, set(phases)) == (TaskStatus.CANCELLED, {"cancelled", *doubled})


async def test_an_old_hold_that_another_caller_committed_is_not_charged_again(patient_platform: Platform) -> None:
    """The renewal finds it committed: that counts, and the new hold is given back."""
    payer = await new_payer(patient_platform)
    task = payer.training()
    handle = await start_long_training(patient_platform, task)
    [hold] = await holds_of(patient_platform, handle)
    body = {"pre_deduct_id": hold.pre_deduct_id, "actual_cost": TRAINING}
    await payer.post("commit", "by-hand", body | {"task_id": task["task_id"], "template_id": task["template_id"]})
    await patient_platform.pass_time(handle, 1_810)
    await until_kinds(patient_platform, handle, ["pre_deduct", "commit", "pre_deduct"])
    await finish(patient_platform, handle)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, TRAINING)


@pytest.mark.on_both_profiles
async def test_an_old_hold_that_could_not_be_cancelled_does_not_leave_a_commit_unknown(
    patient_platform: Platform,
) -> None:
    """It ends by expiry, and the task's other hold was committed (contract §4 *What stays unknown*)."""
    handle = await start_long_training(patient_platform, patient_platform.training())
    await refuse_cancels(patient_platform, handle)
    await patient_platform.pass_time(handle, 1_810)
    await until_kinds(patient_platform, handle, ["pre_deduct", "pre_deduct"])
    await patient_platform.until_settled(handle)
    await finish(patient_platform, handle)
    ending = await ended(patient_platform, handle, exempt={"hold_expires"})
    assert (ending.status, ending.charged, ending.exceptions) == (
        TaskStatus.COMPLETED,
        TRAINING,
        ["hold_left_to_expiry"],
    )
    assert (ending.result["credits"]["settlement"], ending.result["credits"]["charged"]) == ("settled", TRAINING)
