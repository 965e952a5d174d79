"""A number out of range in a reply or callback is a named failure or harmless; it never causes a time-out."""

from __future__ import annotations

from typing import Any

import pytest

from comfyui_temporal.contracts.credits import Ledger
from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended
from tests.workflows.platform import Platform
from tests.workflows.test_settlement import HD, start_reporting
from workflows.task_ledger import TaskLedger


@pytest.mark.parametrize("actual_cost", [1_000_000_001, 5 * 10**18, 10**25, -(10**10)])
async def test_a_delivery_with_an_impossible_cost_is_named(quick_platform: Platform, actual_cost: int) -> None:
    handle = await start_reporting(quick_platform, quick_platform.image(), actual_cost=actual_cost)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "reply_invalid")
    assert "actual_cost" in ending.result["error_details"]["message"]
    assert ending.result["credits"]["returned"] == HD


@pytest.mark.parametrize("hours", [1_000_001, 1e30, -0.5])
async def test_a_training_with_impossible_hours_is_named(quick_platform: Platform, hours: float) -> None:
    task = quick_platform.training()
    await quick_platform.simulators.admin.comfyui.fault(
        "job_lie", route="create_training", task_id=task["task_id"], fields={"gpu_hours_used": hours}
    )
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "reply_invalid")
    assert "gpu_hours_used" in ending.result["error_details"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"gpu_hours": 10**9},
        {"gpu_hours": -1},
        {"estimated_time": -5, "gpu_slots": 10**12},
        {"checkpoint": {"uri": "file:///c", "gpu_hours_used": -1}},
    ],
    ids=",".join,
)
async def test_a_number_that_only_informs_costs_no_training_its_result(
    quick_platform: Platform, fields: dict[str, Any]
) -> None:
    task = quick_platform.training()
    await quick_platform.simulators.admin.comfyui.fault(
        "job_lie", route="create_training", task_id=task["task_id"], fields=fields
    )
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)


@pytest.mark.slow
async def test_a_state_that_stays_unreadable_until_the_deadline_is_named(quick_platform: Platform) -> None:
    """No callback, poll or cancel answer is readable: the failure at the deadline says so, and why."""
    quick_platform.policy |= {"deadline_factor": 25.0, "poll_after_seconds": 0.3, "poll_at_most_seconds": 1.0}
    handle = await start_reporting(quick_platform, quick_platform.image(), actual_cost=24.5)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "reply_invalid")
    assert "GET /comfyui/v1/jobs/{job_id}" in ending.result["error_details"]["message"]


async def test_a_state_that_stays_unreadable_for_15_minutes_ends_the_task(patient_platform: Platform) -> None:
    task = patient_platform.training()
    comfyui = patient_platform.simulators.admin.comfyui
    await comfyui.fault("callback_withhold", task_id=task["task_id"], times=None)
    poll = await comfyui.fault(
        "alter", route="get_training", task_id=task["task_id"], fields={"sequence": -1}, times=None
    )
    handle = await patient_platform.start(task | {"options": {"poll_after_seconds": 60}})
    await patient_platform.until_held(task["task_id"])
    await patient_platform.until_settled(handle)
    await patient_platform.pass_time(handle, 61)
    await patient_platform.until_hit("get_training", poll)
    for _ in range(8):
        await patient_platform.until_settled(handle)
        await patient_platform.pass_time(handle, 240)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "reply_invalid")


def test_one_entry_that_cannot_be_read_hides_no_other() -> None:
    good = {"ledger_id": "e1", "task_id": "mine", "change": -24, "reason": "pre_deduct"}
    ledger = Ledger.model_validate({"entries": [{**good, "task_id": "other", "change": 10**12}, good, "nonsense"]})
    assert [entry.task_id for entry in ledger.entries] == ["other", "mine", None]
    assert TaskLedger([ledger.entries[1]]).charged() == 0
    assert TaskLedger([ledger.entries[0]]).charged() is None
