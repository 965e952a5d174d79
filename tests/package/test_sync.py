"""The synchronous face, in threads of its own and where an event loop runs already."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from temporalio.client import Client

from comfyui_temporal import GatewayUnavailable, ImageTask, SyncTasks, TaskExists, TaskStatus, UnknownTask
from comfyui_temporal.client.submission import start_task
from tests.workflows.platform import Platform

Open = Callable[[], SyncTasks]
PROJECT = Path(__file__).parents[2]
SCRIPT = """
import asyncio
import sys
from temporalio.client import Client
from comfyui_temporal import HttpTasks, SyncTasks, TemporalTasks

way, address, name, call, task_id = sys.argv[1:]

def says_when_it_waits(tasks):
    wait = tasks.wait
    async def said(task_id):
        print("waits", flush=True)
        return await wait(task_id)
    tasks.wait = said
    return tasks

async def by_temporal():
    return says_when_it_waits(TemporalTasks(await Client.connect(address), task_queue=name))

async def over_http():
    return says_when_it_waits(HttpTasks(address, name))

async def never():
    print("opens", flush=True)
    await asyncio.sleep(60)

with SyncTasks({"temporal": by_temporal, "http": over_http, "never": never}[way]) as tasks:
    if call == "wait":
        tasks.wait(task_id)
    for update in tasks.follow(task_id):
        print(update.status, flush=True)
"""


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


@pytest.mark.parametrize("call", ["wait", "follow"])
@pytest.mark.parametrize("way", ["temporal", "http"])
async def test_an_interrupt_ends_a_script_that_waits(whole: Platform, token: str, way: str, call: str) -> None:
    task = ImageTask.model_validate(whole.image())
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    started = await start_task(whole.client, task, task_queue=whole.task_queue)
    await whole.until_held(task.task_id)
    by_temporal = (whole.client.service_client.config.target_host, whole.task_queue)
    address, name = by_temporal if way == "temporal" else (whole.gateway_url, token)
    said = await interrupted(way, address, name, call, task.task_id)
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    assert "RuntimeError" not in said
    await started.handle.execute_update("cancel_task", {})


async def interrupted(*arguments: str) -> str:
    """What the script writes as it ends, soon after an interrupt from the keyboard while it waits."""
    script = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=PROJECT,
    )
    assert script.stdout is not None
    try:
        assert await asyncio.wait_for(script.stdout.readline(), 20), "it waits, or has seen an update"
        script.send_signal(signal.SIGINT)
        _, said = await asyncio.wait_for(script.communicate(), 10)
    finally:
        if script.returncode is None:
            script.kill()
    return said.decode()


async def test_leaving_ends_what_another_thread_still_waits_for(whole: Platform, opened: Open) -> None:
    task = ImageTask.model_validate(whole.image())
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    ended: list[BaseException] = []

    def script() -> None:
        with opened() as tasks:
            tasks.start(task)
            begins = threading.Event()

            def wait() -> None:
                begins.set()
                try:
                    tasks.wait(task.task_id)
                except BaseException as error:
                    ended.append(error)

            waiting = threading.Thread(target=wait, daemon=True)
            waiting.start()
            begins.wait(10)
            tasks.show(task.task_id)  # a call later
        waiting.join(5)

    await asyncio.wait_for(asyncio.to_thread(script), 15)
    assert ended, "the call ended, and not as if the task had"
    await whole.client.get_workflow_handle(f"task-{task.task_id}").execute_update("cancel_task", {})


async def test_an_interrupt_ends_a_script_that_opens() -> None:
    assert (await interrupted("never", "", "", "wait", "task-1")).splitlines()[-1] == "KeyboardInterrupt"


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
