"""What a reset task is charged, as the ledger shows it (contract §4, earlier lives).

The platform's own credits service ignores keys. Its ledger shows no kinds and no ids, and sometimes lags.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio import workflow
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import CANCEL_SIGNAL, CancelTask, TaskStatus
from store import TaskStore
from tests.workflows.books import Ending, ended, ended_without_its_run, give_back
from tests.workflows.payers import (
    Payer,
    end_open_holds,
    entries_of,
    has_kinds,
    holds_of,
    kinds_of,
    new_payer,
    refuse_cancels,
    row_of,
    until_started,
)
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of
from tests.workflows.reset_scenarios import POLICY, RENEWED, work_goes_on
from tests.workflows.resets import point_before, points_of, reset
from tests.workflows.test_settlement import cancelled_by_another_caller, delivered, start_reporting
from tests.workflows.test_training_price import start_free_training, until_refused
from workflows import charges
from workflows.credit_hold import FORGOTTEN_BESIDE

HD = 18 + 6
"""The price of a standard image, in points."""
HELD_AGAIN = ("pre_deduct", "pre_deduct", "cancel")
"""The ledger of a task that was reset: the earlier life's hold is cancelled before the other is committed."""
IN_FLIGHT_SECONDS = 11
"""How long a reset run waits for the calls of its earlier life to end."""
HIDDEN = {"charge_hidden"}


async def stalled(platform: Platform, task: dict[str, Any]) -> Handle:
    """An image whose work has started and stalls, under its hold."""
    await platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], times=None)
    handle = await platform.start(task)
    await until_started(platform, handle)
    await platform.until_settled(handle)
    return handle


async def reset_to_its_start(platform: Platform, handle: Handle, *, holds: int) -> Handle:
    """Reset the task to its first workflow task; returns once the new run has its own job and hold."""
    run = await reset(platform, handle, (await points_of(platform, handle))[0])

    async def held_again() -> bool:
        return len(await holds_of(platform, handle)) == holds

    await platform.until(held_again)
    await platform.until_settled(run)
    return run


async def test_a_training_that_is_reset_to_before_its_hold_was_renewed_is_charged_once(
    patient_platform: Platform,
) -> None:
    """Half the hold's life passed: the run knows the first hold, and the second is the one that is open."""
    payer = await new_payer(patient_platform)
    task = payer.training()
    await patient_platform.simulators.admin.comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    handle = await patient_platform.start(task)
    await until_started(patient_platform, handle)
    await patient_platform.until_settled(handle)
    before = (await points_of(patient_platform, handle))[-1]
    await patient_platform.pass_time(handle, 1_810)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, *RENEWED))
    run = await reset(patient_platform, handle, before)
    await patient_platform.until_settled(run)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert (await kinds_of(patient_platform, handle)).count("commit") == 1


async def test_a_reset_training_whose_first_hold_was_taken_twice_is_charged_once(patient_platform: Platform) -> None:
    """Nothing names the first hold: its answer was lost, and the repeat took another. It hides no end of the others."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    task = payer.training()
    await patient_platform.simulators.admin.credits.fault("drop", route="pre_deduct", task_id=task["task_id"])
    await patient_platform.simulators.admin.comfyui.fault(
        "job_stall", route="create_training", task_id=task["task_id"], times=None
    )
    handle = await patient_platform.start(task)
    await until_started(patient_platform, handle)
    await patient_platform.until_settled(handle)
    await patient_platform.pass_time(handle, 1_810)
    await patient_platform.until(lambda: has_phases(patient_platform, handle, "open", "cancelled", "open"))
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[0])
    await patient_platform.until_settled(run)
    held = [hold.phase for hold in await holds_of(patient_platform, handle)]
    assert held[:3] == ["open", "cancelled", "open"]
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "finish")
    held[2] = "cancelled"
    await patient_platform.until(lambda: has_phases(patient_platform, handle, *held))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 770)  # until the ends count, and then the first hold as doubled
    ending = await ended(patient_platform, run, exempt={"hold_expires"})
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    [doubled] = [record for record in ending.records if record.code == "hold_doubled"]
    assert doubled.details["amount"] == 120


async def has_phases(platform: Platform, handle: Handle, *phases: str) -> bool:
    return [hold.phase for hold in await holds_of(platform, handle)] == list(phases)


async def test_a_training_with_more_holds_than_its_ledger_shows_is_charged_once_after_a_reset(
    patient_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after weeks of renewals: the answer of a long ledger leaves the oldest holds out, and the row names them."""
    monkeypatch.setattr("activities.credits.MAX_LEDGER_BYTES", 2_400)
    monkeypatch.setattr("workflows.row_look.MAX_KEPT_HOLDS", 2)
    patient_platform.policy |= {"deadline_factor": 20}
    payer = await new_payer(patient_platform)
    task = payer.training()
    await patient_platform.simulators.admin.comfyui.fault(
        "job_stall", route="create_training", task_id=task["task_id"], times=None
    )
    handle = await patient_platform.start(task)
    await until_started(patient_platform, handle)
    await patient_platform.until_settled(handle)
    for renewals in range(1, 13):
        await patient_platform.pass_time(handle, 1_810)
        await patient_platform.until(lambda n=renewals: is_renewed(patient_platform, handle, n))  # type: ignore[misc]
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[0])
    await patient_platform.until_settled(run)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert (await kinds_of(patient_platform, handle)).count("commit") == 1


async def is_renewed(platform: Platform, handle: Handle, times: int) -> bool:
    kinds = await kinds_of(platform, handle)
    return (kinds.count("pre_deduct"), kinds.count("cancel")) == (times + 1, times)


async def test_a_training_that_is_reset_to_its_open_window_is_not_short_of_what_it_holds(
    patient_platform: Platform,
) -> None:
    """The balance is enough for one hold, which stands; nothing that the new run called has read the row."""
    payer = await new_payer(patient_platform, 120)
    await payer.has_plain_service()
    opens = datetime.now(UTC) + timedelta(hours=1)
    task = payer.training(window={"not_before": opens.isoformat()})
    await patient_platform.simulators.admin.comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    handle = await patient_platform.start(task)
    await patient_platform.until_settled(handle)
    await patient_platform.pass_time(handle, 3_610)
    await until_started(patient_platform, handle)
    await patient_platform.until_settled(handle)
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[1])
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)


async def test_a_task_that_is_reset_while_its_hold_is_requested_is_not_short_of_it(patient_platform: Platform) -> None:
    """The balance is enough for one hold, which the earlier life's call takes; its answer comes after the reset."""
    payer = await new_payer(patient_platform, HD)
    await payer.has_plain_service()
    task = payer.image()
    credits = patient_platform.simulators.admin.credits
    await credits.fault("delay", route="pre_deduct", task_id=task["task_id"], seconds=3, when="after")
    await patient_platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"])
    handle = await patient_platform.start(task)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct"))
    run = await reset(patient_platform, handle, await point_before(patient_platform, handle, "pre_deduct"))

    async def refused_and_noted() -> bool:
        asked = await credits.requests_seen("pre_deduct", task_id_of(handle))
        return len(asked) > 1 and bool((await row_of(patient_platform, handle)).hold_ids)

    await patient_platform.until(refused_and_noted)
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    await until_started(patient_platform, run)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, HD, 0)
    assert ending.exceptions == ["uncovered"]
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel", "pre_deduct", "commit"]


async def test_a_dearer_hold_of_a_reset_training_is_taken_once_the_hold_of_before_is_given_back(
    patient_platform: Platform,
) -> None:
    """120 points are held by each life, and 60 are left: 180 can be held beside one of them."""
    payer = await new_payer(patient_platform, 300)
    await payer.has_plain_service()
    comfyui = patient_platform.simulators.admin.comfyui
    task = payer.training(max_credits=360)
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    handle = await patient_platform.start(task)
    training = await until_started(patient_platform, handle)
    await patient_platform.until_settled(handle)
    run = await reset_to_its_start(patient_platform, handle, holds=2)
    await comfyui.act(training.run_id, "gpu_hours", gpu_hours=2)
    await until_refused(patient_platform, payer)
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    renewed = (*HELD_AGAIN, "pre_deduct", "cancel")
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, *renewed))
    await comfyui.act(training.run_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.result["credits"]["shortfall"]) == (TaskStatus.COMPLETED, 180, 0)
    assert "uncovered" not in ending.exceptions
    assert await kinds_of(patient_platform, handle) == [*renewed, "commit"]


async def test_a_run_that_an_older_worker_began_tops_its_hold_up_as_that_worker_did(
    patient_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives its own hold back, not the one of before the reset: its history holds these calls in this order."""
    known = workflow.patched
    monkeypatch.setattr(workflow, "patched", lambda name: name != FORGOTTEN_BESIDE and known(name))
    payer = await new_payer(patient_platform, 2 * HD + 10)
    await payer.has_plain_service()
    comfyui = patient_platform.simulators.admin.comfyui
    handle = await stalled(patient_platform, payer.image())
    run = await reset_to_its_start(patient_platform, handle, holds=2)
    await comfyui.fault("job_lie", route="submit_job", task_id=task_id_of(handle), reply={"estimated_cost": 30})
    await comfyui.act((await patient_platform.job(run)).run_id, "preempt")
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 31)
    topped_up = ["pre_deduct", "pre_deduct", "cancel", "pre_deduct"]
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, *topped_up))
    assert [hold.phase for hold in await holds_of(patient_platform, handle)] == ["open", "cancelled", "open"]
    await patient_platform.until_settled(run)
    await comfyui.act((await patient_platform.job(run)).run_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD)
    assert "uncovered" in ending.exceptions


async def test_a_hold_that_had_ended_before_the_reset_gives_nothing_back(patient_platform: Platform) -> None:
    """The balance is empty: the run that follows asks once, and was never without cover."""
    payer = await new_payer(patient_platform, HD)
    await payer.has_plain_service()
    credits = patient_platform.simulators.admin.credits
    handle = await stalled(patient_platform, payer.image())
    await cancelled_by_another_caller(patient_platform, payer, handle)
    await payer.has(0)
    before = len(await credits.requests_seen("pre_deduct", task_id_of(handle)))
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[0])
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run)
    assert (ending.code, ending.charged) == ("insufficient_balance", 0)
    assert "uncovered" not in ending.exceptions
    assert len(await credits.requests_seen("pre_deduct", task_id_of(handle))) == before + 1


async def test_a_training_that_was_free_and_is_reset_is_held_by_the_points_of_before(
    patient_platform: Platform,
) -> None:
    """The balance is enough for one hold, which the earlier life has taken."""
    payer = await new_payer(patient_platform, 120)
    await payer.has_plain_service()
    comfyui = patient_platform.simulators.admin.comfyui
    handle, training_id = await start_free_training(patient_platform, payer)
    await comfyui.act(training_id, "gpu_hours", gpu_hours=3)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct"))
    await patient_platform.until_settled(handle)
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[0])
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    await comfyui.act(training_id, "gpu_hours", gpu_hours=3)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct", "cancel", "pre_deduct"))
    await comfyui.act(training_id, "finish")
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, 120, 0)
    assert (await kinds_of(patient_platform, handle)).count("commit") == 1


@pytest.mark.parametrize("answer", ["500", "lost"])
async def test_a_commit_that_acted_after_a_reset_is_not_charged_again(patient_platform: Platform, answer: str) -> None:
    """The ledger shows the cancel of the earlier hold, but not yet the commit of the other: that is no proof."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    await payer.has_plain_service()
    handle = await stalled(patient_platform, payer.image())
    run = await reset_to_its_start(patient_platform, handle, holds=2)
    commit = {"route": "commit", "tenant_id": payer.tenant_id}
    waits = await credits.fault("rate_limit", **commit, seconds=60)
    if answer == "500":
        await credits.fault("error", **commit, nth=2, status=500, when="after")
    else:
        await credits.fault("drop", **commit, nth=2)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "finish")
    await patient_platform.until_hit("commit", waits)
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=55)
    await patient_platform.pass_time(run, 60)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, *HELD_AGAIN, "commit"))
    await patient_platform.pass_time(run, 60)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])
    assert await kinds_of(patient_platform, handle) == [*HELD_AGAIN, "commit"]


async def test_work_that_costs_nothing_is_not_handed_out_where_an_earlier_life_was_cancelled(
    quick_platform: Platform,
) -> None:
    """Nothing is committed for it, so no call to the credits service says that the task has ended."""
    quick_platform.policy |= POLICY
    payer = await new_payer(quick_platform)
    task = payer.image()
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("not_offered", route="cancel_job", tenant_id=payer.tenant_id)
    free: dict[str, Any] = {"fields": {"actual_cost": 0}}
    await comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], at=0, **free)
    handle = await stalled(quick_platform, task)
    waiting = (await points_of(quick_platform, handle))[-1]
    await quick_platform.cancel(handle)
    await handle.result()
    run = await reset(quick_platform, handle, waiting, forgets_messages=True)
    async with work_goes_on(quick_platform, run):
        ending = await ended(quick_platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)
    assert ending.result["result_urls"] == []


async def _is_cancelled(platform: Platform, handle: Handle, *, place: int) -> bool:
    return (await holds_of(platform, handle))[place].phase == "cancelled"


async def test_a_charge_that_was_never_sent_counts_as_none(patient_platform: Platform) -> None:
    """Reset as it is charged, the run reads the ledger first. What it sends then acts, and its answer is lost."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    credits = patient_platform.simulators.admin.credits
    handle = await stalled(patient_platform, payer.image())
    await cancelled_by_another_caller(patient_platform, payer, handle)
    unsent = await credits.fault("drop", route="charge", tenant_id=payer.tenant_id, when="before")
    lost = await credits.fault("drop", route="charge", tenant_id=payer.tenant_id, nth=2)
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("charge", unsent)
    run = await reset(patient_platform, handle, await point_before(patient_platform, handle, "charge"))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    await patient_platform.until_hit("charge", lost)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel", "charge"]


@pytest.mark.parametrize("lag_seconds", [0, 60], ids=["at once", "late"])
async def test_a_training_that_is_reset_between_two_parts_of_a_charge_is_charged_the_rest(
    patient_platform: Platform, lag_seconds: float
) -> None:
    """2,460 points are charged as 2,000 and 460. The ledger shows the first part, and no id of the hold that ended."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    handle = await between_two_parts(patient_platform, payer, lag_seconds=lag_seconds)
    run = await reset(patient_platform, handle, await point_before(patient_platform, handle, "charge", nth=2))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.result["credits"]["shortfall"]) == (TaskStatus.COMPLETED, 2_460, 0)
    assert set(ending.exceptions) <= {"prices_differ"}
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel", "charge", "charge"]


async def test_a_part_that_acted_before_a_reset_is_not_charged_again_by_the_give_back(
    skipping_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> None:
    """The reset run is terminated before any call of it: the row knows the run before it alone. The ledger shows the
    second part late.
    """
    async with running_platform(skipping_env, task_store, tmp_path, speed=1.0) as platform:
        payer = await new_payer(platform)
        await payer.has_plain_service()
        credits = platform.simulators.admin.credits
        both = ("pre_deduct", "cancel", "charge", "charge")
        async with platform.worker():
            await credits.fault("drop", route="charge", tenant_id=payer.tenant_id, nth=2)
            handle = await between_two_parts(platform, payer, kind="delay", when="before", seconds=3)
            await credits.advance(100)
            await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=60)
            await platform.until(lambda: has_kinds(platform, handle, *both))
        run = await reset(platform, handle, await point_before(platform, handle, "charge", nth=2))
        await run.terminate("by a test")
        async with platform.worker():
            giving_back = await give_back(platform, handle)
            await platform.until_settled(giving_back)
            await platform.pass_time(giving_back, 700)
            assert (await giving_back.result())["outcome"] == "already_charged"
        row = await row_of(platform, handle)
        assert (row.lives, row.status, row.credits.charged) == (0, TaskStatus.COMPLETED, 2_460)
        assert await kinds_of(platform, handle) == list(both)


async def charged_and_reset(platform: Platform, payer: Payer, *, lag_seconds: float) -> Handle:
    """An image whose hold had ended, and which was charged. It was then reset to before its delivery, and knows nothing
    of that yet; the ledger shows the hold's end, and the charge `lag_seconds` late. Returns the new run.
    """
    credits = platform.simulators.admin.credits
    handle = await stalled(platform, payer.image())
    waiting = (await points_of(platform, handle))[-1]
    how = await end_open_holds(platform, handle)
    await credits.advance(lag_seconds)
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=lag_seconds)
    await credits.fault("delay", route="charge", tenant_id=payer.tenant_id, when="after", seconds=60)
    await delivered(platform, handle)
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", how, "charge"))
    return await reset(platform, handle, waiting, forgets_messages=True)


@pytest.mark.parametrize("lag_seconds", [30, 3_600])
async def test_a_charge_that_a_late_ledger_hides_from_a_reset_run_is_found_or_left_unknown(
    patient_platform: Platform, lag_seconds: float
) -> None:
    """The reset run is cancelled before it knows of the delivery: only the history of the run before has the charge."""
    payer = await new_payer(patient_platform)
    run = await charged_and_reset(patient_platform, payer, lag_seconds=lag_seconds)
    await run.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run, exempt=HIDDEN if lag_seconds > 600 else ())
    credits = ending.result["credits"]
    assert ending.charged == HD
    if lag_seconds < 600:
        assert (ending.status, ending.exceptions) == (TaskStatus.COMPLETED, [])
        assert (credits["settlement"], credits["charged"]) == ("settled", HD) and ending.result["result_urls"]
    else:
        assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, ["settlement_unknown"])
        assert (credits["settlement"], credits["charged"], credits["returned"]) == ("unknown", None, None)


@pytest.mark.parametrize("lag_seconds", [30, 3_600])
async def test_a_charge_that_a_late_ledger_hides_from_a_give_back_is_found_or_left_unknown(
    patient_platform: Platform, lag_seconds: float
) -> None:
    """The reset run is terminated before it knows of the delivery."""
    payer = await new_payer(patient_platform)
    run = await charged_and_reset(patient_platform, payer, lag_seconds=lag_seconds)
    await patient_platform.until_settled(run)
    await run.terminate("by a test")
    giving_back = await give_back(patient_platform, run)
    await patient_platform.until_settled(giving_back)
    await patient_platform.pass_time(giving_back, 700)
    outcome = (await giving_back.result())["outcome"]
    task_id = task_id_of(run)
    ending = await ended_without_its_run(patient_platform, task_id, exempt=HIDDEN if lag_seconds > 600 else ())
    assert ending.charged == HD
    if lag_seconds < 600:
        assert (ending.status, ending.exceptions, outcome) == (TaskStatus.COMPLETED, [], "already_charged")
        assert ending.result["result_urls"]
    else:
        assert (ending.status, ending.code, outcome) == (TaskStatus.FAILED, "internal", "settlement_unknown")
        assert sorted(ending.exceptions) == ["internal", "settlement_unknown"]


async def charged_what_was_held(platform: Platform, payer: Payer, *, gpu_hours_used: int, parts: int = 1) -> Handle:
    """A training whose hold of 120 points had ended, and which was charged these in so many parts: not more than was
    held, as the policy says. It was then reset to before its commit; the ledger shows the hold's end, and what was
    charged late. Returns the new run.
    """
    credits, comfyui = platform.simulators.admin.credits, platform.simulators.admin.comfyui
    task = payer.training(max_credits=5_000)
    handle = await start_reporting(platform, task, gpu_hours_used=gpu_hours_used)
    job = await until_started(platform, handle)
    # Ordered to finish in its first moment it would end with its own hours.
    await comfyui.act(job.run_id, "lie", fields={"gpu_hours_used": gpu_hours_used})
    await platform.until_settled(handle)
    how = await end_open_holds(platform, handle)
    await credits.advance(30)
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=30)
    await credits.fault("delay", route="charge", tenant_id=payer.tenant_id, when="after", nth=parts, seconds=60)
    await delivered(platform, handle)
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", how, *["charge"] * parts))
    return await reset(platform, handle, await point_before(platform, handle, "commit"))


async def charges_of(platform: Platform, handle: Handle) -> list[int]:
    """The points of the task's charges, oldest first."""
    return [-entry.change for entry in await entries_of(platform, handle) if entry.kind == "charge"]


@pytest.mark.by_contract("the ledger shows ids")
@pytest.mark.parametrize(("hours", "parts"), [(3, [120, 120]), (40, [120, 2_000, 340])], ids=["one part", "two parts"])
async def test_a_part_of_another_amount_that_a_late_ledger_hides_counts_with_its_own_points(
    patient_platform: Platform, hours: int, parts: list[int]
) -> None:
    """The reset run charges the whole price under the key that the smaller charge has: the answer is a conflict."""
    payer = await new_payer(patient_platform)
    run = await charged_what_was_held(patient_platform, payer, gpu_hours_used=hours)
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run)
    assert await charges_of(patient_platform, run) == parts
    assert (ending.status, ending.charged, ending.result["credits"]["charged"]) == (
        TaskStatus.COMPLETED,
        sum(parts),
        sum(parts),
    )
    assert ending.result["credits"]["shortfall"] == 0
    assert set(ending.exceptions) <= {"prices_differ"}


@pytest.mark.by_contract("keys are kept")
@pytest.mark.parametrize("lag_seconds", [0, 30])
async def test_a_part_of_another_amount_counts_with_its_own_points_in_a_give_back_too(
    patient_platform: Platform, lag_seconds: float
) -> None:
    """The reset run is terminated as it charges the whole price under the key that the smaller charge has."""
    payer = await new_payer(patient_platform)
    run = await terminated_as_it_charges(patient_platform, payer)
    await patient_platform.simulators.admin.credits.advance(30 - lag_seconds)
    ending = await charged_by_give_back(patient_platform, run, lag_seconds=lag_seconds)
    assert await charges_of(patient_platform, run) == [120, 120]
    assert (ending.charged, ending.result["credits"]["charged"]) == (240, 240)


@pytest.mark.by_contract("keys are kept")
async def test_a_give_back_charges_the_rest_under_a_number_that_no_earlier_life_has_used(
    patient_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier life charged two parts, and the run that was terminated had requested the first again."""
    monkeypatch.setattr(charges, "MAX_CHARGE_POINTS", 100)
    payer = await new_payer(patient_platform)
    run = await terminated_as_it_charges(patient_platform, payer, parts=2)
    await patient_platform.simulators.admin.credits.advance(30)
    ending = await charged_by_give_back(patient_platform, run)
    assert await charges_of(patient_platform, run) == [100, 20, 100, 20]
    assert (ending.charged, ending.result["credits"]["charged"]) == (240, 240)


async def terminated_as_it_charges(platform: Platform, payer: Payer, *, parts: int = 1) -> Handle:
    """As `charged_what_was_held`, with a price of 240; the new run is terminated while its own first charge is sent."""
    credits = platform.simulators.admin.credits
    charge = {"route": "charge", "tenant_id": payer.tenant_id}
    sent = await credits.fault("delay", **charge, nth=parts + 1, when="before", seconds=60)
    run = await charged_what_was_held(platform, payer, gpu_hours_used=3, parts=parts)
    await platform.until_hit("charge", sent)
    await run.terminate("by a test")
    return run


async def charged_by_give_back(platform: Platform, run: Handle, *, lag_seconds: float = 0) -> Ending:
    """Give the task of a terminated run back; it had been charged in part, so it is completed."""
    giving_back = await give_back(platform, run)
    if lag_seconds:
        await platform.until_settled(giving_back)
        await platform.pass_time(giving_back, 2 * lag_seconds)
    assert (await giving_back.result())["outcome"] == "already_charged"
    ending = await ended_without_its_run(platform, task_id_of(run))
    assert (ending.status, ending.result["credits"]["shortfall"]) == (TaskStatus.COMPLETED, 0)
    assert set(ending.exceptions) <= {"prices_differ"}
    return ending


async def test_a_charge_that_the_ledger_shows_with_the_end_of_its_hold_is_not_made_again(
    patient_platform: Platform,
) -> None:
    """The ledger is late: the run that was reset to before its commit commits the hold, and is refused once more."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    handle = await stalled(patient_platform, payer.image())
    await credits.advance(60)
    how = await end_open_holds(patient_platform, handle)
    await credits.fault("delay", route="charge", tenant_id=payer.tenant_id, when="after", seconds=60)
    await delivered(patient_platform, handle)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct", how, "charge"))
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=60)
    run = await reset(patient_platform, handle, await point_before(patient_platform, handle, "commit"))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", how, "charge"]


async def test_a_training_that_is_reset_after_its_commit_keeps_its_shortfall(patient_platform: Platform) -> None:
    """120 points were held and committed, 240 used; the run is reset before its end is written."""
    payer = await new_payer(patient_platform)
    task = payer.training()
    lost = await patient_platform.simulators.admin.credits.fault("drop", route="commit", task_id=task["task_id"])
    handle = await start_reporting(patient_platform, task, gpu_hours_used=3)
    job = await until_started(patient_platform, handle)
    # Ordered to finish in its first moment it would end with its own hours.
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "lie", fields={"gpu_hours_used": 3})
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("commit", lost)
    run = await reset(patient_platform, handle, await point_before(patient_platform, handle, "commit"))
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.result["credits"]["shortfall"]) == (TaskStatus.COMPLETED, 120, 120)
    assert [code for code in ending.exceptions if code != "prices_differ"] == ["shortfall"]


@pytest.mark.parametrize("acts", ["late", "never"])
async def test_a_training_that_is_reset_while_its_shortfall_is_charged_knows_of_that_charge(
    patient_platform: Platform, acts: str
) -> None:
    """120 points were held and committed; the charge of the other 120 is in flight at the reset."""
    patient_platform.policy |= {"charge_shortfall": True}
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    task = payer.training()
    charge: dict[str, Any] = {"route": "charge", "task_id": task["task_id"], "when": "before"}
    if acts == "late":
        out = await credits.fault("delay", **charge, seconds=5)
    else:
        out = await credits.fault("drop", **charge)
    handle = await start_reporting(patient_platform, task, gpu_hours_used=3)
    job = await until_started(patient_platform, handle)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "lie", fields={"gpu_hours_used": 3})
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("charge", out)
    run = await reset(patient_platform, handle, await point_before(patient_platform, handle, "charge"))
    if acts == "late":
        await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct", "commit", "charge"))
    await until_over(patient_platform, run)
    ending = await ended(patient_platform, run)
    assert ending.status is TaskStatus.COMPLETED
    shown = ending.result["credits"]
    recorded = [code for code in ending.exceptions if code != "prices_differ"]
    if acts == "late":
        assert (ending.charged, shown["charged"], shown["shortfall"], recorded) == (240, 240, 0, [])
    else:
        assert (ending.charged, shown["charged"], shown["settlement"]) == (120, None, "unknown")
        assert recorded == ["settlement_unknown"]


async def until_over(platform: Platform, run: Handle) -> None:
    """Let a minute pass whenever a run waits, until it has ended."""

    async def is_over() -> bool:
        await platform.until_settled(run)
        if (await run.describe()).status is not WorkflowExecutionStatus.RUNNING:
            return True
        await platform.pass_time(run, 60)
        return False

    await platform.until(is_over)


async def committed_and_reset(platform: Platform, payer: Payer) -> Handle:
    """A training of which 120 points were held and committed, and 240 used. It was then reset to before its delivery,
    and knows nothing of that yet. Returns the new run.
    """
    comfyui, task = platform.simulators.admin.comfyui, payer.training()
    await platform.simulators.admin.credits.fault("drop", route="commit", task_id=task["task_id"], times=None)
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"], at=0.3, times=None)
    handle = await platform.start(task)
    job = await until_started(platform, handle)
    await platform.until_settled(handle)
    waiting = (await points_of(platform, handle))[-1]
    await comfyui.act(job.run_id, "lie", fields={"gpu_hours_used": 3})
    await delivered(platform, handle)
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", "commit"))
    return await reset(platform, handle, waiting, forgets_messages=True)


async def test_a_cancelled_run_records_what_the_commit_of_before_its_reset_left_of_the_price(
    patient_platform: Platform,
) -> None:
    run = await committed_and_reset(patient_platform, await new_payer(patient_platform))
    await run.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.result["credits"]["shortfall"]) == (TaskStatus.COMPLETED, 120, 120)
    assert ending.exceptions == ["shortfall"]


@pytest.mark.parametrize("has_called", [False, True], ids=["before any call", "in its wait"])
async def test_a_give_back_records_what_the_commit_of_before_a_reset_left_of_the_price(
    patient_platform: Platform, *, has_called: bool
) -> None:
    run = await committed_and_reset(patient_platform, await new_payer(patient_platform))
    if has_called:
        await patient_platform.until_settled(run)
    await run.terminate("by a test")
    giving_back = await give_back(patient_platform, run)
    await patient_platform.until_settled(giving_back)
    await giving_back.result()
    ending = await ended_without_its_run(patient_platform, task_id_of(run))
    assert (ending.status, ending.charged, ending.result["credits"]["shortfall"]) == (TaskStatus.COMPLETED, 120, 120)
    assert ending.exceptions == ["shortfall"]


async def test_a_part_that_an_earlier_life_charged_is_counted_once_where_the_next_hold_ends_too(
    patient_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 of 24 points were charged. The reset run has a hold of its own, which expires once the ledger was read."""
    monkeypatch.setattr(charges, "MAX_CHARGE_POINTS", HD - 4)
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    handle = await stalled(patient_platform, payer.image())
    await end_open_holds(patient_platform, handle)
    second = await credits.fault("delay", route="charge", tenant_id=payer.tenant_id, seconds=60, nth=2)
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("charge", second)
    waits = await credits.fault("rate_limit", route="commit", tenant_id=payer.tenant_id, seconds=60)
    run = await reset(patient_platform, handle, (await points_of(patient_platform, handle))[0])
    await patient_platform.until_hit("commit", waits)
    await end_open_holds(patient_platform, handle)
    await patient_platform.pass_time(run, 70)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])
    shown = await entries_of(patient_platform, handle)
    assert [-entry.change for entry in shown if entry.kind == "charge"] == [HD - 4, 4]


async def between_two_parts(
    platform: Platform,
    payer: Payer,
    *,
    kind: str = "drop",
    when: str = "before",
    lag_seconds: float = 0,
    **parameters: Any,
) -> Handle:
    """A training whose hold was given back by another caller; the first part is charged, the second is never sent.

    `lag_seconds`: how late the ledger shows what was charged. `kind` and the rest: another fault of the second part's
    call.
    """
    task = payer.training(max_credits=5_000)
    admin = platform.simulators.admin
    charge = {"route": "charge", "task_id": task["task_id"]}
    second = await admin.credits.fault(kind, **charge, nth=2, when=when, **parameters)
    handle = await start_reporting(platform, task, gpu_hours=40, gpu_hours_used=40)
    run = await until_started(platform, handle)
    await admin.comfyui.act(run.run_id, "lie", fields={"gpu_hours": 40, "gpu_hours_used": 40})
    await cancelled_by_another_caller(platform, payer, handle)
    if lag_seconds:
        await admin.credits.advance(lag_seconds)
        await admin.credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=lag_seconds)
    await delivered(platform, handle)
    await platform.until_hit("charge", second)
    return handle


@pytest.mark.slow
async def test_a_failed_task_whose_earlier_hold_has_an_unknown_end_says_so(patient_platform: Platform) -> None:
    """Its cancel was answered too late: the repeat is refused, and the ledger shows nothing for ten minutes."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    await payer.has_plain_service()
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=3_600)
    handle = await stalled(patient_platform, payer.image())
    run = await reset_to_its_start(patient_platform, handle, holds=2)
    lost = await credits.fault("drop", route="cancel_hold", tenant_id=payer.tenant_id, nth=2)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "fail", code="node_error")
    await patient_platform.until(lambda: _is_cancelled(patient_platform, handle, place=1))
    await patient_platform.until_settled(run)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    await patient_platform.until_hit("cancel_hold", lost)
    await patient_platform.pass_time(run, 700)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.code, ending.charged) == (TaskStatus.FAILED, "node_error", 0)
    credits = ending.result["credits"]
    assert (credits["settlement"], credits["charged"], credits["returned"]) == ("unknown", None, None)
    assert sorted(ending.exceptions) == ["node_error", "settlement_unknown"]


async def test_a_hold_whose_end_the_last_reading_shows_leaves_nothing_unknown(patient_platform: Platform) -> None:
    """Its cancel was refused, and it ended by itself before the reset task did."""
    handle = await stalled(patient_platform, (await new_payer(patient_platform)).image())
    run = await reset_to_its_start(patient_platform, handle, holds=2)
    await refuse_cancels(patient_platform, handle)
    job = await patient_platform.job(run)
    await patient_platform.simulators.admin.comfyui.act(job.run_id, "fail", code="node_error")
    cancels = patient_platform.simulators.admin.credits.requests_seen
    await patient_platform.until(lambda: cancels("cancel_hold", task_id_of(handle)))
    await patient_platform.until_settled(run)
    await end_open_holds(patient_platform, handle)
    await patient_platform.pass_time(run, IN_FLIGHT_SECONDS)
    ending = await ended(patient_platform, run, exempt={"hold_expires"})
    assert (ending.status, ending.code, ending.charged) == (TaskStatus.FAILED, "node_error", 0)
    assert sorted(ending.exceptions) == ["hold_left_to_expiry", "node_error"]
    assert (ending.result["credits"]["settlement"], ending.result["credits"]["charged"]) == ("settled", 0)


@pytest.mark.by_contract("its ledger shows ids")
async def test_of_two_open_holds_that_only_the_ledger_knows_the_newest_is_committed(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform)
    task = payer.image()
    handle = await stalled(patient_platform, task)
    run = await reset_to_its_start(patient_platform, handle, holds=2)
    body = {name: task[name] for name in ("task_id", "template_id")} | {"scene": "image.generate", "currency": "point"}
    for key in ("older", "newest"):
        await payer.post("pre-deduct", key, body | {"estimated_cost": HD, "expire_in": 3_600})
    await delivered(patient_platform, run)
    ending = await ended(patient_platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD)
    phases = [hold.phase for hold in await holds_of(patient_platform, handle)]
    assert phases == ["cancelled", "cancelled", "cancelled", "committed"]
