"""Processes killed during a run: the ledger balances, nothing is lost, and work goes on within 5 s (invariant 5)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.api.enums.v1 import EventType as HistoryEvent
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.plugin import TasksPlugin
from proof.simulators.credits_profile import CreditsProfile
from proof.site.parts import OwnStack
from store import TaskStore
from tests.cable import Cable
from tests.conftest import NewDatabase
from tests.workflows.books import Ending, ended
from tests.workflows.platform import Handle, Platform, running_platform
from tests.workflows.processes import WorkerProcess

GOES_ON_WITHIN_SECONDS = 5.0
HANG_SECONDS = 30.0
TASK_TIMEOUT = timedelta(seconds=3)
"""As `starter.py` starts tasks: another worker takes over a killed worker's run after this time."""
IMAGE_CALLS = ["submit_job", "estimate", "pre_deduct", "commit"]
TRAINING_CALLS = ["create_training", "estimate", "pre_deduct", "start_training", "commit"]


@pytest_asyncio.fixture
async def bare_platform(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path, credits_profile: CreditsProfile
) -> AsyncIterator[Platform]:
    """A platform without a worker."""
    running = running_platform(temporal_env, task_store, tmp_path, credits_profile=credits_profile)
    async with running as platform:
        yield platform


@pytest_asyncio.fixture
async def worker(bare_platform: Platform, postgres_dsn: str) -> AsyncIterator[WorkerProcess]:
    """A worker process on `bare_platform`, already polling."""
    address = bare_platform.client.service_client.config.target_host
    worker = WorkerProcess(bare_platform, address, postgres_dsn)
    await worker.start()
    yield worker
    await worker.kill()


async def start_hanging(platform: Platform, route: str, when: str, *, is_training: bool) -> Handle:
    """Start a task whose calls of `route` get no answer, and wait until the first one is out."""
    task = platform.training() if is_training else platform.image()
    on_credits = route in ("estimate", "pre_deduct", "commit", "cancel_hold")
    service = platform.simulators.admin.credits if on_credits else platform.simulators.admin.comfyui
    fault = await service.fault(
        "delay", route=route, seconds=HANG_SECONDS, when=when, task_id=task["task_id"], times=None
    )
    handle = await platform.start(task, task_timeout=TASK_TIMEOUT)

    async def is_out() -> bool:
        return any(known.fault_id == fault.fault_id and known.hits for known in await service.faults())

    await platform.until(is_out, seconds=30)
    return handle


async def first_activity_after(handle: Handle, time: datetime) -> datetime | None:
    """When a call was started again, or its answer recorded, after `time`."""
    description = await handle.describe()
    begun = [
        pending.last_started_time.ToDatetime(tzinfo=UTC)
        for pending in description.raw_description.pending_activities
        if pending.HasField("last_started_time")
    ]
    ended_calls = [
        event.event_time.ToDatetime(tzinfo=UTC)
        async for event in handle.fetch_history_events()
        if event.event_type
        in (HistoryEvent.EVENT_TYPE_ACTIVITY_TASK_COMPLETED, HistoryEvent.EVENT_TYPE_MARKER_RECORDED)
    ]
    return min((at for at in begun + ended_calls if at > time), default=None)


async def kill_and_restart(worker: WorkerProcess, platform: Platform, handles: list[Handle]) -> None:
    """Kill the worker, repair the network, restart it, and assert that each task's work goes on in time."""
    await worker.kill()
    await platform.simulators.admin.remove_faults()
    await worker.start()
    restarted = datetime.now(UTC)

    async def all_go_on() -> bool:
        return all([await first_activity_after(handle, restarted) is not None for handle in handles])

    await platform.until(all_go_on, seconds=30)
    for handle in handles:
        sign = await first_activity_after(handle, restarted)
        assert sign is not None
        late = (sign - restarted).total_seconds()
        assert late <= GOES_ON_WITHIN_SECONDS, (handle.id, late)


async def all_ended(platform: Platform, handles: list[Handle]) -> list[Ending]:
    return [await ended(platform, handle) for handle in handles]


async def test_a_worker_killed_in_each_call_of_an_image_charges_once(
    bare_platform: Platform, worker: WorkerProcess
) -> None:
    handles = await asyncio.gather(
        *(
            start_hanging(bare_platform, route, when, is_training=False)
            for route in IMAGE_CALLS
            for when in ("before", "after")
        )
    )
    await kill_and_restart(worker, bare_platform, handles)
    for ending in await all_ended(bare_platform, handles):
        assert ending.status is TaskStatus.COMPLETED
        assert ending.charged == 24
        assert ending.result["attempts"] == 1


@pytest.mark.slow
async def test_a_worker_killed_in_each_call_of_a_training_charges_once(
    bare_platform: Platform, worker: WorkerProcess
) -> None:
    await bare_platform.simulators.admin.comfyui.set_gpus("a100", 2 * len(TRAINING_CALLS))
    handles = await asyncio.gather(
        *(
            start_hanging(bare_platform, route, when, is_training=True)
            for route in TRAINING_CALLS
            for when in ("before", "after")
        )
    )
    await kill_and_restart(worker, bare_platform, handles)
    for ending in await all_ended(bare_platform, handles):
        assert ending.status is TaskStatus.COMPLETED
        assert ending.result["attempts"] == 1


@pytest.mark.slow
async def test_a_worker_killed_while_it_gives_back_gives_everything_back(
    bare_platform: Platform, worker: WorkerProcess
) -> None:
    async def cancelled_and_hanging(route: str, when: str) -> Handle:
        task = bare_platform.image()
        on_credits = route == "cancel_hold"
        service = bare_platform.simulators.admin.credits if on_credits else bare_platform.simulators.admin.comfyui
        await bare_platform.simulators.admin.comfyui.fault("job_stall", task_id=task["task_id"], at=0.5)
        await service.fault(
            "delay",
            route=route,
            seconds=HANG_SECONDS,
            when=when,
            task_id=task["task_id"] if on_credits else None,
            times=None,
        )
        handle = await bare_platform.start(task, task_timeout=TASK_TIMEOUT)
        await bare_platform.until_held(task["task_id"])
        await handle.cancel()
        return handle

    handles = [
        await cancelled_and_hanging(route, when)
        for route in ("cancel_hold", "cancel_job")
        for when in ("before", "after")
    ]
    await kill_and_restart(worker, bare_platform, handles)
    for ending in await all_ended(bare_platform, handles):
        assert ending.status is TaskStatus.CANCELLED


@pytest.mark.slow
async def test_what_happens_while_the_worker_is_dead_counts_when_it_is_back(
    bare_platform: Platform, worker: WorkerProcess
) -> None:
    """A kill in a call, then a cancel, a delivery or dearer GPU hours before the restart."""
    platform = bare_platform
    await platform.simulators.admin.comfyui.fault("job_stall", at=0.1, times=4)
    cancelled = await start_hanging(platform, "pre_deduct", "after", is_training=False)
    submitted = await start_hanging(platform, "submit_job", "after", is_training=False)
    delivered = await start_hanging(platform, "pre_deduct", "before", is_training=False)
    dearer = await start_hanging(platform, "start_training", "after", is_training=True)
    await worker.kill()
    await platform.simulators.admin.remove_faults()
    await cancelled.cancel()
    await submitted.cancel()
    [job] = await platform.simulators.admin.comfyui.jobs(delivered.id.removeprefix("task-"))
    await platform.simulators.admin.comfyui.act(job.run_id, "finish")
    [training] = await platform.simulators.admin.comfyui.jobs(dearer.id.removeprefix("task-"))
    await platform.simulators.admin.comfyui.act(training.run_id, "gpu_hours", gpu_hours=3.0)
    await worker.start()
    await platform.until_held(dearer.id.removeprefix("task-"), points=120 + 2 * 60)
    await platform.simulators.admin.comfyui.act(training.run_id, "finish")
    endings = await all_ended(platform, [cancelled, submitted, delivered, dearer])
    assert [ending.status for ending in endings] == [
        TaskStatus.CANCELLED,
        TaskStatus.CANCELLED,
        TaskStatus.COMPLETED,
        TaskStatus.COMPLETED,
    ]
    assert endings[3].charged == 120 + 2 * 60


@pytest.mark.slow
async def test_a_worker_stopped_during_a_submit_leaves_the_same_job(
    bare_platform: Platform, worker: WorkerProcess
) -> None:
    task = bare_platform.image()
    await bare_platform.simulators.admin.comfyui.fault("delay", route="submit_job", seconds=2.0, when="after")
    handle = await bare_platform.start(task)
    await bare_platform.until(lambda: bare_platform.simulators.admin.comfyui.jobs(task["task_id"]))
    assert await worker.terminate() == 0
    await worker.start()
    ending = await ended(bare_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert len(await bare_platform.simulators.admin.comfyui.jobs(task["task_id"])) == 1


@pytest.mark.slow
async def test_a_temporal_server_killed_and_started_on_its_file_loses_no_task(
    temporal_env: WorkflowEnvironment, new_database: NewDatabase, tmp_path: Path
) -> None:
    stack, dsn = OwnStack(tmp_path), await new_database()
    task_store = TaskStore(dsn)
    async with stack.running(servers=("temporal",)) as described:
        client = await Client.connect(described.temporal_address, plugins=[TasksPlugin()])
        async with running_platform(temporal_env, task_store, tmp_path, client=client) as platform:
            worker = WorkerProcess(platform, described.temporal_address, dsn)
            await worker.start()
            handles = [await platform.start_image(), await platform.start_training()]
            await asyncio.gather(*(platform.until_held(handle.id.removeprefix("task-")) for handle in handles))
            await stack.kill("temporal")
            await stack.start("temporal")
            endings = await all_ended(platform, handles)
            await worker.kill()
    await task_store.close()
    assert [ending.status for ending in endings] == [TaskStatus.COMPLETED, TaskStatus.COMPLETED]


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["pull", pytest.param("hang", marks=pytest.mark.slow)])
async def test_postgresql_away_in_mid_task_costs_no_money_and_no_event(
    temporal_env: WorkflowEnvironment, cable: Cable, tmp_path: Path, outage: str
) -> None:
    """Money settles in time while the store is away; its events follow in order once it is back."""
    store = TaskStore(cable.dsn)
    async with running_platform(temporal_env, store, tmp_path) as platform, platform.worker():
        handle = await platform.start_image()
        await platform.until_held(handle.id.removeprefix("task-"))
        getattr(cable, outage)()
        await platform.until(lambda: is_committed(platform, handle))
        assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING
        cable.plug_in()
        ending = await ended(platform, handle)
    await store.close()
    assert ending.status is TaskStatus.COMPLETED
    assert [event.stage for event in ending.events if event.stage] == sorted(
        (event.stage for event in ending.events if event.stage), key=["queued", "processing", "delivery"].index
    )


async def is_committed(platform: Platform, handle: Handle) -> bool:
    holds = await platform.simulators.admin.credits.holds(handle.id.removeprefix("task-"))
    return any(hold.phase == "committed" for hold in holds)
