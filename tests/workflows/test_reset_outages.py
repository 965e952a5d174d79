"""Tasks that are reset while something else goes wrong: the store is away, or they are being given back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowFailureError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.tasks import TaskStatus
from store import TaskStore
from tests.cable import Cable
from tests.workflows.books import Ending, ended, ended_without_its_run, give_back
from tests.workflows.payers import end_open_holds, has_kinds, holds_of, new_payer, refuse_cancels, until_started
from tests.workflows.platform import Handle, Platform, running_platform, sent, task_id_of
from tests.workflows.reset_scenarios import POLICY, RENEWED, stalled, topped_up, work_goes_on
from tests.workflows.resets import point_before, points_of, reset
from tests.workflows.test_settlement import start_reporting
from workflows import row_look


@pytest_asyncio.fixture
async def platform(
    temporal_env: WorkflowEnvironment, postgres_dsn: str, cable: Cable, tmp_path: Path
) -> AsyncIterator[Platform]:
    """A platform whose worker and gateway reach PostgreSQL by `cable`."""
    store = TaskStore(cable.dsn)
    async with running_platform(temporal_env, store, tmp_path, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 1_000.0, **POLICY}
        for gpu_type in ("rtx4090", "a100"):
            await platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
        async with platform.worker():
            yield platform
    await store.close()


# A late call of a run that was reset away


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_late_call_of_a_run_that_was_reset_away_takes_nothing_from_the_newest(
    platform: Platform, kind: str
) -> None:
    """It displaces the newest run in the row. That run asks Temporal, and goes on: charged once, its row ended."""
    payer = await new_payer(platform)
    handle = await stalled(platform, payer.training() if kind == "training" else payer.image())
    points = await points_of(platform, handle)
    run = await reset(platform, handle, points[-1])
    task_id, store = task_id_of(handle), platform.store

    async def acts() -> bool:
        row = await store.task(task_id)
        return row is not None and row.run_id == run.run_id

    first = handle.first_execution_run_id
    assert run.run_id is not None
    await store.register(TaskRun(task_id=task_id, run_id=run.run_id, first_execution_run_id=first))
    await store.register(TaskRun(task_id=task_id, run_id=str(uuid.uuid4()), first_execution_run_id=first))
    assert not await acts()
    async with work_goes_on(platform, run):
        ending = await ended(platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120 if kind == "training" else 24)
    assert await acts()


# The store is away


SHARES = (0.0, 0.4, 0.8, 1.0)
"""The position in the run's whole history of the point that it is reset to."""


@pytest.mark.slow
async def test_an_image_whose_end_is_not_written_is_delivered(platform: Platform, cable: Cable) -> None:
    """The row does not show the commit: it is found in the ledger from any reset point."""
    handles = [await stalled(platform, (await new_payer(platform)).image()) for _ in SHARES]
    for ending in await charged_and_reset(platform, cable, handles, "pre_deduct", "commit"):
        assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
        assert ending.result["result_urls"]


@pytest.mark.slow
async def test_a_training_whose_end_is_not_written_is_delivered(platform: Platform, cable: Cable) -> None:
    """Where it is reset to before its second hold, the first one's commit would be another key's."""
    handles = [await topped_up(platform, await new_payer(platform)) for _ in SHARES]
    for ending in await charged_and_reset(platform, cable, handles, *RENEWED, "commit"):
        assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 360)
        assert ending.result["output"]


async def charged_and_reset(platform: Platform, cable: Cable, handles: list[Handle], *kinds: str) -> list[Ending]:
    """Charge tasks while the store is away, and reset each to another point before it is back."""

    async def charged(handle: Handle, share: float) -> Handle:
        async with work_goes_on(platform, handle):
            await platform.until(lambda: has_kinds(platform, handle, *kinds))
        points = await points_of(platform, handle)
        return await reset(platform, handle, points[round(share * (len(points) - 1))])

    cable.pull()
    runs = await asyncio.gather(*map(charged, handles, SHARES))
    await asyncio.sleep(0.3)
    cable.plug_in()

    async def end(run: Handle) -> Ending:
        async with work_goes_on(platform, run):
            return await ended(platform, run)

    return await asyncio.gather(*(end(run) for run in runs))


@pytest.mark.slow
async def test_a_task_that_is_reset_while_the_store_is_away_is_settled_by_the_ledger_alone(
    platform: Platform, cable: Cable
) -> None:
    """Nothing is started before the store is back; work that had started is still paid for."""
    payer = await new_payer(platform)
    handle = await topped_up(platform, payer)
    cable.pull()
    points = await points_of(platform, handle)
    run = await reset(platform, handle, points[-1])
    async with work_goes_on(platform, run):
        await platform.until(lambda: has_kinds(platform, handle, *RENEWED, "commit"))
        cable.plug_in()
        ending = await ended(platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 360)


async def test_a_run_that_was_reset_begins_nothing_while_the_store_is_away(platform: Platform, cable: Cable) -> None:
    """A cancel takes effect meanwhile."""
    payer = await new_payer(platform)
    handle = await stalled(platform, payer.image())
    [job] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    cable.pull()
    await platform.simulators.admin.comfyui.act(job.run_id, "preempt")
    points = await points_of(platform, handle)
    run = await reset(platform, handle, points[-1])

    async def waits() -> bool:
        pending = (await run.describe()).raw_description.pending_activities
        return any(call.activity_type.name == "submit_job" and call.attempt > 1 for call in pending)

    await platform.until(waits)
    assert len(await platform.simulators.admin.comfyui.jobs(task_id_of(handle))) == 1
    asking = asyncio.create_task(platform.cancel(run))
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", "cancel"))
    cable.plug_in()
    assert await asking == "accepted"
    ending = await ended(platform, run)
    assert ending.status is TaskStatus.CANCELLED


async def test_work_that_costs_nothing_is_not_handed_out_once_the_store_is_back(
    platform: Platform, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the write of the end reaches the store again, and finds the task cancelled by an earlier life."""
    monkeypatch.setattr(row_look, "LOOK_WITHIN", timedelta(seconds=1))
    payer = await new_payer(platform)
    task = payer.image()
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("not_offered", route="cancel_job", tenant_id=payer.tenant_id)
    free: dict[str, Any] = {"fields": {"actual_cost": 0}}
    await comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], at=0, **free)
    handle = await stalled(platform, task)
    waiting = (await points_of(platform, handle))[-1]
    await platform.cancel(handle)
    await handle.result()
    cable.pull()
    run = await reset(platform, handle, waiting, forgets_messages=True)
    async with work_goes_on(platform, run):
        await platform.until(lambda: _has_status(platform, run, TaskStatus.COMPLETED))
        cable.plug_in()
        ending = await ended(platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)
    assert ending.result["result_urls"] == []


async def test_a_hold_whose_end_is_seen_while_the_store_is_away_is_published_as_given_back(
    platform: Platform, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cancel was refused; the last reading of the ledger shows that it ended by itself. The events add up."""
    monkeypatch.setattr(row_look, "LOOK_WITHIN", timedelta(seconds=1))
    handle = await stalled(platform, (await new_payer(platform)).image())
    await refuse_cancels(platform, handle)
    cable.pull()
    await platform.cancel(handle)
    cancels = platform.simulators.admin.credits.requests_seen
    await platform.until(lambda: cancels("cancel_hold", task_id_of(handle)))
    await end_open_holds(platform, handle)
    await platform.until(lambda: _has_status(platform, handle, TaskStatus.CANCELLED))
    cable.plug_in()
    ending = await ended(platform, handle, exempt={"hold_expires"})
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.CANCELLED, 0, ["hold_left_to_expiry"])
    assert (ending.result["credits"]["settlement"], ending.result["credits"]["returned"]) == ("settled", 24)
    assert [event.credits_delta for event in ending.events if event.credits_delta is not None] == [-24, 24]


async def _has_status(platform: Platform, run: Handle, status: TaskStatus) -> bool:
    return bool((await platform.progress(run))["status"] == status)


# It is being given back


@pytest.mark.slow
async def test_a_run_that_is_reset_while_it_is_given_back_begins_nothing(platform: Platform) -> None:
    payer = await new_payer(platform)
    handle = await stalled(platform, payer.image())
    points = await points_of(platform, handle)
    hangs = await platform.simulators.admin.credits.fault(
        "delay", route="cancel_hold", tenant_id=payer.tenant_id, seconds=60, times=None
    )
    await handle.terminate("by a test")
    giving_back = await give_back(platform, handle)
    await platform.until_hit("cancel_hold", hangs)
    run = await reset(platform, handle, points[0])
    with pytest.raises(WorkflowFailureError):
        async with asyncio.timeout(20):
            reset_end = asyncio.ensure_future(run.result())
            await asyncio.sleep(1)
            await platform.simulators.admin.credits.remove_fault(hangs)
            await reset_end
    assert (await giving_back.result())["outcome"] == "given_back"
    ending = await ended(platform, run)
    assert (ending.status, ending.charged, ending.code) == (TaskStatus.FAILED, 0, "internal")
    assert len(await holds_of(platform, handle)) == 1


async def test_a_give_back_stops_where_the_run_was_reset_before_it_could_claim_the_row(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = await new_payer(platform)
    handle = await stalled(platform, payer.image())
    points = await points_of(platform, handle)
    claim, runs = platform.store.claim_give_back, list[Handle]()

    async def claim_late(task_id: str, **order: Any) -> bool:
        if not runs:
            runs.append(await reset(platform, handle, points[0]))
            await platform.until(lambda: _has_other_run(platform, handle))
        return await claim(task_id, **order)

    monkeypatch.setattr(platform.store, "claim_give_back", claim_late)
    await handle.terminate("by a test")
    with pytest.raises(WorkflowFailureError):
        await (await give_back(platform, handle)).result()
    async with work_goes_on(platform, runs[0]):
        ending = await ended(platform, runs[0])
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


async def _has_other_run(platform: Platform, handle: Handle) -> bool:
    row = await platform.store.task(task_id_of(handle))
    return row is not None and row.run_id != handle.first_execution_run_id


async def test_a_reset_run_that_is_terminated_is_given_back_with_all_that_its_lives_made(platform: Platform) -> None:
    payer = await new_payer(platform)
    handle = await topped_up(platform, payer)
    points = await points_of(platform, handle)
    run = await reset(platform, handle, points[0])
    await platform.until(lambda: _has_other_run(platform, handle))
    await run.terminate("by a test")
    assert (await (await give_back(platform, handle)).result())["outcome"] == "given_back"
    row = await platform.store.task(task_id_of(handle))
    assert row is not None and (row.status, row.credits.charged) == (TaskStatus.FAILED, 0)
    assert {hold.phase for hold in await holds_of(platform, handle)} == {"cancelled"}
    assert all(job.is_over for job in await platform.simulators.admin.comfyui.jobs(task_id_of(handle)))


async def test_a_charge_that_a_reset_kept_from_being_sent_is_not_made_by_the_give_back(platform: Platform) -> None:
    """The reset run reads the ledger in its place and sends another, which gets no answer before it is terminated."""
    payer = await new_payer(platform)
    handle = await stalled(platform, payer.image())
    task_id = task_id_of(handle)
    credits, comfyui = platform.simulators.admin.credits, platform.simulators.admin.comfyui
    await end_open_holds(platform, handle)
    lost = await credits.fault("drop", route="charge", task_id=task_id, when="before", times=None)
    await comfyui.act((await platform.job(handle)).run_id, "finish")
    await platform.until_hit("charge", lost)
    run = await reset(platform, handle, await point_before(platform, handle, "charge"))

    async def sent_again() -> bool:
        """The one that is answered `read_the_ledger`, and one after it."""
        return len(await sent(run, "charge")) >= 2

    await platform.until(sent_again)
    await run.terminate("by a test")
    await credits.remove_fault(lost)
    assert (await (await give_back(platform, handle)).result())["outcome"] == "already_charged"
    row = await platform.store.task(task_id)
    assert row is not None and (row.status, row.credits.charged) == (TaskStatus.COMPLETED, 24)
    assert await credits.charged(task_id) == 24


@pytest.mark.parametrize("balance", ["enough", "short"])
async def test_what_an_earlier_life_had_charged_is_not_charged_again_by_the_give_back(
    platform: Platform, balance: str
) -> None:
    """Of 2,460 points 2,000 were charged before the reset; the reset run requests 460, and is terminated."""
    payer = await new_payer(platform)
    credits, comfyui = platform.simulators.admin.credits, platform.simulators.admin.comfyui
    task = payer.training(max_credits=5_000)
    task_id = task["task_id"]
    second = await credits.fault("drop", route="charge", task_id=task_id, when="before", nth=2)
    await comfyui.fault("job_stall", route="create_training", task_id=task_id, at=0.3, times=None)
    handle = await start_reporting(platform, task, gpu_hours=40, gpu_hours_used=40)
    job = await until_started(platform, handle)
    await comfyui.act(job.run_id, "lie", fields={"gpu_hours": 40, "gpu_hours_used": 40})
    await end_open_holds(platform, handle)
    async with work_goes_on(platform, handle):
        await platform.until_hit("charge", second)
    lost = await credits.fault("drop", route="charge", task_id=task_id, when="before", times=None)
    run = await reset(platform, handle, await point_before(platform, handle, "charge"))

    async def asks_for_the_rest() -> bool:
        return len(await sent(run, "charge")) >= 2

    await platform.until(asks_for_the_rest)
    if balance == "short":
        await payer.has(100)
    await run.terminate("by a test")
    await credits.remove_fault(lost)
    assert (await (await give_back(platform, handle)).result())["outcome"] == "already_charged"
    ending = await ended_without_its_run(platform, task_id)
    charged = 2_460 if balance == "enough" else 2_000
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, charged)
    assert ending.result["credits"]["shortfall"] == 2_460 - charged
