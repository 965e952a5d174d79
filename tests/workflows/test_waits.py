"""Every wait of a run ends on a cancel, its deadline or its hold's expiry, or has its reason in one table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow
from temporalio.client import WorkflowExecutionStatus
from temporalio.workflow import ActivityHandle

from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulators.admin_wire import Fault
from tests.workflows.books import ended
from tests.workflows.payers import Payer, has_kinds, holds_of, kinds_of, new_payer, until_started
from tests.workflows.platform import Handle, Platform, scheduled, task_id_of
from workflows.alarm import Alarm
from workflows.failures import RowEnded
from workflows.interruptible import InterruptibleWaits, KeptHold
from workflows.stop import Stop

AWAY: dict[str, Any] = {"status": 503, "times": None}
RENEWED = ["pre_deduct", "pre_deduct", "cancel"]


@pytest.fixture
def platform(patient_platform: Platform) -> Platform:
    """Hours pass here, and no timing is left to chance."""
    return patient_platform


async def away(platform: Platform, route: str, task_id: str) -> Fault:
    """From now on this route does not answer for this task."""
    return await platform.service_of(route).fault("error", route=route, task_id=task_id, **AWAY)


async def back(platform: Platform, fault: Fault) -> None:
    service = platform.service_of(fault.match.route or "")
    await service.remove_fault(fault)


async def start_working(platform: Platform, payer: Payer, kind: str, **duration: Any) -> Handle:
    """Start a task whose job stalls once it has started."""
    for gpu_type in ("rtx4090", "a100"):
        await platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
    task = payer.image() if kind == "image" else payer.training()
    route = "submit_job" if kind == "image" else "create_training"
    await platform.simulators.admin.comfyui.fault(
        "job_stall", route=route, task_id=task["task_id"], at=0.2, times=None, **duration
    )
    handle = await platform.start(task)
    await until_started(platform, handle)
    await platform.until_settled(handle)
    return handle


async def preempt(platform: Platform, handle: Handle) -> None:
    """End the newest job; returns when the task knows."""
    runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(runs[-1].run_id, "preempt")

    async def known() -> bool:
        return bool((await platform.progress(handle))["error_details"])

    await platform.until(known)


async def until_jobs(platform: Platform, handle: Handle, number: int) -> None:
    """Wait until the task follows its `number`th job."""

    async def followed() -> bool:
        runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        return len(runs) == number and (await platform.progress(handle))["job_id"] == runs[-1].run_id

    await platform.until(followed)


async def until_scheduled(platform: Platform, handle: Handle, route: str, times: int) -> None:
    """Wait until the run has scheduled this call this many times."""

    async def scheduled_so_often() -> bool:
        return len(await scheduled(handle, route)) >= times

    await platform.until(scheduled_so_often)


async def finish(platform: Platform, handle: Handle) -> None:
    runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(runs[-1].run_id, "finish")


# An old job's cancel that cannot be made


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_the_next_attempt_follows_though_the_old_job_cannot_be_cancelled(platform: Platform, kind: str) -> None:
    """Its cancel goes on beside the next attempt, and the task does not end before it has succeeded."""
    handle = await start_working(platform, await new_payer(platform), kind)
    route = "cancel_job" if kind == "image" else "cancel_training"
    fault = await away(platform, route, task_id_of(handle))
    await preempt(platform, handle)
    await platform.pass_time(handle, 31)
    await until_jobs(platform, handle, 2)
    await finish(platform, handle)
    await platform.until(lambda: _is_charged(platform, handle))
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "a job of it may still be running"
    await back(platform, fault)
    await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert (ending.status, ending.result["attempts"]) == (TaskStatus.COMPLETED, 2)


async def _is_charged(platform: Platform, handle: Handle) -> bool:
    return "commit" in await kinds_of(platform, handle)


async def test_a_cancel_between_two_attempts_does_not_wait_for_an_outage_to_end(platform: Platform) -> None:
    handle = await start_working(platform, await new_payer(platform), "image")
    fault = await away(platform, "cancel_job", task_id_of(handle))
    await preempt(platform, handle)
    async with asyncio.timeout(10):
        assert await platform.cancel(handle) == "accepted"
    await back(platform, fault)
    await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert (ending.status, await kinds_of(platform, handle)) == (TaskStatus.CANCELLED, ["pre_deduct", "cancel"])


async def test_the_tasks_time_runs_out_between_two_attempts_though_no_route_answers(platform: Platform) -> None:
    """Submitting the next job is tried again until the deadline, then the task ends with its credits back."""
    payer = await new_payer(platform)
    handle = await start_working(platform, payer, "image")
    faults = [await away(platform, route, task_id_of(handle)) for route in ("cancel_job", "submit_job")]
    await preempt(platform, handle)
    await platform.pass_time(handle, 31)
    await until_scheduled(platform, handle, "submit_job", 2)
    for _ in range(3):
        await platform.pass_time(handle, 5 * 60 + 10)
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", "cancel"))
    for fault in faults:
        await back(platform, fault)
    await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert ending.code in ("timeout", "comfyui_unavailable")


# The hold between two attempts


async def test_the_hold_is_renewed_while_the_next_training_cannot_be_created(platform: Platform) -> None:
    """Half of its life passes in the outage."""
    handle = await start_working(platform, await new_payer(platform), "training")
    await platform.pass_time(handle, 1_500)
    fault = await away(platform, "create_training", task_id_of(handle))
    await preempt(platform, handle)
    await platform.pass_time(handle, 31)
    await platform.pass_time(handle, 400)
    await platform.until(lambda: has_kinds(platform, handle, *RENEWED))
    await back(platform, fault)
    await platform.pass_time(handle, 31)
    await until_jobs(platform, handle, 2)
    await finish(platform, handle)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert await kinds_of(platform, handle) == [*RENEWED, "commit"]


async def test_the_hold_is_renewed_while_the_next_attempts_price_is_to_be_confirmed(platform: Platform) -> None:
    payer = await new_payer(platform)
    task = payer.training(max_credits=120)
    comfyui = platform.simulators.admin.comfyui
    await comfyui.set_gpus("a100", 200)
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"], at=0.2, times=None)
    handle = await platform.start(task)
    await until_started(platform, handle)
    await platform.until_settled(handle)
    await comfyui.fault("job_lie", route="create_training", task_id=task["task_id"], reply={"gpu_hours": 3.0})
    await preempt(platform, handle)
    await platform.pass_time(handle, 31)
    await until_jobs(platform, handle, 2)
    assert (await platform.progress(handle))["confirmation"]["estimated_cost"] == 240
    await platform.pass_time(handle, 1_790)
    await platform.until(lambda: has_kinds(platform, handle, *RENEWED))
    await platform.pass_time(handle, 1_700)
    await handle.execute_update("confirm_price", {"max_credits": 240})
    await until_started(platform, handle)
    assert [hold.amount for hold in await holds_of(platform, handle) if hold.phase == "open"] == [240]
    await platform.until_settled(handle)
    assert await platform.cancel(handle) == "accepted"
    assert (await ended(platform, handle)).status is TaskStatus.CANCELLED


@pytest.mark.by_contract("a hold runs out")
async def test_no_next_attempt_begins_under_a_hold_that_ran_out(platform: Platform) -> None:
    """The credits service is away from before the old hold's end: the next job waits for it to come back."""
    payer = await new_payer(platform)
    handle = await start_working(platform, payer, "training")
    fault = await away(platform, "pre_deduct", task_id_of(handle))
    await platform.pass_time(handle, 1_810)
    await platform.pass_time(handle, 1_700)
    await preempt(platform, handle)
    await platform.pass_time(handle, 100)
    await platform.pass_time(handle, 100)
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", "expire"))
    assert len(await platform.simulators.admin.comfyui.jobs(task_id_of(handle))) == 1
    await back(platform, fault)
    await platform.pass_time(handle, 31)
    await until_jobs(platform, handle, 2)
    await until_started(platform, handle)
    await finish(platform, handle)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert "uncovered" in ending.exceptions


@pytest.mark.by_contract("a hold runs out")
async def test_no_next_image_begins_under_a_hold_that_ran_out_while_its_price_was_asked(platform: Platform) -> None:
    """The estimate answers when that has expired, before the renewal does."""
    payer = await new_payer(platform)
    handle = await start_working(platform, payer, "image")
    renewal = await next_image_awaits_cover(platform, handle)
    await back(platform, renewal)
    await platform.pass_time(handle, 31)
    await until_jobs(platform, handle, 2)
    assert (await holds_of(platform, handle))[-1].phase == "open"
    await finish(platform, handle)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged, ending.result["attempts"]) == (TaskStatus.COMPLETED, 24, 2)
    assert "uncovered" in ending.exceptions


@pytest.mark.by_contract("a hold runs out")
async def test_the_tasks_time_runs_out_while_its_next_image_waits_to_be_covered(platform: Platform) -> None:
    """That image is not requested yet: the wait is no queue of ComfyUI's, whose time would not count."""
    platform.policy |= {"cap_minutes": 32.0}
    handle = await start_working(platform, await new_payer(platform), "image")
    renewal = await next_image_awaits_cover(platform, handle)
    await platform.pass_time(handle, 4 * 60)
    await until_scheduled(platform, handle, "pre_deduct", 3)  # the undo's, to learn what the renewal did
    await back(platform, renewal)
    await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert (ending.code, ending.charged, ending.result["attempts"]) == ("timeout", 0, 1)


async def next_image_awaits_cover(platform: Platform, handle: Handle) -> Fault:
    """End an image's job while its hold cannot be renewed. Returns that outage, once the next job waits for its end.

    The pause ended under the old hold; the estimate has answered when that had expired.
    """
    task_id = task_id_of(handle)
    [hold] = await holds_of(platform, handle)
    renewal = await away(platform, "pre_deduct", task_id)
    left = (hold.expire_at - (await platform.simulators.admin.credits.clock()).now).total_seconds()
    await platform.pass_time(handle, left / 2 + 10)
    await until_scheduled(platform, handle, "pre_deduct", 2)
    await platform.pass_time(handle, left / 2 - 320)
    estimate = await away(platform, "estimate", task_id)
    priced = len(await scheduled(handle, "estimate"))
    await preempt(platform, handle)
    await platform.pass_time(handle, 31)
    await until_scheduled(platform, handle, "estimate", priced + 1)
    await platform.pass_time(handle, 300)
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", "expire"))
    await back(platform, estimate)
    await platform.pass_time(handle, 31)
    await platform.until(lambda: _has_acted_on(handle, "estimate"))
    assert len(await scheduled(handle, "submit_job")) == 1
    return renewal


async def _has_acted_on(handle: Handle, activity: str) -> bool:
    """Whether the call was answered, and the run has decided what follows."""
    described = (await handle.describe()).raw_description
    is_open = any(call.activity_type.name == activity for call in described.pending_activities)
    return not (is_open or described.HasField("pending_workflow_task"))


# An old hold that cannot be given back


async def has_holds(platform: Platform, handle: Handle, number: int) -> bool:
    return len(await holds_of(platform, handle)) == number


async def test_a_hold_is_renewed_again_though_the_one_before_cannot_be_given_back(platform: Platform) -> None:
    """Its cancel hangs for longer than the new hold lives; what cannot be given back ends by expiry."""
    payer = await new_payer(platform)
    handle = await start_working(platform, payer, "training")
    fault = await away(platform, "cancel_hold", task_id_of(handle))
    await platform.simulators.admin.comfyui.act(
        (await platform.job(handle)).run_id, "lie", fields={"estimated_time": 600}
    )
    # A third hold is taken only when the second has little life left: the first one is still being given back.
    for renewal, seconds in ((2, 1_810), (3, 2_710), (4, 2_710)):
        await platform.pass_time(handle, seconds)
        await platform.until(lambda number=renewal: has_holds(platform, handle, number))  # type: ignore[misc]
    await back(platform, fault)
    await platform.pass_time(handle, 61)
    await finish(platform, handle)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert "uncovered" not in ending.exceptions


@pytest.mark.parametrize("balance", [1_000, 30], ids=["both fit", "too short for both"])
async def test_a_cancel_takes_effect_while_a_top_up_cannot_give_the_old_hold_back(
    platform: Platform, balance: int
) -> None:
    payer = await new_payer(platform, balance)
    task = payer.image()
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], at=0.2, times=None)
    handle = await platform.start(task)
    await until_started(platform, handle)
    await comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], reply={"estimated_cost": 30})
    fault = await away(platform, "cancel_hold", task["task_id"])
    await preempt(platform, handle)
    await platform.pass_time(handle, 31)
    await until_jobs(platform, handle, 2)
    await until_scheduled(platform, handle, "cancel_hold", 1)
    async with asyncio.timeout(10):
        assert await platform.cancel(handle) == "accepted"
    await back(platform, fault)
    await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.CANCELLED
    assert {hold.phase for hold in await holds_of(platform, handle)} == {"cancelled"}


async def test_the_training_is_started_again_and_again_under_a_hold_that_lives(platform: Platform) -> None:
    """Its start is tried for 15 minutes; a deadline of 3 minutes does not run before the work begins."""
    payer = await new_payer(platform)
    task = payer.training()
    await platform.simulators.admin.comfyui.set_gpus("a100", 200)
    await platform.simulators.admin.comfyui.fault(
        "job_lie", route="create_training", task_id=task["task_id"], reply={"estimated_time": 1.0}
    )
    fault = await away(platform, "start_training", task["task_id"])
    handle = await platform.start(task)
    await platform.until_hit("start_training", fault)
    for _ in range(15):
        await platform.pass_time(handle, 60)
    ending = await ended(platform, handle)
    await back(platform, fault)
    assert ending.code == "comfyui_unavailable"
    assert "uncovered" not in ending.exceptions
    kinds = await kinds_of(platform, handle)
    assert kinds.count("pre_deduct") == kinds.count("cancel") > 1


# A task that has ended in an earlier life


class ToldThatItEnded(Alarm):
    """Wakes a wait once: another call has reported that the task has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[InterruptibleWaits] = []

    async def until(self, happened: Callable[[], bool], at: datetime | None, summary: str) -> None:
        assert self.waits, "it waits on though the task has ended"
        waits = self.waits.pop()
        waits.earlier.add(EarlierLife(has_ended=True))
        assert happened()


async def test_a_call_under_a_hold_is_given_up_once_the_task_is_known_to_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the answer to a renewal may say, while the next job's request is repeated."""

    async def at_once(happened: Callable[[], bool]) -> None:
        assert happened()

    monkeypatch.setattr(workflow, "patched", lambda _: True)
    monkeypatch.setattr(workflow, "wait_condition", at_once)
    hold = SimpleNamespace(is_needed=lambda: True, has_update=lambda: False, due=lambda: None, check=lambda: None)
    alarm = ToldThatItEnded()
    waits = InterruptibleWaits(Stop(), alarm, hold=lambda: cast(KeptHold, hold))
    alarm.waits.append(waits)
    unanswered = cast("ActivityHandle[Any]", SimpleNamespace(done=lambda: False))
    assert isinstance(await waits.answered(unanswered, summary="1 wait: submit"), RowEnded)
