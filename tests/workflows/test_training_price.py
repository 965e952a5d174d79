"""A training's price while it runs: a new hold, another confirmation, charged by the hours that count (contract §5)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulators.admin_wire import RunSeen
from tests.workflows.books import ended, give_back
from tests.workflows.payers import (
    Payer,
    holds_of,
    kinds_of,
    new_payer,
    row_of,
    until_kinds,
    until_price_shown,
    until_started,
)
from tests.workflows.platform import Handle, Platform, task_id_of
from tests.workflows.resets import points_of, reset

BASE = 120
"""The price of a training of up to one GPU hour, in points; each further hour costs 60."""
RENEWED = ["pre_deduct", "pre_deduct", "cancel"]


async def start_training(platform: Platform, task: dict[str, Any]) -> Handle:
    """Start a training that stalls after its first checkpoint, until `resume`; returns when it does."""
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"], at=0.3)
    handle = await platform.start(task)
    await until_checkpoint(platform, handle, 1)
    return handle


async def until_checkpoint(platform: Platform, handle: Handle, number: int) -> None:
    async def written() -> bool:
        events = await platform.store.events(task_id_of(handle))
        return sum(event.event.value == "task.checkpoint" for event in events) >= number

    await platform.until(written)


async def act(platform: Platform, handle: Handle, action: str, **parameters: Any) -> None:
    """Let something happen to the task's newest training."""
    run = await until_started(platform, handle)
    await platform.simulators.admin.comfyui.act(run.run_id, action, **parameters)


async def let_it_end(platform: Platform, handle: Handle) -> None:
    """Resume a training that may not have reached the point where it stalls."""
    run = await until_started(platform, handle)

    async def is_over() -> bool:
        return (await platform.simulators.admin.comfyui.act(run.run_id, "resume")).is_over

    await platform.until(is_over)


async def confirmation(platform: Platform, handle: Handle) -> dict[str, Any] | None:
    shown: dict[str, Any] | None = (await platform.progress(handle))["confirmation"]
    return shown


async def test_a_price_that_rises_above_the_hold_takes_a_new_hold(quick_platform: Platform) -> None:
    handle = await start_training(quick_platform, quick_platform.training(max_credits=360))
    await act(quick_platform, handle, "gpu_hours", gpu_hours=5)
    await until_kinds(quick_platform, handle, RENEWED)
    await act(quick_platform, handle, "resume")
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, BASE + 4 * 60)
    assert [hold.amount for hold in await holds_of(quick_platform, handle)] == [BASE, BASE + 4 * 60]
    assert "uncovered" not in ending.exceptions


async def test_a_price_that_falls_leaves_the_hold_and_lowers_the_charge(quick_platform: Platform) -> None:
    task = quick_platform.training(hyperparameters={"epochs": 20, "batch_size": 1, "learning_rate": 0.001})
    handle = await start_training(quick_platform, task)
    await act(quick_platform, handle, "gpu_hours", gpu_hours=2)
    await let_it_end(quick_platform, handle)
    ending = await ended(quick_platform, handle)
    assert (ending.charged, ending.result["credits"]["returned"]) == (BASE + 60, 60)
    assert await kinds_of(quick_platform, handle) == ["pre_deduct", "commit"]


async def test_a_price_above_the_ceiling_is_confirmed_again(quick_platform: Platform) -> None:
    handle = await start_training(quick_platform, quick_platform.training(max_credits=200))
    await act(quick_platform, handle, "gpu_hours", gpu_hours=5)
    await until_price_shown(quick_platform, handle, 360)
    answer = await handle.execute_update("confirm_price", {"max_credits": 360})
    assert answer == {"max_credits": 360}
    await quick_platform.until(lambda: has_amount(quick_platform, handle, 360))
    assert await confirmation(quick_platform, handle) is None, "it is shown only while it is waited for"
    await act(quick_platform, handle, "resume")
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 360)


async def start_free_training(platform: Platform, payer: Payer, **fields: Any) -> tuple[Handle, str]:
    """Start a training of five hours that costs nothing for its first hour; its handle and id, once it has begun."""
    platform.policy = platform.policy | {"prices": PriceTable(training_base=0)}
    admin, free = platform.simulators.admin, {"selected_cost": 0, "estimated_cost": 0}
    await admin.credits.fault("alter", route="estimate", tenant_id=payer.tenant_id, fields=free, times=None)
    task = payer.training(**fields)
    of_task = {"route": "create_training", "task_id": task["task_id"]}
    await admin.comfyui.fault("job_duration", **of_task, seconds=5 * 3600)
    await admin.comfyui.fault("job_lie", **of_task, at=0, reply={"gpu_hours": 1.0}, fields={"gpu_hours": 1.0})
    handle = await platform.start(task)

    async def begun() -> str | None:
        runs = await admin.comfyui.jobs(task["task_id"])
        return runs[0].run_id if runs and runs[0].phase in ("waiting", "working") else None

    training_id = await platform.until(begun)
    assert training_id is not None
    assert await kinds_of(platform, handle) == []
    return handle, training_id


async def test_a_training_that_was_free_is_held_and_charged_once_its_price_rises(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform)
    handle, training_id = await start_free_training(patient_platform, payer, max_credits=None)
    comfyui = patient_platform.simulators.admin.comfyui
    await comfyui.act(training_id, "gpu_hours", gpu_hours=3)
    await until_price_shown(patient_platform, handle, 120)
    await handle.execute_update("confirm_price", {"max_credits": 120})
    await patient_platform.until(lambda: has_amount(patient_platform, handle, 120))
    await comfyui.act(training_id, "finish")
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "commit"]


@pytest.mark.parametrize("tops_up", [True, False], ids=["who tops up", "who does not"])
async def test_the_first_hold_of_a_training_that_was_free_is_refused_to_a_payer(
    patient_platform: Platform, tops_up: bool
) -> None:
    """It is without cover: tried every 30 s until its next checkpoint."""
    payer = await new_payer(patient_platform, 100)
    handle, training_id = await start_free_training(patient_platform, payer)
    comfyui = patient_platform.simulators.admin.comfyui
    await comfyui.act(training_id, "gpu_hours", gpu_hours=3)
    await until_refused(patient_platform, payer)
    await patient_platform.until_settled(handle)
    tries = await patient_platform.simulators.admin.credits.requests_seen("pre_deduct", task_id_of(handle))
    assert len(tries) <= 2
    if tops_up:
        await payer.has(120)
        await patient_platform.pass_time(handle, 31)
        await patient_platform.until(lambda: has_amount(patient_platform, handle, 120))
        await comfyui.act(training_id, "finish")
    else:
        await patient_platform.simulators.admin.advance(2 * 3_600)
        await patient_platform.pass_time(handle, 40)
    ending = await ended(patient_platform, handle)
    assert "uncovered" in ending.exceptions
    if tops_up:
        assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, 120, 0)
    else:
        assert (ending.code, ending.charged) == ("credit_exhausted", 0)


@pytest.mark.parametrize("balance", [1_000, 100])
async def test_a_price_that_rises_from_0_with_the_delivery_is_charged_or_recorded(
    patient_platform: Platform, balance: int
) -> None:
    payer = await new_payer(patient_platform, balance)
    handle, training_id = await start_free_training(patient_platform, payer)
    await deliver_three_hours(patient_platform, handle, training_id)
    ending = await ended(patient_platform, handle)
    charged, missing = (120, 0) if balance == 1_000 else (0, 120)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, charged)
    assert ending.result["credits"]["shortfall"] == missing
    assert ending.exceptions == (["shortfall"] if missing else [])


@pytest.mark.parametrize("fault", ["no answer", "lost answer"])
async def test_a_price_that_rises_from_0_with_the_delivery_is_charged_though_a_call_fails(
    patient_platform: Platform, fault: str
) -> None:
    """No hold was ever taken: the ledger of such a task is empty until the charge acts."""
    payer = await new_payer(patient_platform)
    handle, training_id = await start_free_training(patient_platform, payer)
    charge = {"route": "charge", "task_id": task_id_of(handle)}
    credits = patient_platform.simulators.admin.credits
    if fault == "no answer":
        fails = await credits.fault("error", **charge, status=503)
    else:
        fails = await credits.fault("drop", **charge)
    await deliver_three_hours(patient_platform, handle, training_id)
    await patient_platform.until_hit("charge", fails)
    if fault == "no answer":
        await patient_platform.pass_time(handle, 700)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])
    assert ending.result["credits"]["settlement"] == "settled"
    assert await kinds_of(patient_platform, handle) == ["charge"]


async def test_a_price_that_rises_from_0_with_the_delivery_is_charged_after_a_reset(patient_platform: Platform) -> None:
    """An earlier life may have charged it: the ledger is looked at for ten minutes first."""
    payer = await new_payer(patient_platform)
    handle, training_id = await start_free_training(patient_platform, payer)
    await patient_platform.until_settled(handle)
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[0])
    await patient_platform.until_settled(run)
    await deliver_three_hours(patient_platform, run, training_id)
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])
    assert ending.result["credits"]["settlement"] == "settled"
    assert await kinds_of(patient_platform, handle) == ["charge"]


async def test_a_price_that_rises_from_0_with_the_delivery_is_charged_by_a_give_back(
    patient_platform: Platform,
) -> None:
    """The run was terminated while it charged, and no hold was ever taken."""
    payer = await new_payer(patient_platform)
    handle, training_id = await start_free_training(patient_platform, payer)
    unsent = await patient_platform.simulators.admin.credits.fault(
        "drop", route="charge", task_id=task_id_of(handle), when="before"
    )
    await deliver_three_hours(patient_platform, handle, training_id)
    await patient_platform.until_hit("charge", unsent)
    await handle.terminate()
    giving_back = await give_back(patient_platform, handle)
    await patient_platform.until_settled(giving_back)
    await patient_platform.pass_time(giving_back, 700)
    assert (await giving_back.result())["outcome"] == "already_charged"
    row = await row_of(patient_platform, handle)
    assert (row.status, row.credits.charged, row.credits.shortfall) == (TaskStatus.COMPLETED, 120, 0)
    assert await kinds_of(patient_platform, handle) == ["charge"]


async def deliver_three_hours(platform: Platform, handle: Handle, training_id: str) -> None:
    """End a training that was free until now: only its delivery says that it took three hours."""
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("callback_withhold", task_id=task_id_of(handle), times=None)
    await comfyui.act(training_id, "lie", fields={"gpu_hours_used": 3.0})
    await comfyui.act(training_id, "finish")
    await platform.pass_time(handle, 301)


async def has_amount(platform: Platform, handle: Handle, amount: int) -> bool:
    return any(hold.amount == amount and hold.phase == "open" for hold in await holds_of(platform, handle))


async def test_a_price_that_rises_again_replaces_the_one_to_confirm(quick_platform: Platform) -> None:
    handle = await start_training(quick_platform, quick_platform.training(max_credits=200))
    for hours, price in ((5, 360), (7, 480)):
        await act(quick_platform, handle, "gpu_hours", gpu_hours=hours)
        await until_price_shown(quick_platform, handle, price)
    await handle.execute_update("confirm_price", {"max_credits": 480})
    await act(quick_platform, handle, "resume")
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 480)


async def test_a_price_that_was_asked_for_before_is_asked_for_again(quick_platform: Platform) -> None:
    """Who follows the events knows the price that is to be confirmed now, not the one before it."""
    handle = await start_training(quick_platform, quick_platform.training(max_credits=200))
    for hours, price in ((5, 360), (4, 300), (5, 360)):
        await act(quick_platform, handle, "gpu_hours", gpu_hours=hours)
        await until_price_shown(quick_platform, handle, price)
    await handle.execute_update("confirm_price", {"max_credits": 360})
    await act(quick_platform, handle, "resume")
    ending = await ended(quick_platform, handle)
    asked = [event.confirmation.estimated_cost for event in ending.events if event.confirmation]
    assert (ending.status, asked) == (TaskStatus.COMPLETED, [360, 300, 360])


async def test_an_unconfirmed_price_stops_the_training_at_its_next_checkpoint(quick_platform: Platform) -> None:
    handle = await start_training(quick_platform, quick_platform.training(max_credits=200))
    await act(quick_platform, handle, "gpu_hours", gpu_hours=5)
    shown = await until_price_shown(quick_platform, handle, 360)
    assert shown["confirm_by"] is None, "it waits for nobody: it stops at its next checkpoint, whenever that is"
    await act(quick_platform, handle, "resume")
    ending = await ended(quick_platform, handle)
    [asked] = [event for event in ending.events if event.confirmation]
    assert asked.confirmation is not None and asked.confirmation.confirm_by is None
    assert asked.message == (
        "The training now costs 360 points, and 200 are confirmed. It runs on; unless the price is confirmed it stops "
        "at its next checkpoint."
    )
    assert ending.code == "price_not_confirmed"
    assert sum(kind.startswith("task.checkpoint") for kind in ending.kinds) == 2


class ConfirmationOfBefore(OwnModel):
    """What workers and gateways of 0.1.0 need of a price to be confirmed."""

    estimated_cost: int
    confirm_by: Instant


async def test_a_price_that_rose_is_kept_as_a_version_before_reads_it(quick_platform: Platform) -> None:
    handle = await start_training(quick_platform, quick_platform.training(max_credits=200))
    await act(quick_platform, handle, "gpu_hours", gpu_hours=5)

    async def kept() -> dict[str, Any]:
        row = await quick_platform.store.task(task_id_of(handle))
        return (row.model_dump(mode="json")["confirmation"] if row else None) or {}

    await quick_platform.until(kept)
    assert ConfirmationOfBefore.model_validate(await kept()).estimated_cost == 360
    assert (await kept())["is_running"], "newer ones know that it does not wait"
    await act(quick_platform, handle, "resume")
    await ended(quick_platform, handle)


async def test_work_delivered_before_the_next_checkpoint_costs_what_was_confirmed(quick_platform: Platform) -> None:
    """What was not confirmed is never charged; what was, is held in time."""
    handle = await start_training(quick_platform, quick_platform.training(max_credits=200))
    await act(quick_platform, handle, "gpu_hours", gpu_hours=5)
    await until_price_shown(quick_platform, handle, 360)
    await act(quick_platform, handle, "finish")
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 200)
    assert (ending.result["credits"]["held"], ending.result["credits"]["shortfall"]) == (200, 0)


@pytest.mark.parametrize("balance", [BASE, 300], ids=["nothing left", "less than the new price"])
async def test_a_dearer_price_that_the_balance_lacks_keeps_the_hold(quick_platform: Platform, balance: int) -> None:
    """The rest is a shortfall at the end: an unpaid part never takes the work away while the old hold lasts."""
    payer = await new_payer(quick_platform, balance)
    handle = await start_training(quick_platform, payer.training())
    await act(quick_platform, handle, "gpu_hours", gpu_hours=5)
    await until_refused(quick_platform, payer)
    await act(quick_platform, handle, "resume")
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, BASE)
    assert (ending.result["credits"]["shortfall"], ending.exceptions) == (240, ["shortfall"])


async def until_refused(platform: Platform, payer: Payer) -> None:
    """Wait until the payer was refused a hold."""

    async def refused() -> bool:
        seen = await platform.simulators.admin.credits.requests_seen("pre_deduct")
        return any(request.tenant_id == payer.tenant_id and request.outcome == "refused" for request in seen)

    await platform.until(refused)


@pytest.mark.slow
async def test_a_retried_training_is_charged_to_its_checkpoint_and_its_last_attempt(quick_platform: Platform) -> None:
    """The hours between the checkpoint and the preemption are lost and cost nothing."""
    quick_platform.policy["retry_after_seconds"] = [0.05]
    task = quick_platform.training(hyperparameters={"epochs": 40, "batch_size": 1, "learning_rate": 0.001})
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="create_training", task_id=task["task_id"], at=0.6)
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    first, last = (run.state for run in await comfyui.jobs(task_id_of(handle)))
    assert 0 < first["checkpoint"]["gpu_hours_used"] < first["gpu_hours_used"]
    hours = first["checkpoint"]["gpu_hours_used"] + last["gpu_hours_used"]
    assert (ending.status, ending.result["attempts"]) == (TaskStatus.COMPLETED, 2)
    assert ending.charged == BASE + math.ceil(round((hours - 1) * 60, 6))


async def test_a_dearer_attempt_asks_for_no_more_points_than_the_hold_before_it_leaves_missing(
    quick_platform: Platform,
) -> None:
    """120 of the payer's 180 points are held when the second attempt costs 180: they come back for it."""
    quick_platform.policy["retry_after_seconds"] = [0.05]
    payer = await new_payer(quick_platform, BASE + 60)
    task = payer.training(max_credits=None)
    comfyui, create = quick_platform.simulators.admin.comfyui, {"route": "create_training", "task_id": task["task_id"]}
    await comfyui.fault("job_preempt", **create, at=0.1)
    for attempt, hours in ((1, 1.0), (2, 2.0)):
        lie = {"gpu_hours": hours}
        await comfyui.fault("job_lie", **create, nth=attempt, at=0, reply=lie, fields=lie | {"gpu_hours_used": hours})
    handle = await quick_platform.start(task)
    for price in (BASE, BASE + 60):
        shown = await until_price_shown(quick_platform, handle, price)
        assert shown["suggest_topup"] == 0
        await handle.execute_update("confirm_price", {"max_credits": price})
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.result["attempts"], ending.charged) == (TaskStatus.COMPLETED, 2, BASE + 60)


@pytest.mark.parametrize("reported_hours", [3.0, 9.0], ids=["as they were", "other hours"])
@pytest.mark.parametrize("resumes", [1, 2])
async def test_a_checkpoint_that_a_training_resumed_from_adds_nothing(
    quick_platform: Platform, reported_hours: float, resumes: int
) -> None:
    """Each resumed attempt reports the checkpoint it began with, as a server may: its hours count once."""
    quick_platform.policy["retry_after_seconds"] = [0.05, 0.05, 0.05]
    task = quick_platform.training(max_credits=10_000)
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"], at=0.3, times=None)
    handle = await quick_platform.start(task)
    await until_checkpoint(quick_platform, handle, 1)
    first = await until_started(quick_platform, handle)
    checkpoint = first.state["checkpoint"] | {"gpu_hours_used": 3.0}
    await report(quick_platform, handle, first.run_id, 100, checkpoint=checkpoint)
    await preempt(quick_platform, handle, first.run_id)
    for attempt in range(2, 2 + resumes):
        resumed = await until_attempt(quick_platform, handle, attempt)
        assert resumed.state["gpu_hours_used"] is not None
        await report(
            quick_platform, handle, resumed.run_id, 100, checkpoint=checkpoint | {"gpu_hours_used": reported_hours}
        )
        if attempt <= resumes:
            await preempt(quick_platform, handle, resumed.run_id)
    model = {"model_path": "file:///models/1", "version": "1", "metrics": {}}
    ends = {"training_status": "completed", "training_stage": "publishing", "output": model, "gpu_hours_used": 1.0}
    await quick_platform.callback(handle, training_id=resumed.run_id, sequence=200, **ends)
    await comfyui.act(resumed.run_id, "finish")
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, BASE + 3 * 60)
    assert sum(kind.startswith("task.checkpoint") for kind in ending.kinds) == 1


RUNNING = {"training_status": "running", "training_stage": "training"}


async def report(platform: Platform, handle: Handle, training_id: str, sequence: int, **fields: Any) -> None:
    """A message of this training, past the simulator; returns when the task has applied it."""
    update = {"training_id": training_id, "sequence": sequence, "stage_progress": 99.5, "gpu_hours": 4.0}
    await platform.callback(handle, **RUNNING, **update, **fields)
    await platform.until(lambda: _shows(platform, handle, 99.5))


async def preempt(platform: Platform, handle: Handle, training_id: str) -> None:
    details = {"code": "gpu_preempted", "message": "gone"}
    await platform.callback(handle, **RUNNING, training_id=training_id, sequence=101, error_details=details)


async def _shows(platform: Platform, handle: Handle, percent: float) -> bool:
    return bool((await platform.progress(handle))["progress"] == percent)


async def until_attempt(platform: Platform, handle: Handle, number: int) -> RunSeen:
    """Wait until the task's `number`th training is the one that it follows; its state."""

    async def begun() -> RunSeen | None:
        runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        followed = (await platform.progress(handle))["job_id"]
        is_there = len(runs) == number and followed == runs[-1].run_id and runs[-1].phase in ("waiting", "working")
        return runs[-1] if is_there else None

    run = await platform.until(begun)
    assert run is not None
    return run


async def test_what_is_left_out_of_a_dataset_is_said_with_the_price(quick_platform: Platform) -> None:
    task = quick_platform.training(max_credits=None)
    summary = "Dataset: 10 pictures, 9 with a caption. Left out, neither pictures nor captions: 1 file (a.md)."
    reply = {"dataset_summary": summary}
    await quick_platform.simulators.admin.comfyui.fault(
        "job_lie", route="create_training", task_id=task["task_id"], at=0, reply=reply
    )
    handle = await quick_platform.start(task)
    shown = await quick_platform.until(lambda: confirmation(quick_platform, handle))
    assert shown is not None
    await handle.execute_update("confirm_price", {"max_credits": shown["estimated_cost"]})
    ending = await ended(quick_platform, handle)
    (asked,) = [event for event in ending.events if event.confirmation is not None]
    assert (asked.message or "").endswith(f"it waits for confirm_price. {summary}")
