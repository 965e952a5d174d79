"""The update `wait_until_held`: answered at a hold, at a price to confirm, at any end; it keeps no run open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.client import WithStartWorkflowOperation, WorkflowUpdateStage
from temporalio.common import WorkflowIDConflictPolicy

from comfyui_temporal.contracts.start_answer import WAIT_UNTIL_HELD
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TaskStatus
from tests.workflows.books import ended, runs_of
from tests.workflows.payers import new_payer, until_price_shown, until_started
from tests.workflows.platform import Handle, Platform

HD = 18 + 6
both_caches = pytest.mark.parametrize("cached_workflows", [None, 0], ids=["as set", "replayed"], indirect=True)


async def told(handle: Handle) -> dict[str, Any]:
    async with asyncio.timeout(30):
        answer: dict[str, Any] = await handle.execute_update(WAIT_UNTIL_HELD, {})
    return answer


@both_caches
async def test_it_is_answered_once_credits_are_held_and_the_task_goes_on(platform: Platform) -> None:
    task = platform.image()
    handle = await platform.start(task)
    answers = await asyncio.gather(told(handle), told(handle))
    for answer in answers:
        assert (answer["reached"], answer["state"]["credits"]["held"]) == ("held", HD)
        assert answer["state"]["result_urls"] == []
    assert await platform.simulators.admin.credits.holds(task["task_id"])
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD)


async def test_it_waits_while_credits_are_away(direct_platform: Platform) -> None:
    task = direct_platform.image()
    credits = direct_platform.simulators.admin.credits
    away = await credits.fault("rate_limit", route="pre_deduct", task_id=task["task_id"], seconds=1, times=None)
    handle = await direct_platform.start(task)
    waiting = await handle.start_update(WAIT_UNTIL_HELD, {}, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
    await direct_platform.until_hit("pre_deduct", away)
    result = asyncio.create_task(waiting.result())
    assert not (await asyncio.wait({result}, timeout=0.5))[0]
    await credits.remove_fault(away)
    assert (await result)["reached"] == "held"
    await direct_platform.cancel(handle)
    await ended(direct_platform, handle)


async def test_a_training_tells_its_price_and_later_that_it_is_held(direct_platform: Platform) -> None:
    handle = await direct_platform.start_training(max_credits=None)
    answer = await told(handle)
    wanted = await until_price_shown(direct_platform, handle)
    assert (answer["reached"], answer["state"]["confirmation"]) == ("confirmation", wanted | {"is_running": False})
    assert (await told(handle))["reached"] == "confirmation"
    await handle.execute_update("confirm_price", {"max_credits": wanted["estimated_cost"]})
    answer = await told(handle)
    assert (answer["reached"], answer["state"]["credits"]["held"]) == ("held", wanted["estimated_cost"])
    await direct_platform.cancel(handle)
    await ended(direct_platform, handle)


@pytest.mark.parametrize("stops", ["refused", "cancelled"])
async def test_each_end_answers_those_that_wait(direct_platform: Platform, stops: str) -> None:
    payer = await new_payer(direct_platform, HD - 1 if stops == "refused" else HD)
    task = payer.image()
    if stops == "cancelled":
        hanging = await direct_platform.simulators.admin.comfyui.fault(
            "delay", route="submit_job", task_id=task["task_id"], seconds=1.0, when="after"
        )
    handle = await direct_platform.start(task)
    waiting = asyncio.create_task(told(handle))
    if stops == "cancelled":
        await direct_platform.until_hit("submit_job", hanging)
        assert await direct_platform.cancel(handle) == "accepted"
    answer, ending = await waiting, await ended(direct_platform, handle)
    assert (answer["reached"], answer["state"]["status"]) == ("ended", ending.status.value)
    assert (answer["state"]["error"] or {}).get("code") == ending.code


async def test_a_run_that_is_refused_the_id_answers_too(direct_platform: Platform) -> None:
    """Nothing else is known of such a run: it has no row."""
    task = direct_platform.image()
    first = await direct_platform.start(task)
    await until_started(direct_platform, first)
    await first.terminate()
    operation: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
        IMAGE_WORKFLOW,
        task | {"prompt": "another"},
        id=first.id,
        task_queue=direct_platform.task_queue,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
    )
    answer = await direct_platform.client.execute_update_with_start_workflow(
        WAIT_UNTIL_HELD, {}, start_workflow_operation=operation
    )
    assert (answer["reached"], answer["state"]["error"]["code"]) == ("ended", "task_exists")


async def test_a_run_that_continued_as_new_answers_at_once(direct_platform: Platform) -> None:
    before = direct_platform.policy
    direct_platform.policy = before | {"continue_as_new_signals": 1}
    try:
        handle = await direct_platform.start_image()
        assert (await told(handle))["reached"] == "held"
        job_id = (await until_started(direct_platform, handle)).run_id
        await direct_platform.callback(handle, job_id=job_id, job_status="processing", sequence=1)

        async def continued() -> bool:
            return len(await runs_of(direct_platform, handle)) > 1

        await direct_platform.until(continued)
        newest = direct_platform.client.get_workflow_handle(handle.id)
        assert (await told(newest))["reached"] == "held"
        assert await direct_platform.cancel(newest) == "accepted"
        await ended(direct_platform, handle)
    finally:
        direct_platform.policy = before


async def test_one_update_id_is_one_update_and_leaves_room_for_a_cancel(direct_platform: Platform) -> None:
    """A server takes ten updates in flight of a run; clients that wait again and again must not use them up."""
    task = direct_platform.image()
    credits = direct_platform.simulators.admin.credits
    away = await credits.fault("rate_limit", route="pre_deduct", task_id=task["task_id"], seconds=1, times=None)
    handle = await direct_platform.start(task)
    for _ in range(15):
        await handle.start_update(WAIT_UNTIL_HELD, {}, id=WAIT_UNTIL_HELD, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
    assert await direct_platform.cancel(handle) == "accepted"
    await credits.remove_fault(away)
    assert (await ended(direct_platform, handle)).status is TaskStatus.CANCELLED
