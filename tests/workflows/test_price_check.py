"""Before anything is submitted or copied: nobody reaches a GPU whose balance does not cover the estimate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from temporalio import workflow

from comfyui_temporal.contracts.credits import Estimate
from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus
from tests.workflows.books import ended
from tests.workflows.payers import holds_of, kinds_of, new_payer
from tests.workflows.platform import Handle, Platform, sent, task_id_of
from tests.workflows.test_ledger_search import Looks
from workflows.credit_hold import CreditHold
from workflows.failures import TaskFailed
from workflows.interruptible import InterruptibleWaits
from workflows.outside_call import OutsideCall
from workflows.row_look import LOOK_AGAIN_AT_MOST, RowLook
from workflows.task_record import TaskRecord

pytestmark = pytest.mark.on_both_profiles
HD = 18 + 6
TRAINING = 120
NO_BALANCE = {"current_balance": None, "suggest_topup": None}


async def begun(platform: Platform, handle: Handle) -> list[str]:
    """What was submitted or copied for the task."""
    routes = ("submit_job", "create_training")
    seen = [
        request.task_id
        for route in routes
        for request in await platform.simulators.admin.comfyui.requests_seen(route)
        if request.task_id == task_id_of(handle)
    ]
    return [*map(str, seen), *(["snapshot"] * len(await sent(handle, "snapshot")))]


@pytest.mark.parametrize("scene", ["image", "training"])
async def test_a_balance_that_is_a_point_short_begins_nothing(quick_platform: Platform, scene: str) -> None:
    price = HD if scene == "image" else TRAINING
    payer = await new_payer(quick_platform, price - 1)
    handle = await quick_platform.start(payer.image() if scene == "image" else payer.training())
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "insufficient_balance")
    sentence = ending.result["error_details"]["message"]
    assert f"cost {price} points and the balance is {price - 1}; nothing was submitted." in sentence
    assert await begun(quick_platform, handle) == await kinds_of(quick_platform, handle) == []


async def test_what_another_task_holds_is_not_in_the_balance(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform, HD + 1)
    first = payer.image()
    await quick_platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=first["task_id"])
    held = await quick_platform.start(first)
    await quick_platform.until_held(first["task_id"])
    second = await quick_platform.start(payer.image())
    assert (await ended(quick_platform, second)).code == "insufficient_balance"
    assert await begun(quick_platform, second) == []
    await quick_platform.cancel(held)
    await ended(quick_platform, held)


async def test_where_no_balance_is_told_the_hold_decides(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform, HD - 1)
    task = payer.image()
    admin = quick_platform.simulators.admin
    await admin.credits.fault("alter", route="estimate", tenant_id=payer.tenant_id, fields=NO_BALANCE)
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert ending.code == "insufficient_balance"
    assert await begun(quick_platform, handle) == [task["task_id"]]
    assert "nothing was submitted" not in ending.result["error_details"]["message"]


async def test_the_next_attempt_goes_on_under_the_hold_that_stands(quick_platform: Platform) -> None:
    """All points are held by then: the balance is 0."""
    quick_platform.policy["retry_after_seconds"] = [0.05]
    payer = await new_payer(quick_platform, HD)
    task = payer.image()
    await quick_platform.simulators.admin.comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, ending.result["attempts"]) == (TaskStatus.COMPLETED, HD, 2)
    assert [hold.phase for hold in await holds_of(quick_platform, handle)] == ["committed"]


async def test_the_estimate_is_read_once_for_each_attempt(quick_platform: Platform) -> None:
    handle = await quick_platform.start_image()
    await ended(quick_platform, handle)
    seen = await quick_platform.simulators.admin.credits.requests_seen("estimate")
    assert [request.task_id for request in seen].count(task_id_of(handle)) == 1


class StoreAway(RowLook):
    """The task store is away for the first look; the row knows of no earlier life."""

    looks = 0

    async def once(self) -> bool:
        self.looks += 1
        return self.looks > 1


class Waited:
    """Replaces the waits of a run; what each is called in the Temporal UI, and how long it is."""

    def __init__(self) -> None:
        self.summaries: list[str] = []
        self.spans: list[timedelta] = []

    async def until(self, *_: Any, at: datetime, summary: str) -> bool:
        self.summaries.append(summary)
        self.spans.append(at - workflow.now())
        return False


async def test_a_balance_is_called_too_short_once_the_store_is_back_and_the_wait_names_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier life may hold the points. Step table 1 settles in row 5, where the task's row is read."""
    outside, waited = cast(OutsideCall, Looks(monkeypatch)), Waited()
    outside.waits = cast(InterruptibleWaits, waited)
    task = ImageTask(task_id="t", tenant_id="a", user_id="b", template_id="upscale", prompt="a cat")
    record, deadline = cast(TaskRecord, None), datetime(2026, 3, 1, 13, tzinfo=UTC)
    hold = CreditHold(task, outside, record, lambda: deadline, HoldState(), StoreAway(outside))
    with pytest.raises(TaskFailed, match=f"the balance is {HD - 1}"):
        await hold.check_balance(Estimate(selected_cost=HD, current_balance=HD - 1))
    assert waited.summaries == ["5 wait: read the task's row (once the store is back)"]
    assert waited.spans == [LOOK_AGAIN_AT_MOST], "a store that is away is not asked without a pause"
