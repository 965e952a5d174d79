"""Jobs that a run requested, without an answer, before it was reset: no row names them, and they do not run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment

from activities import earlier_runs
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from comfyui_temporal.contracts.tasks import CANCEL_SIGNAL, CancelTask, TaskStatus
from proof.simulators.credits_profile import FIELD
from store import TaskStore
from tests.cable import Cable
from tests.workflows.books import ended, ended_without_its_run, give_back
from tests.workflows.payers import holds_of, new_payer
from tests.workflows.platform import Handle, Platform, answered, running_platform, scheduled, task_id_of
from tests.workflows.reset_scenarios import POLICY, stalled, until_working
from tests.workflows.resets import Point, point_before, points_of, reset
from workflows import earlier_life, forgotten_jobs, row_look
from workflows import give_back as give_back_flow

ROUTES = {"image": "submit_job", "training": "create_training"}


@pytest_asyncio.fixture
async def platform(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Platform]:
    async with running_platform(temporal_env, task_store, tmp_path, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 1_000.0, **POLICY}
        yield platform


async def unanswered(platform: Platform, kind: str) -> Handle:
    """A task whose job works, and does not end by itself; the run has no answer to its request."""
    payer, comfyui = await new_payer(platform), platform.simulators.admin.comfyui
    task = payer.image() if kind == "image" else payer.training()
    await comfyui.fault("job_stall", route=ROUTES[kind], task_id=task["task_id"], at=0.3, times=None)
    await comfyui.fault("drop", route=ROUTES[kind], task_id=task["task_id"], times=None)
    handle = await platform.start(task)
    await platform.until(lambda: jobs_of(platform, handle))
    return handle


async def jobs_of(platform: Platform, handle: Handle) -> list[tuple[str, bool]]:
    """Job → whether it is over."""
    runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    return [(run.run_id, run.is_over) for run in runs]


async def answer_again(platform: Platform) -> None:
    await platform.simulators.admin.comfyui.remove_faults()


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_run_that_is_cancelled_once_reset_cancels_the_job_of_the_run_before(
    platform: Platform, kind: str
) -> None:
    async with platform.worker():
        handle = await unanswered(platform, kind)
        await handle.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
        run = await reset(platform, handle, (await points_of(platform, handle))[0])
        await answer_again(platform)
        ending = await ended(platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)
    [(_, is_over)] = await jobs_of(platform, handle)
    assert is_over


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_give_back_cancels_the_job_of_a_run_before_the_last_one(platform: Platform, kind: str) -> None:
    """It deletes the dataset's copy of that run too: the last run's history has no call that made it."""
    async with platform.worker():
        handle = await unanswered(platform, kind)
        point = (await points_of(platform, handle))[0]
    run = await reset(platform, handle, point)
    await run.terminate()
    await answer_again(platform)
    async with platform.worker():
        await platform.client.execute_workflow(
            GIVE_BACK_WORKFLOW,
            GiveBackOrder(task_id=task_id_of(handle)),
            id=give_back_id_of(task_id_of(handle)),
            task_queue=platform.task_queue,
        )
        await ended_without_its_run(platform, task_id_of(handle))
    [(_, is_over)] = await jobs_of(platform, handle)
    assert is_over


async def test_a_give_back_reads_a_run_that_had_looked_for_the_jobs_of_the_run_before(platform: Platform) -> None:
    """The reset run was cancelled, and terminated while it tried to cancel the job of the run before."""
    async with platform.worker():
        handle = await unanswered(platform, "image")
        await handle.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
        run = await reset(platform, handle, (await points_of(platform, handle))[0])
        await answer_again(platform)
        task_id = task_id_of(handle)
        hangs = await platform.simulators.admin.comfyui.fault("drop", route="cancel_job", task_id=task_id, times=None)
        await platform.until_hit("cancel_job", hangs)
        assert await scheduled(run, "unanswered_jobs")
        await run.terminate()
        await answer_again(platform)
        await asyncio.wait_for((await give_back(platform, handle)).result(), 30)
        await ended_without_its_run(platform, task_id)
    assert [is_over for _, is_over in await jobs_of(platform, handle)] == [True]


async def under_another_body(platform: Platform) -> Handle:
    """A run whose two jobs work: the first one was requested, without an answer, before a reset; the key of that job
    was then refused to it, because a worker with other settings sent another body."""
    handle = await unanswered(platform, "image")
    point = (await points_of(platform, handle))[0]
    await answer_again(platform)
    task_id = task_id_of(handle)
    await platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task_id, at=0.3, times=None)
    platform.policy["callback_url"] = f"https://other.example/callbacks/comfyui/{task_id}"
    run = await reset(platform, handle, point)

    async def has_its_own() -> bool:
        return len(await jobs_of(platform, handle)) == 2

    await platform.until(has_its_own)
    return run


async def test_a_give_back_cancels_a_job_whose_key_was_refused_to_the_last_run(platform: Platform) -> None:
    async with platform.worker():
        run = await under_another_body(platform)
        await platform.until(lambda: knows_its_job(platform, run))
    await run.terminate()
    task_id = task_id_of(run)
    async with platform.worker():
        await platform.client.execute_workflow(
            GIVE_BACK_WORKFLOW,
            GiveBackOrder(task_id=task_id),
            id=give_back_id_of(task_id),
            task_queue=platform.task_queue,
        )
        await ended_without_its_run(platform, task_id)
    assert [is_over for _, is_over in await jobs_of(platform, run)] == [True, True]


async def test_a_give_back_cancels_an_unanswered_job_beside_one_that_only_the_row_knows(platform: Platform) -> None:
    """The run was reset twice, and terminated before any call: its history names neither job. The row has no keys."""
    async with platform.worker():
        run = await under_another_body(platform)
        await platform.until(lambda: knows_its_job(platform, run))
    last = await reset(platform, run, (await points_of(platform, run))[0])
    await last.terminate()
    async with platform.worker():
        await (await give_back(platform, run)).result()
        await ended_without_its_run(platform, task_id_of(run))
    assert [is_over for _, is_over in await jobs_of(platform, run)] == [True, True]


async def test_a_run_that_was_reset_twice_cancels_a_job_whose_key_was_refused_between(platform: Platform) -> None:
    async with platform.worker():
        run = await under_another_body(platform)
        await platform.until(lambda: knows_its_job(platform, run))
        last = await reset(platform, run, (await points_of(platform, run))[0])
        await last.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
        assert (await ended(platform, last)).status is TaskStatus.CANCELLED
    assert [is_over for _, is_over in await jobs_of(platform, run)] == [True, True]


async def unanswered_under_another_body(platform: Platform, handle: Handle, point: Point, *, bodies: int) -> Handle:
    """The run that a reset leaves, once it has sent the same key with another body: it has no answer either.

    `bodies`: how many different ones the task has sent by then.
    """
    platform.policy["callback_url"] = f"https://settings-{bodies}.example/callbacks/comfyui/{task_id_of(handle)}"
    run = await reset(platform, handle, point)

    async def has_sent() -> bool:
        seen = await platform.simulators.admin.comfyui.requests_seen("submit_job", task_id_of(handle))
        return len({request.body_sha256 for request in seen}) == bodies

    await platform.until(has_sent)
    return run


@pytest.mark.parametrize("is_reset_twice", [False, True], ids=["reset once", "reset twice"])
@pytest.mark.parametrize("is_terminated", [False, True], ids=["cancelled", "terminated"])
async def test_a_job_is_cancelled_whose_key_later_runs_sent_with_other_bodies_and_no_answer(
    platform: Platform, *, is_terminated: bool, is_reset_twice: bool
) -> None:
    async with platform.worker():
        handle = await unanswered(platform, "image")
        point = (await points_of(platform, handle))[0]
        run = await unanswered_under_another_body(platform, handle, point, bodies=2)
        if is_reset_twice:
            run = await unanswered_under_another_body(platform, handle, point, bodies=3)
        if is_terminated:
            await run.terminate()
            await answer_again(platform)
            await asyncio.wait_for((await give_back(platform, handle)).result(), 60)
            await ended_without_its_run(platform, task_id_of(handle))
        else:
            await run.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
            await answer_again(platform)
            ending = await ended(platform, run)
            assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.CANCELLED, 0, [])
    assert [is_over for _, is_over in await jobs_of(platform, handle)] == [True]


async def test_a_give_back_cancels_a_job_that_a_run_had_learned_beside_a_body_that_was_refused(
    platform: Platform,
) -> None:
    """The last run repeated both requests under one key. It was terminated before the job's cancel took effect."""
    comfyui = platform.simulators.admin.comfyui
    async with platform.worker():
        handle = await unanswered(platform, "image")
        point = (await points_of(platform, handle))[0]
        second = await unanswered_under_another_body(platform, handle, point, bodies=2)
        await second.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
        last = await reset(platform, second, (await points_of(platform, second))[0])
        task_id = task_id_of(handle)
        hangs = await comfyui.fault("drop", route="cancel_job", task_id=task_id, when="before", times=None)
        for fault in await comfyui.faults():
            if fault.kind == "drop" and fault.fault_id != hangs.fault_id:
                await comfyui.remove_fault(fault)
        await platform.until_hit("cancel_job", hangs)

        async def has_both_answers() -> bool:
            return await answered(last, "submit_job") == 2

        await platform.until(has_both_answers)
        await last.terminate()
        await answer_again(platform)
        await asyncio.wait_for((await give_back(platform, handle)).result(), 60)
        await ended_without_its_run(platform, task_id)
    assert [is_over for _, is_over in await jobs_of(platform, handle)] == [True]


# Many runs before the reset


async def test_a_hold_of_before_a_reset_is_given_back_while_its_history_cannot_be_read(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_readable, left_by = asyncio.Event(), earlier_runs._left_by

    async def read_later(*order: Any) -> Any:
        await is_readable.wait()
        return await left_by(*order)

    async def is_given_back() -> bool:
        return [hold.phase for hold in await holds_of(platform, handle)] == ["cancelled"]

    monkeypatch.setattr(earlier_runs, "_left_by", read_later)
    async with platform.worker():
        handle = await stalled(platform, (await new_payer(platform)).image())
        first = (await points_of(platform, handle))[0]
    await handle.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
    run = await reset(platform, handle, first)
    async with platform.worker():
        await platform.until(is_given_back)
        assert (await run.describe()).status is WorkflowExecutionStatus.RUNNING
        is_readable.set()
        ending = await ended(platform, run)
    assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)


@pytest.fixture
def reads_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt to read a task's runs has the time for two of them."""
    within = timedelta(seconds=5)  # the SDK holds a heartbeat back for 1.6 s

    async def read_slowly(*order: Any) -> Any:
        await asyncio.sleep(0.4 * within.total_seconds())
        return await left_by(*order)

    left_by = earlier_runs._left_by
    monkeypatch.setattr(earlier_runs, "_left_by", read_slowly)
    monkeypatch.setattr(forgotten_jobs, "READ_WITHIN", within)
    monkeypatch.setattr(give_back_flow, "STORE_TIMEOUT", within)


async def shows_minutes(platform: Platform, handle: Handle, minutes: float) -> bool:
    row = await platform.store.task(task_id_of(handle))
    return row is not None and row.estimated_time == minutes


@pytest.mark.slow
@pytest.mark.usefixtures("reads_slowly")
@pytest.mark.parametrize("is_terminated", [False, True], ids=["cancelled", "terminated"])
async def test_a_task_of_many_runs_ends_after_a_reset(platform: Platform, *, is_terminated: bool) -> None:
    """Weeks of a training are hundreds of runs: more than one attempt has the time to read."""
    platform.policy["continue_as_new_signals"] = 2
    async with platform.worker():
        handle = await stalled(platform, (await new_payer(platform)).image())
        first, job = (await points_of(platform, handle))[0], (await platform.job(handle)).run_id
        latest: Handle = platform.client.get_workflow_handle(handle.id)
        for n in range(100, 108):
            news = {"job_id": job, "job_status": "processing", "sequence": n, "estimated_time": n}
            await platform.callback(latest, **news)
            await platform.until(partial(shows_minutes, platform, handle, n))
        run = await reset(platform, handle, first, forgets_messages=True)
        await until_working(platform, handle, jobs=1)
        assert len(await platform.store.earlier_runs(task_id_of(handle))) >= 4
        if is_terminated:
            await run.terminate()
            await asyncio.wait_for((await give_back(platform, handle)).result(), 90)
            await ended_without_its_run(platform, task_id_of(handle))
        else:
            await run.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
            ending = await asyncio.wait_for(ended(platform, run), 90)
            assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)
    assert [is_over for _, is_over in await jobs_of(platform, handle)] == [True]


@pytest_asyncio.fixture
async def cut_off(
    temporal_env: WorkflowEnvironment, cable: Cable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Platform]:
    """A platform whose workers and gateway reach PostgreSQL by `cable`."""
    monkeypatch.setattr(row_look, "LOOK_WITHIN", timedelta(seconds=1))
    store = TaskStore(cable.dsn)
    async with running_platform(temporal_env, store, tmp_path, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 1_000.0, **POLICY}
        yield platform
    await store.close()


async def test_a_job_that_only_the_row_knows_is_cancelled_once_the_store_is_back(
    cut_off: Platform, cable: Cable
) -> None:
    """The run ends by a cancel before it has begun anything: no call has reported that it was reset."""
    async with cut_off.worker():
        handle = await second_attempt(cut_off)
    before_second = await last_point_before(cut_off, handle, "submit_job")
    await handle.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
    cable.pull()
    run = await reset(cut_off, handle, before_second)
    async with cut_off.worker():

        async def is_cancelled() -> bool:
            return bool((await cut_off.progress(run))["status"] == TaskStatus.CANCELLED)

        await cut_off.until(is_cancelled)
        assert [is_over for _, is_over in await jobs_of(cut_off, run)] == [True, False]
        cable.plug_in()
        assert (await ended(cut_off, run)).status is TaskStatus.CANCELLED
    assert [is_over for _, is_over in await jobs_of(cut_off, run)] == [True, True]


async def test_a_training_of_the_run_before_is_cancelled_before_its_files_are_deleted(
    cut_off: Platform, cable: Cable
) -> None:
    """Its id is learned by the same request as before, with the list of files, once the store is back."""
    async with cut_off.worker():
        handle = await unanswered(cut_off, "training")
    before_create = await point_before(cut_off, handle, "create_training")
    await handle.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
    cable.pull()
    run = await reset(cut_off, handle, before_create)
    await answer_again(cut_off)
    async with cut_off.worker():

        async def is_cancelled() -> bool:
            return bool((await cut_off.progress(run))["status"] == TaskStatus.CANCELLED)

        await cut_off.until(is_cancelled)
        cable.plug_in()
        ending = await asyncio.wait_for(ended(cut_off, run), 60)
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [])
    assert [is_over for _, is_over in await jobs_of(cut_off, run)] == [True]
    assert cut_off.snapshot_files(task_id_of(run)) == []


async def second_attempt(platform: Platform) -> Handle:
    """An image whose first job was preempted; the second is worked on under the same hold, and does not end."""
    task, comfyui = (await new_payer(platform)).image(), platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    await comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], nth=2, at=0.3, times=None)
    handle = await platform.start(task)
    await until_working(platform, handle, jobs=2)
    return handle


async def last_point_before(platform: Platform, handle: Handle, call: str) -> Point:
    """The last workflow task that had not yet made the newest of these calls."""
    made = [
        event.event_id
        async for event in handle.fetch_history_events()
        if event.activity_task_scheduled_event_attributes.activity_type.name == call
    ]
    # The task that made the call has completed just before it.
    return [point for point in await points_of(platform, handle) if point.event_id < made[-1]][-2]


async def knows_its_job(platform: Platform, run: Handle) -> bool:
    row = await platform.store.task(task_id_of(run))
    return row is not None and row.job_id is not None


async def test_a_run_that_is_reset_to_before_its_hold_requests_none_once_the_task_has_ended(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> None:
    """A service without idempotency would take another hold for the same request."""
    running = running_platform(temporal_env, task_store, tmp_path, speed=2_000, credits_profile=FIELD)
    async with running as platform, platform.worker():
        payer = await new_payer(platform)
        handle = await platform.start(payer.image())
        await ended(platform, handle)
        for point in await points_of(platform, handle):
            run = await reset(platform, handle, point)
            assert (await ended(platform, run)).status is TaskStatus.COMPLETED, point
        assert len(await holds_of(platform, handle)) == 1


# Keys that no earlier life can have used


TAKEN = {"detail": {"code": "40901", "message": "idempotency_conflict"}}


@pytest.mark.parametrize(
    ("route", "is_taken"),
    [("submit_job", True), ("pre_deduct", True), ("pre_deduct", False)],
    ids=["each job's key is taken", "each hold's key is taken", "each hold is the first one"],
)
async def test_a_service_that_calls_every_key_taken_ends_a_reset_task(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, route: str, is_taken: bool
) -> None:
    """The run tried one number after another, without end or pause, until its history was full."""
    monkeypatch.setattr(earlier_life, "MOST_KEYS_TAKEN", 5)
    async with platform.worker():
        handle = await stalled(platform, (await new_payer(platform)).image())
        [hold] = await holds_of(platform, handle)
        granted = {
            "pre_deduct_id": hold.pre_deduct_id,
            "frozen_amount": hold.amount,
            "balance_after": 1_000,
            "quota_snapshot": {"template_quota": -1, "user_usage": 0},
            "expire_at": "2100-01-01T00:00:00Z",
        }
        status, body = (409, TAKEN) if is_taken else (200, granted)
        service, task_id = platform.service_of(route), task_id_of(handle)
        await service.fault("answer", route=route, task_id=task_id, times=None, status=status, body=body)
        run = await reset(platform, handle, await point_before(platform, handle, route))
        ending = await asyncio.wait_for(ended(platform, run), 60)
    assert (ending.status, ending.code, ending.charged) == (TaskStatus.FAILED, "task_conflict", 0)
    assert len(await scheduled(run, route)) <= 10
    [hold] = await holds_of(platform, handle)
    assert hold.phase == "cancelled"
    [(_, is_over)] = await jobs_of(platform, handle)
    assert is_over
