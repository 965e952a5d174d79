"""Streams over HTTP: many at a time, ends that no event tells, gateways that keep ended streams, slow readers."""

from __future__ import annotations

from comfyui_temporal import HttpTasks, ImageTask, TaskStatus
from comfyui_temporal.contracts.task_events import EventType
from tests.workflows.platform import Platform

STREAMS = 101
"""One more than the connections that httpx allows by default."""


async def test_many_streams_leave_connections_for_calls(whole: Platform, token: str) -> None:
    task = ImageTask.model_validate(whole.image())
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    async with HttpTasks(whole.gateway_url, token, patience_seconds=0) as tasks:
        await tasks.start(task)
        await whole.until_held(task.task_id)
        streams = [tasks.events(task.task_id) for _ in range(STREAMS)]
        for stream in streams:
            await anext(stream)
        other = await tasks.start(ImageTask.model_validate(whole.image()))
        assert other.is_new
        assert await tasks.cancel(task.task_id) == "accepted"
        for stream in streams:
            assert [one async for one in stream][-1].event == EventType.CANCELLED
        assert (await tasks.wait(other.task_id)).status is TaskStatus.COMPLETED
