"""A task that is reset while somebody waits for it: its old run is terminated, and the task goes on."""

from __future__ import annotations

import asyncio

from comfyui_temporal import ImageTask, TaskStatus, TaskUpdate, TemporalTasks
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.server import Server
from tests.cli.test_tasks import Seen
from tests.workflows.platform import Platform
from tests.workflows.reset_scenarios import work_goes_on
from tests.workflows.resets import points_of, reset


async def updates_of(tasks: TemporalTasks, task_id: str) -> list[TaskUpdate]:
    return [update async for update in tasks.follow(task_id)]


async def test_who_waits_for_a_task_that_is_reset_gets_its_own_end(whole: Platform) -> None:
    task = ImageTask.model_validate(whole.image())
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id, at=0.3)
    server = Server(whole.client.service_client.config.target_host, "default", "named by the test")
    opened = Connection(whole.client, server, whole.task_queue)
    started = await opened.tasks.start(task)
    handle = whole.client.get_workflow_handle(started.workflow_id)
    await whole.until_held(task.task_id)
    await whole.until_settled(handle)
    seen = Seen()
    waiting = asyncio.create_task(opened.tasks.wait(task.task_id))
    following = asyncio.create_task(updates_of(opened.tasks, task.task_id))
    watching = asyncio.create_task(follow(opened, task.task_id, seen))

    async def is_watched() -> bool:
        return bool(seen.progress)

    await whole.until(is_watched)
    run = await reset(whole, handle, (await points_of(whole, handle))[-1])
    async with work_goes_on(whole, run):
        outcome, updates, watched = await asyncio.wait_for(asyncio.gather(waiting, following, watching), 30)
    assert (outcome.status, outcome.code) == (watched.status, watched.code) == (TaskStatus.COMPLETED, None)
    assert outcome.result_urls
    assert [update.status for update in updates if update.status.is_end()] == [TaskStatus.COMPLETED]


async def test_a_task_that_is_terminated_after_a_reset_says_so(whole: Platform) -> None:
    task = ImageTask.model_validate(whole.image())
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id, at=0.3)
    async with TemporalTasks(whole.client, task_queue=whole.task_queue) as tasks:
        started = await tasks.start(task)
        handle = whole.client.get_workflow_handle(started.workflow_id)
        await whole.until_held(task.task_id)
        await whole.until_settled(handle)
        waiting = asyncio.create_task(tasks.wait(task.task_id))
        run = await reset(whole, handle, (await points_of(whole, handle))[-1])
        await whole.until_settled(run)
        assert not waiting.done()
        await run.terminate("by a test")
        assert (await asyncio.wait_for(waiting, 10)).code == "terminated"
