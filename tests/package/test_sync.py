"""The synchronous face, in threads of its own and where an event loop runs already."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing

import pytest
from temporalio.client import Client

from comfyui_temporal import GatewayUnavailable, ImageTask, SyncTasks, TaskExists, TaskStatus, UnknownTask
from tests.workflows.platform import Platform

Open = Callable[[], SyncTasks]


@pytest.fixture(params=["temporal", "http"])
def opened(request: pytest.FixtureRequest, whole: Platform, token: str) -> Open:
    address = whole.client.service_client.config.target_host
    if request.param == "http":
        return lambda: SyncTasks.over_http(whole.gateway_url, token)
    return lambda: SyncTasks.by_temporal(lambda: Client.connect(address), task_queue=whole.task_queue)


async def test_a_task_runs_from_start_to_end(whole: Platform, opened: Open) -> None:
    task = ImageTask.model_validate(whole.image())

    def script() -> None:
        with opened() as tasks:
            assert tasks.start(task).is_new
            statuses = [update.status for update in tasks.follow(task.task_id)]
            assert statuses[-1] is TaskStatus.COMPLETED
            assert tasks.wait(task.task_id).result is not None
            assert tasks.show(task.task_id).outcome is not None
            assert tasks.cancel(task.task_id) == "too_late"
            assert len(list(tasks.list(limit=1))) == 1
            with pytest.raises(TaskExists):
                tasks.start(task.model_copy(update={"prompt": "a dog"}))
            with pytest.raises(UnknownTask):
                tasks.confirm("never-started", 5)

    await asyncio.to_thread(script)


async def test_following_may_be_left_early(whole: Platform, opened: Open) -> None:
    task = ImageTask.model_validate(whole.image())

    def script() -> None:
        with opened() as tasks:
            tasks.start(task)
            with closing(tasks.follow(task.task_id)) as updates:
                next(updates)
            for _ in tasks.follow(task.task_id):
                break
            assert tasks.wait(task.task_id).status is TaskStatus.COMPLETED

    await asyncio.to_thread(script)


def test_it_works_where_a_loop_runs_already(unused_tcp_port: int) -> None:
    async def cell() -> None:
        with (
            SyncTasks.over_http(f"http://127.0.0.1:{unused_tcp_port}", "token") as tasks,
            pytest.raises(GatewayUnavailable),
        ):
            tasks.show("task-1")

    asyncio.run(cell())


def test_a_client_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="with SyncTasks"):
        SyncTasks.over_http("http://127.0.0.1:1", "token").show("task-1")
