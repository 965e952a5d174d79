"""A give-back that follows another one, or was reset itself: what was begun to be charged is charged once."""

from __future__ import annotations

from temporalio.client import WorkflowExecutionStatus

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended_without_its_run, give_back
from tests.workflows.payers import Payer, has_kinds, kinds_of, new_payer, row_of, until_started
from tests.workflows.platform import Handle, Platform, answered, task_id_of
from tests.workflows.resets import Point, point_before, reset
from tests.workflows.test_settlement import cancelled_by_another_caller, delivered, start_reporting

ONE_PART = ("pre_deduct", "cancel", "charge")
BOTH_PARTS = (*ONE_PART, "charge")
LAG_SECONDS = 60


async def terminated_in_its_first_part(platform: Platform, payer: Payer) -> Handle:
    """A training whose hold was given back by another caller. 2,460 points are charged as 2,000 and 460: the run is
    terminated when the first part has acted, and the ledger shows everything up to then.
    """
    task = payer.training(max_credits=5_000)
    admin = platform.simulators.admin
    first = await admin.credits.fault("delay", route="charge", task_id=task["task_id"], when="after", seconds=60)
    handle = await start_reporting(platform, task, gpu_hours=40, gpu_hours_used=40)
    run = await until_started(platform, handle)
    await admin.comfyui.act(run.run_id, "lie", fields={"gpu_hours": 40, "gpu_hours_used": 40})
    await cancelled_by_another_caller(platform, payer, handle)
    await delivered(platform, handle)
    await platform.until(lambda: has_kinds(platform, handle, *ONE_PART))
    await handle.terminate("by a test")
    await admin.credits.remove_fault(first)
    await admin.credits.advance(LAG_SECONDS + 40)
    await admin.credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=LAG_SECONDS)
    return handle


async def until_over(platform: Platform, giving_back: Handle) -> str:
    """Let time pass until a give-back has ended; its outcome."""

    async def is_over() -> bool:
        await platform.until_settled(giving_back)
        if (await giving_back.describe()).status is not WorkflowExecutionStatus.RUNNING:
            return True
        await platform.pass_time(giving_back, LAG_SECONDS)
        return False

    await platform.until(is_over)
    outcome: str = (await giving_back.result())["outcome"]
    return outcome


async def give_back_in_its_second_part(platform: Platform, payer: Payer, handle: Handle) -> Handle:
    """The first give-back, whose own charge has acted; it has no answer yet, and the ledger does not show it."""
    credits = platform.simulators.admin.credits
    await credits.fault("delay", route="charge", tenant_id=payer.tenant_id, when="after", seconds=60)
    giving_back = await give_back(platform, handle)

    async def is_charged() -> bool:
        if await has_kinds(platform, handle, *BOTH_PARTS):
            return True
        described = (await giving_back.describe()).raw_description
        if not described.pending_activities and not described.HasField("pending_workflow_task"):
            await platform.pass_time(giving_back, LAG_SECONDS)
        return False

    await platform.until(is_charged)
    return giving_back


async def test_a_part_that_a_give_back_charged_is_not_charged_again_by_the_next(patient_platform: Platform) -> None:
    """The first one is terminated before its charge is answered, and the ledger shows that charge late."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    handle = await terminated_in_its_first_part(patient_platform, payer)
    first = await give_back_in_its_second_part(patient_platform, payer, handle)
    await first.terminate("by a test")
    second = await give_back(patient_platform, handle)
    assert await until_over(patient_platform, second) == "already_charged"
    assert await kinds_of(patient_platform, handle) == list(BOTH_PARTS)
    ending = await ended_without_its_run(patient_platform, task_id_of(handle))
    assert (ending.status, ending.charged, ending.result["credits"]["charged"]) == (TaskStatus.COMPLETED, 2_460, 2_460)


async def test_a_give_back_that_is_reset_while_it_charges_charges_once(patient_platform: Platform) -> None:
    """Reset to before its charge, whose search of the ledger it has copied, it would send the charge at once."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    handle = await terminated_in_its_first_part(patient_platform, payer)
    first = await give_back_in_its_second_part(patient_platform, payer, handle)
    again = await reset(patient_platform, first, await point_before(patient_platform, first, "charge"))
    assert await until_over(patient_platform, again) == "already_charged"
    assert await kinds_of(patient_platform, handle) == list(BOTH_PARTS)
    ending = await ended_without_its_run(patient_platform, task_id_of(handle))
    assert (ending.status, ending.charged, ending.result["credits"]["charged"]) == (TaskStatus.COMPLETED, 2_460, 2_460)


async def test_a_give_back_that_is_reset_after_its_end_charges_nothing_more(patient_platform: Platform) -> None:
    """The rest of the price was refused and is a shortfall. The payer has points by the time of the reset."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    handle = await terminated_in_its_first_part(patient_platform, payer)
    await payer.has(100)
    first = await give_back(patient_platform, handle)
    assert await until_over(patient_platform, first) == "already_charged"
    await payer.has(5_000)
    again = await reset(patient_platform, first, await after_its_reading(patient_platform, first))
    assert await until_over(patient_platform, again) == "already_charged"
    assert await kinds_of(patient_platform, handle) == list(ONE_PART)
    row = await row_of(patient_platform, handle)
    assert (row.status, row.credits.charged, row.credits.shortfall) == (TaskStatus.COMPLETED, 2_000, 460)
    assert (await ended_without_its_run(patient_platform, task_id_of(handle))).charged == 2_000


async def after_its_reading(platform: Platform, giving_back: Handle) -> Point:
    """The point at which a give-back knows what was left behind."""
    assert await answered(giving_back, "left_behind") == 1
    return await point_before(platform, giving_back, "ledger")
