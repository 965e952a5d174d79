"""A task survives silence: polls, deadlines, the queue's promise; on a clock that tests move (contract §1, §2, §6)."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended
from tests.workflows.payers import until_price_shown
from tests.workflows.platform import Handle, Platform, scheduled, task_id_of

MINUTE = 60.0
NO_POLLS = {"poll_after_seconds": 86_400.0, "poll_at_most_seconds": 86_400.0}


async def test_without_callbacks_polling_alone_completes_both_tasks(platform: Platform) -> None:
    await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
    options = {"poll_after_seconds": 0.2}
    handles = [await platform.start_image(options=options), await platform.start_training(options=options)]
    for handle, route in zip(handles, ("get_job", "get_training"), strict=True):
        ending = await ended(platform, handle)
        assert ending.status is TaskStatus.COMPLETED
        assert await platform.simulators.admin.comfyui.requests_seen(route, task_id_of(handle))


async def test_with_callbacks_no_poll_is_made(platform: Platform) -> None:
    ending = await ended(platform, handle := await platform.start_image())
    assert ending.status is TaskStatus.COMPLETED
    assert await platform.simulators.admin.comfyui.requests_seen("get_job", task_id_of(handle)) == []


async def test_callbacks_and_polls_together_make_one_result(platform: Platform) -> None:
    platform.policy = {"deadline_factor": 100.0}
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="submit_job", while_queued=True)
    handle = await platform.start_image(options={"poll_after_seconds": 0.05})
    await platform.until(lambda: comfyui.requests_seen("get_job", task_id_of(handle)))
    job_id = (await platform.job(handle)).run_id

    async def works_again() -> bool:
        """A job may be ordered to go on a moment before it stalls."""
        return (await comfyui.act(job_id, "resume")).phase in ("working", "over")

    await platform.until(works_again)
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.charged == 24
    assert {callback.phase for callback in await comfyui.callbacks(task_id_of(handle))} == {"delivered"}


async def polls_after(platform: Platform, handle: Handle, seconds: float) -> None:
    """Let time pass to just before and just after a poll is due; wait until it was made."""
    before = len(await scheduled(handle, "get_job"))
    await platform.pass_time(handle, seconds - 3)
    await platform.pass_time(handle, 4)

    async def polled() -> bool:
        seen = await platform.simulators.admin.comfyui.requests_seen("get_job", task_id_of(handle))
        return len(await scheduled(handle, "get_job")) > before and len(seen) > before

    await platform.until(polled)


async def assert_polled_after(handle: Handle, spans: list[float]) -> None:
    """The polls came after these spans of silence, on the run's own clock; in seconds."""
    at = [(await scheduled(handle, "submit_job"))[0], *await scheduled(handle, "get_job")]
    waited = [later - earlier for earlier, later in pairwise(at)]
    assert len(waited) == len(spans), waited
    assert all(span - 1 <= real <= span + 2.5 for span, real in zip(spans, waited, strict=True)), waited


async def finished(platform: Platform, handle: Handle) -> None:
    """Let the job be delivered now, its callbacks no longer withheld."""
    comfyui = platform.simulators.admin.comfyui
    await comfyui.remove_faults()
    await comfyui.act((await platform.job(handle)).run_id, "finish")


async def test_polls_of_a_silent_job_come_after_30_60_and_120_seconds(slow_platform: Platform) -> None:
    comfyui = slow_platform.simulators.admin.comfyui
    await comfyui.fault("callback_withhold", times=None)
    stale = {"sequence": 0, "next_eta": None, "estimated_time": 60}
    await comfyui.fault("alter", route="get_job", times=None, fields=stale)
    handle = await slow_platform.start_waiting_image()
    spans: list[float] = [30, 30, 60, 120, 120]  # the first answer has a change
    for span in spans:
        await polls_after(slow_platform, handle, span)
    await assert_polled_after(handle, spans)
    await finished(slow_platform, handle)
    assert (await ended(slow_platform, handle)).status is TaskStatus.COMPLETED


async def test_the_next_poll_waits_for_the_announced_stage_but_no_longer_than_120_seconds(
    slow_platform: Platform,
) -> None:
    await slow_platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
    handle = await slow_platform.start_waiting_image()
    # Queued for 192 s: the first poll learns so at 30 s; 42 s are left at 150 s.
    spans: list[float] = [30, 120, 42]
    for span in spans:
        await polls_after(slow_platform, handle, span)
    await assert_polled_after(handle, spans)
    await finished(slow_platform, handle)
    assert (await ended(slow_platform, handle)).status is TaskStatus.COMPLETED


async def announce(platform: Platform, handle: Handle, **fields: Any) -> None:
    """ComfyUI announces that the work has begun, with these fields; wait until the task knows."""
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "lie", fields=fields)

    async def known() -> bool:
        progress = await platform.progress(handle)
        estimate = fields.get("estimated_time", progress["estimated_time"])
        return bool(progress["status"] == "running" and progress["estimated_time"] == estimate)

    await platform.until(known)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("announced", "ends_after"),
    [(8, 24), (4, 12), (12, 36), (20, 60)],
    ids=["as first estimated", "shorter", "longer", "more than twice as long"],
)
async def test_past_its_deadline_a_task_times_out_and_everything_is_given_back(
    slow_platform: Platform, announced: float, ends_after: float
) -> None:
    """Deadline = `processing` + 3 x the newest estimated_time, 8 minutes at first; in minutes."""
    slow_platform.policy = NO_POLLS
    await slow_platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", while_queued=True)
    handle = await slow_platform.start_waiting_image()
    await announce(slow_platform, handle, job_status="processing", estimated_time=announced)
    await slow_platform.pass_time(handle, (ends_after - 0.5) * MINUTE)
    await slow_platform.until_settled(handle)
    await slow_platform.pass_time(handle, 1 * MINUTE)
    ending = await ended(slow_platform, handle)
    assert ending.code == "timeout"
    assert "timeout" in ending.exceptions
    assert ending.result["credits"]["returned"] == ending.result["credits"]["held"] == 24
    lasted = (ending.events[-1].ts - ending.events[0].ts).total_seconds() / MINUTE
    assert ends_after - 0.1 <= lasted <= ends_after + 0.6


@pytest.mark.usefixtures("short_way")
async def test_a_job_that_hangs_while_comfyui_answers_is_polled_once_more_before_its_timeout(
    slow_platform: Platform,
) -> None:
    """It was polled without a pause for ten seconds, some hundred times."""
    comfyui = slow_platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="submit_job", while_queued=True)
    await comfyui.fault("alter", route="get_job", times=None, fields={"sequence": 1})
    handle = await slow_platform.start_waiting_image()
    await announce(slow_platform, handle, job_status="processing", estimated_time=2)
    for minutes in (2, 2, 1):  # the run's clock may be some seconds ahead afterwards
        await slow_platform.pass_time(handle, minutes * MINUTE)
        await slow_platform.until_settled(handle)
    before = len(await comfyui.requests_seen("get_job", task_id_of(handle)))
    await slow_platform.pass_time(handle, 1.2 * MINUTE)
    assert (await ended(slow_platform, handle)).code == "timeout"
    polls = len(await comfyui.requests_seen("get_job", task_id_of(handle))) - before
    assert polls <= 3, "two that were due, and the last one"


async def test_a_job_that_waits_in_the_queue_has_no_deadline_but_the_whole_day(slow_platform: Platform) -> None:
    """Behind a busy server a healthy task ended `timeout`, still queued."""
    slow_platform.policy = NO_POLLS
    await slow_platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", while_queued=True)
    handle = await slow_platform.start_waiting_image()
    for _ in range(3):
        await slow_platform.pass_time(handle, 30 * MINUTE)
        await slow_platform.until_settled(handle)
    assert (await slow_platform.progress(handle))["status"] == "queued"
    await slow_platform.cancel(handle)
    assert (await ended(slow_platform, handle)).result["credits"]["returned"] == 24


async def test_a_training_past_its_deadline_times_out_and_everything_is_given_back(slow_platform: Platform) -> None:
    slow_platform.policy = NO_POLLS
    await slow_platform.simulators.admin.comfyui.fault("job_stall", route="create_training", at=0.3)
    handle = await slow_platform.start_training()
    await slow_platform.until_held(task_id_of(handle))
    await slow_platform.until_settled(handle)
    await announce(slow_platform, handle, training_status="running")
    for minutes in (25, 25, 25, 25, 25, 9.5, 1):  # 3 x 45 in all; holds are renewed after 30
        await slow_platform.pass_time(handle, minutes * MINUTE)
        await slow_platform.until_settled(handle)
    ending = await ended(slow_platform, handle)
    assert ending.code == "timeout"
    assert ending.result["credits"]["charged"] == 0


async def test_a_training_that_worked_before_its_price_was_confirmed_has_a_deadline(slow_platform: Platform) -> None:
    """On a server without a start route it works while its price is shown. It counted as queued for 30 days."""
    slow_platform.policy = NO_POLLS
    comfyui = slow_platform.simulators.admin.comfyui
    await comfyui.fault("not_offered", route="start_training", times=None)
    await comfyui.fault("job_stall", route="create_training", at=0.3)
    handle = await slow_platform.start_training(max_credits=1)
    await until_price_shown(slow_platform, handle)
    await comfyui.act((await slow_platform.job(handle)).run_id, "lie", fields={"training_status": "running"})
    await slow_platform.until_settled(handle)
    await slow_platform.pass_time(handle, 1 * MINUTE)
    await handle.execute_update("confirm_price", {"max_credits": 1_000})
    await slow_platform.until_held(task_id_of(handle))
    await slow_platform.until_settled(handle)
    for minutes in (25, 25, 25, 25, 25, 9.5, 1):  # 3 x 45 in all; holds are renewed after 30
        await slow_platform.pass_time(handle, minutes * MINUTE)
        await slow_platform.until_settled(handle)
    async with asyncio.timeout(20):
        ending = await ended(slow_platform, handle)
    assert ending.code == "timeout"
    assert ending.result["credits"]["charged"] == 0


async def test_a_job_that_queues_longer_than_promised_is_recorded_and_goes_on(slow_platform: Platform) -> None:
    await slow_platform.simulators.admin.comfyui.fault("job_duration", route="submit_job", seconds=30 * MINUTE)
    handle = await slow_platform.start_waiting_image()
    await slow_platform.pass_time(handle, 7.9 * MINUTE)
    await slow_platform.until_settled(handle)
    assert await slow_platform.store.exceptions(task_id=task_id_of(handle)) == []
    for minutes in (0.2, 5, 8, 10):
        await slow_platform.pass_time(handle, minutes * MINUTE)
        await slow_platform.until_settled(handle)
    ending = await ended(slow_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.exceptions == ["queue_sla_missed"]
    assert any("queued" in (event.message or "") for event in ending.events)
