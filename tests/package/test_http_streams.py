"""Streams over HTTP: many at a time, ends that no event tells, gateways that keep ended streams, slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from activities.file_lists import FileLists
from comfyui_temporal import GatewayUnavailable, HttpTasks, ImageTask, TaskStatus, TaskUpdate
from comfyui_temporal.client.submission import start_task
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_events import EventType, Heartbeat, TaskEvent
from comfyui_temporal.contracts.tasks_api import TaskDetail
from gateway.app import create_app
from gateway.problems import Problem, ProblemCode
from gateway.streams_hub import EventHub
from store import TaskStore
from tests.conftest import unique
from tests.gateway.serving import new_access, new_secret, token_for
from tests.served_app import served_app
from tests.streams.serving import Writer
from tests.workflows.platform import Platform

STREAMS = 101
"""One more than the connections that httpx allows by default."""
NOW = datetime(2030, 1, 1, tzinfo=UTC)
BEAT = Heartbeat(ts=NOW)


def event(seq: int, kind: EventType, status: TaskStatus) -> TaskEvent:
    return TaskEvent(
        event_id=f"task-1:{seq}",
        seq=seq,
        event=kind,
        task_id="task-1",
        task_type=Scene.IMAGE_GENERATE,
        attempt=1,
        status=status,
        ts=NOW,
        cursor=f"cursor-{seq}",
    )


RUNNING = event(1, EventType.RUNNING, TaskStatus.RUNNING)
COMPLETED = event(2, EventType.COMPLETED, TaskStatus.COMPLETED)


def view(status: TaskStatus) -> TaskDetail:
    return TaskDetail(
        task_id="task-1",
        tenant_id="tenant-demo",
        user_id="user-demo",
        scene=Scene.IMAGE_GENERATE,
        template_id="text-to-image",
        priority=TaskPriority.STANDARD,
        resolution="hd",
        workflow_id="task-task-1",
        status=status,
        created_at=NOW,
        updated_at=NOW,
        last_seq=2,
    )


class Frames(httpx.AsyncByteStream):
    """A stream that is cut after these frames."""

    def __init__(self, *sent: TaskEvent | Heartbeat) -> None:
        self._sent = sent

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for one in self._sent:
            yield f"event: {one.event}\ndata: {one.model_dump_json()}\n\n".encode()
        raise httpx.ReadError("cut")


def gateway_of(
    streams: Sequence[tuple[TaskEvent | Heartbeat, ...]], views: Callable[[], httpx.Response], **options: float
) -> HttpTasks:
    """A gateway whose streams are these, one after the other, and are cut."""
    opened = iter(streams)

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/stream/sse"):
            return views()
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Frames(*next(opened)))

    return HttpTasks("http://gateway.test", "token", transport=httpx.MockTransport(answer), **options)


def shown(status: TaskStatus, **fields: int) -> httpx.Response:
    return httpx.Response(200, content=view(status).model_copy(update=fields).model_dump_json())


@pytest_asyncio.fixture
async def keeping(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """The address of a gateway whose ended streams stay open, with a heartbeat each second."""
    monkeypatch.setattr("gateway.app.EventHub", partial(EventHub, heartbeat_seconds=1))
    app = create_app(
        temporal=temporal_env.client,
        store=task_store,
        lists=FileLists.at(tmp_path.as_uri()),
        callback_secrets=[new_secret()],
        access=new_access(),
        ended_streams_are_kept=True,
    )
    async with served_app(app) as port:
        yield f"http://127.0.0.1:{port}"


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


async def test_following_an_ended_task_ends_where_its_stream_is_kept(keeping: str, task_store: TaskStore) -> None:
    writer = Writer(task_store, unique("tenant"))
    task_id = await writer.begun()
    async with HttpTasks(keeping, token_for(writer.tenant_id)) as tasks, asyncio.timeout(20):
        following = asyncio.create_task(all_of(tasks, task_id, None))
        await writer.end(task_id)
        every = await following
        assert every[-1].status is TaskStatus.COMPLETED
        assert await all_of(tasks, task_id, every[-1].cursor) == []
        [last] = await all_of(tasks, task_id, every[-2].cursor)
        assert last.status is TaskStatus.COMPLETED


async def test_a_quiet_task_is_followed_to_its_end_where_streams_are_kept(keeping: str, task_store: TaskStore) -> None:
    writer = Writer(task_store, unique("tenant"))
    task_id = await writer.begun()
    async with HttpTasks(keeping, token_for(writer.tenant_id)) as tasks, asyncio.timeout(20):
        first = await anext(tasks.events(task_id))
        seen: list[str] = []

        async def follow() -> None:
            async for one in tasks.events(task_id, cursor=first.cursor):
                seen.append(one.event)

        following = asyncio.create_task(follow())
        await asyncio.wait({following}, timeout=2.5)  # two heartbeats without an event
        assert not following.done(), "an open task is not over"
        await writer.end(task_id)
        await following
    assert seen == [EventType.COMPLETED]


async def test_an_end_that_is_still_on_its_way_is_not_left_out() -> None:
    """The task's row is newer than its stream for a moment."""
    streams = [(BEAT, COMPLETED)]
    async with gateway_of(streams, lambda: shown(TaskStatus.COMPLETED)) as tasks:
        assert [one.seq async for one in tasks.events("task-1", cursor=RUNNING.cursor)] == [COMPLETED.seq]


async def all_of(tasks: HttpTasks, task_id: str, cursor: str | None) -> list[TaskUpdate]:
    return [update async for update in tasks.follow(task_id, cursor=cursor)]


async def test_the_end_of_a_task_that_no_worker_took_is_said(whole: Platform, token: str) -> None:
    task = ImageTask.model_validate(whole.image())
    async with HttpTasks(whole.gateway_url, token) as tasks, asyncio.timeout(40):
        waiting = await start_task(whole.client, task, task_queue=unique("queue"))
        early = asyncio.create_task(tasks.wait(task.task_id))
        await waiting.handle.terminate()
        outcome = await tasks.wait(task.task_id)
        assert (outcome.status, outcome.code) == (TaskStatus.FAILED, "terminated")
        [last] = [update async for update in tasks.follow(task.task_id)]
        assert last.status is TaskStatus.FAILED
        assert last.error_details is not None and last.error_details.code == "terminated"
        assert (await early).code == "terminated"


async def test_a_task_that_an_older_gateways_streams_do_not_know_yet_is_unavailable_not_unknown() -> None:
    """Its run has been started, but has not claimed its id: older gateways answer 404 for its stream until then."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/stream/sse"):
            problem = Problem(ProblemCode.TASK_UNKNOWN, "There is no such task.").response()
            return httpx.Response(problem.status_code, content=bytes(problem.body))
        return httpx.Response(200, content=view(TaskStatus.QUEUED).model_dump_json())

    gateway = httpx.MockTransport(answer)
    async with HttpTasks("http://gateway.test", "token", transport=gateway, patience_seconds=0) as tasks:
        with pytest.raises(GatewayUnavailable, match="No worker"):
            await anext(tasks.follow("task-1"))


async def test_the_end_of_a_task_without_events_is_said_though_its_stream_stays_open() -> None:
    answers = iter([shown(TaskStatus.QUEUED, last_seq=0)] + 2 * [shown(TaskStatus.FAILED, last_seq=0)])
    async with gateway_of([(BEAT, BEAT)], lambda: next(answers)) as tasks:
        assert [update.status async for update in tasks.follow("task-1")] == [TaskStatus.FAILED]


async def test_an_outage_after_the_last_event_is_waited_out() -> None:
    answers = iter([httpx.Response(503), httpx.Response(200, content=view(TaskStatus.COMPLETED).model_dump_json())])
    async with gateway_of([(COMPLETED,)], lambda: next(answers)) as tasks:
        assert (await tasks.wait("task-1")).status is TaskStatus.COMPLETED
    async with gateway_of([(COMPLETED,)], lambda: httpx.Response(503), patience_seconds=0) as tasks:
        with pytest.raises(GatewayUnavailable):
            await tasks.wait("task-1")


async def test_time_that_a_reader_takes_is_not_the_gateways_silence() -> None:
    patience_seconds = 0.2
    streams: list[tuple[TaskEvent | Heartbeat, ...]] = [(RUNNING,), (COMPLETED,)]
    seen: list[int] = []
    async with gateway_of(streams, lambda: shown(TaskStatus.RUNNING), patience_seconds=patience_seconds) as tasks:
        async for one in tasks.events("task-1"):
            seen.append(one.seq)
            await asyncio.sleep(2 * patience_seconds)  # it works on the event
    assert seen == [RUNNING.seq, COMPLETED.seq]
