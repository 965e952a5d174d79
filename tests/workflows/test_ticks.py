"""Ticks take the short way (decision 4): the store has them, the workflow is not signalled and does not poll."""

from __future__ import annotations

from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType as HistoryEventType

from comfyui_temporal.contracts.comfyui import JobCallback
from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, TaskStatus
from comfyui_temporal.contracts.ticks import Tick, TickVerdict
from tests.workflows.books import ended, runs_of
from tests.workflows.platform import Handle, Platform, scheduled, task_id_of
from tests.workflows.resets import points_of, reset

pytestmark = pytest.mark.usefixtures("short_way")
SIGNALED = HistoryEventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED


async def started_job(platform: Platform) -> Handle:
    """An image task whose job has reported that it works, and goes on only as the test says."""
    await platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", while_queued=True)
    handle = await platform.start_waiting_image()
    await report(platform, handle, stage_progress=1.0)
    await platform.until_stage(handle, "processing")
    await platform.until_settled(handle)
    return handle


async def report(platform: Platform, handle: Handle, **fields: Any) -> None:
    """The job changes so, and calls back. A stalled job would announce more time in each report."""
    changed = {"job_status": "processing", "estimated_time": 5.0, **fields}
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "lie", fields=changed)


async def shown(platform: Platform, handle: Handle, progress: float) -> None:
    """Wait until the task's row shows this progress."""

    async def reached() -> bool:
        row = await platform.store.task(task_id_of(handle))
        return row is not None and row.progress == progress

    await platform.until(reached)


async def heard(platform: Platform, handle: Handle, progress: float) -> None:
    """Wait until the run has taken this progress over from the store, and nothing more happens in it."""

    async def taken() -> bool:
        return bool((await platform.progress(handle))["progress"] == progress)

    await platform.until(taken)
    await platform.until_settled(handle)


async def signals(handle: Handle) -> int:
    return len([event async for event in handle.fetch_history_events() if event.event_type == SIGNALED])


async def test_ticks_reach_the_store_and_leave_no_trace_in_the_history(platform: Platform) -> None:
    handle = await started_job(platform)
    before = (await handle.describe()).history_length
    for progress in (20.0, 30.0, 40.0):
        await report(platform, handle, stage_progress=progress)
        await shown(platform, handle, progress)

    assert (await handle.describe()).history_length == before
    events = await platform.store.events(task_id_of(handle))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.progress for event in events if event.stage == "processing"][-3:] == [20.0, 30.0, 40.0]

    await platform.cancel(handle)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)
    assert [event.seq for event in ending.events] == list(range(1, len(ending.events) + 1))


async def test_what_is_no_tick_is_a_signal_and_ends_older_ones(platform: Platform) -> None:
    handle = await started_job(platform)
    await report(platform, handle, stage_progress=20.0)
    await shown(platform, handle, 20.0)
    before = await signals(handle)
    await report(platform, handle, stage_progress=21.0, estimated_time=77.0)

    async def known() -> bool:
        return bool((await platform.progress(handle))["estimated_time"] == 77.0)

    await platform.until(known)
    assert await signals(handle) == before + 1


async def test_a_new_estimate_alone_reaches_the_row(platform: Platform) -> None:
    """Otherwise the row would not know what the workflow took, and the job's next figures would be no ticks."""
    handle = await started_job(platform)
    task_id, job_id = task_id_of(handle), (await platform.job(handle)).run_id
    same = {"job_id": job_id, "job_status": "processing", "stage_progress": 10.0}
    await handle.signal(CALLBACK_SIGNAL, {**same, "sequence": 1_000, "estimated_time": 5.0})
    await shown(platform, handle, 10.0)
    changed = {**same, "sequence": 1_001, "estimated_time": 9.0, "gpu_slots": 2}
    await handle.signal(CALLBACK_SIGNAL, changed)

    async def known() -> bool:
        row = await platform.store.task(task_id)
        return row is not None and (row.estimated_time, row.gpu_slots) == (9.0, 2)

    await platform.until(known)
    update = JobUpdate.of_job(JobCallback.model_validate({**changed, "task_id": task_id, "sequence": 1_002}))
    answer = (await platform.store.write_ticks([Tick.of(task_id, update)]))[task_id]
    assert answer.verdict in (TickVerdict.WRITTEN, TickVerdict.TOO_EARLY)


async def test_a_job_that_ticks_is_not_polled_and_one_that_falls_silent_is(slow_platform: Platform) -> None:
    handle = await started_job(slow_platform)
    await report(slow_platform, handle, stage_progress=30.0)
    await shown(slow_platform, handle, 30.0)
    await slow_platform.pass_time(handle, 31)
    await heard(slow_platform, handle, 30.0)
    assert await scheduled(handle, "get_job") == []
    for progress in (31.0, 32.0, 33.0, 34.0, 35.0, 36.0):
        await report(slow_platform, handle, stage_progress=progress)
        await shown(slow_platform, handle, progress)
        await slow_platform.pass_time(handle, 31)
        await slow_platform.until_settled(handle)
    assert await scheduled(handle, "get_job") == []

    await slow_platform.pass_time(handle, 125)

    async def polled() -> bool:
        return bool(await scheduled(handle, "get_job"))

    await slow_platform.until(polled)


async def test_a_job_that_ticks_is_not_polled_after_its_run_continued_as_new(slow_platform: Platform) -> None:
    """Twice, and nothing that these runs do is written."""
    slow_platform.policy = {**slow_platform.policy, "continue_as_new_signals": 8}
    handle = await started_job(slow_platform)
    job_id = (await slow_platform.job(handle)).run_id
    await report(slow_platform, handle, stage_progress=30.0)
    await shown(slow_platform, handle, 30.0)
    for runs, progress in ((2, 31.0), (3, 32.0)):
        for _ in range(8):
            if len(await runs_of(slow_platform, handle)) < runs:
                await slow_platform.callback(handle, job_id=job_id, job_status="processing", sequence=0)
                await slow_platform.until_settled(handle)
        assert len(await runs_of(slow_platform, handle)) == runs
        await report(slow_platform, handle, stage_progress=progress)
        await shown(slow_platform, handle, progress)
        await slow_platform.pass_time(handle, 31)
        await slow_platform.until_settled(handle)
        assert (await slow_platform.progress(handle))["progress"] == progress
        assert await scheduled(handle, "get_job") == []


async def test_a_run_that_was_reset_learns_again_of_a_delivery_that_a_poll_had_brought(platform: Platform) -> None:
    """The row knows the delivery's sequence by the earlier life: that hides no later poll from the new run."""
    platform.policy = {"poll_after_seconds": 2.0, "poll_at_most_seconds": 2.0}
    admin = platform.simulators.admin
    handle = await started_job(platform)
    task_id = task_id_of(handle)
    await report(platform, handle, stage_progress=30.0)
    await shown(platform, handle, 30.0)
    before = (await points_of(platform, handle))[-1]
    await admin.comfyui.fault("callback_withhold", task_id=task_id, times=None)
    away = await admin.credits.fault("rate_limit", route="commit", task_id=task_id, seconds=1, times=None)
    await report(platform, handle, job_status="delivery", stage_progress=100.0)
    await admin.comfyui.act((await platform.job(handle)).run_id, "finish")

    async def delivered() -> bool:
        row = await platform.store.task(task_id)
        return row is not None and row.stage == "delivery"

    await platform.until(delivered)

    handle = await reset(platform, handle, before, forgets_messages=True)
    await admin.credits.remove_fault(away)

    async def over() -> bool:
        row = await platform.store.task(task_id)
        return row is not None and row.ended_at is not None

    await platform.until(over)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


async def test_a_job_that_was_given_up_ticks_no_more(slow_platform: Platform) -> None:
    """ComfyUI answered 404 twice after a failover, came back, and the job it had goes on and calls back."""
    slow_platform.policy = {"poll_after_seconds": 30.0, "poll_at_most_seconds": 30.0}
    comfyui = slow_platform.simulators.admin.comfyui
    handle = await started_job(slow_platform)
    task_id, lost = task_id_of(handle), (await slow_platform.job(handle)).run_id
    await report(slow_platform, handle, stage_progress=20.0)
    await shown(slow_platform, handle, 20.0)
    unknown = {"status": 404, "body": {"detail": {"code": "40401", "message": "job_not_found"}}}
    for route, times in (("get_job", 2), ("cancel_job", None)):
        await comfyui.fault("answer", route=route, task_id=task_id, times=times, **unknown)
    for seconds in (31, 31, 11):  # a look into the store, then two polls
        await slow_platform.pass_time(handle, seconds)
        await slow_platform.until_settled(handle)
    events, before = await slow_platform.store.events(task_id), await signals(handle)
    assert events[-1].message == "Attempt 1 ended with lost; the next follows in 30 s."
    await report(slow_platform, handle, stage_progress=50.0)

    async def arrived() -> bool:
        return await signals(handle) > before or len(await slow_platform.store.events(task_id)) > len(events)

    await slow_platform.until(arrived)
    assert await slow_platform.store.events(task_id) == events
    await comfyui.act(lost, "finish")
    await slow_platform.cancel(handle)
    assert (await ended(slow_platform, handle)).status is TaskStatus.CANCELLED


async def test_the_query_says_how_old_its_figures_are(platform: Platform) -> None:
    handle = await started_job(platform)
    first = (await platform.progress(handle))["as_of"]
    assert first is not None
    await platform.callback(handle, job_id=(await platform.job(handle)).run_id, job_status="processing", sequence=10**6)

    async def newer() -> bool:
        return bool((await platform.progress(handle))["as_of"] > first)

    await platform.until(newer)
