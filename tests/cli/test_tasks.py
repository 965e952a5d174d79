"""Watching, showing, listing, cancelling and confirming, for every course of a task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import pytest
from temporalio.client import Client, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.worker import Worker

from comfyui_temporal.client.errors import InvalidInput, TaskOver, Undecryptable, UnknownTask, WorkerUnavailable
from comfyui_temporal.client.models import StartedTask, TaskSummary
from comfyui_temporal.client.temporal_tasks import TemporalTasks
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import ExitCode, exit_code_of
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.glances import Glance, glances
from comfyui_temporal.contracts.tasks import (
    CancelTask,
    CancelTaskOutcome,
    TaskStatus,
    TrainingProgress,
    TrainingResult,
)
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from comfyui_temporal.plugin import TasksPlugin
from gateway.temporal_calls import updated
from tests.cli.conftest import ScriptedImage, image_task, run_command, training_task
from tests.conftest import unique
from tests.pausing import pause, unpause
from tests.waiting import until
from tests.workflows.platform import Platform
from tests.workflows.resets import Point, reset

T = TypeVar("T")


class Seen:
    """A watcher that keeps what it received."""

    def __init__(self) -> None:
        self.progress: list[TrainingProgress] = []
        self.sentences: list[str] = []

    def progressed(self, progress: TrainingProgress) -> None:
        self.progress.append(progress)

    def waits_for_worker(self, sentence: str) -> None:
        self.sentences.append(sentence)


def handle_of(opened: Connection, started: StartedTask) -> WorkflowHandle[Any, Any]:
    return opened.client.get_workflow_handle(started.workflow_id)


async def test_following_reports_each_change_and_the_end(opened: Connection) -> None:
    started = await opened.tasks.start(image_task())
    seen = Seen()
    following = asyncio.create_task(follow(opened, started.task_id, seen))

    async def is_seen(progress: float) -> bool:
        return any(one.progress == progress for one in seen.progress)

    await until(lambda: is_seen(10.0))
    await handle_of(opened, started).signal("advance", 60.0)
    await until(lambda: is_seen(60.0))
    await handle_of(opened, started).signal("deliver")
    outcome = await following
    assert (outcome.status, exit_code_of(outcome.status)) == (TaskStatus.COMPLETED, ExitCode.COMPLETED)
    assert outcome.credits is not None
    assert outcome.credits.charged == 24
    states = [(one.stage, one.progress) for one in seen.progress]
    assert states[:2] == [("processing", 10.0), ("processing", 60.0)]
    assert len(states) == len(set(states)), "nothing is reported twice"


async def test_a_failed_task_says_code_sentence_and_points(opened: Connection) -> None:
    started = await opened.tasks.start(image_task(prompt="fail"))
    outcome = await follow(opened, started.task_id, Seen())
    assert (outcome.status, exit_code_of(outcome.status)) == (TaskStatus.FAILED, ExitCode.FAILED)
    assert outcome.code == "insufficient_balance"
    assert outcome.sentence is not None
    assert "balance too low" in outcome.sentence
    assert outcome.credits is not None
    assert (outcome.credits.estimated, outcome.credits.charged) == (24, 0)


async def test_a_cancel_ends_the_task_and_a_second_comes_too_late(opened: Connection) -> None:
    started = await opened.tasks.start(image_task())
    assert await opened.tasks.cancel(started.task_id, "wrong prompt") == "accepted"
    outcome = await follow(opened, started.task_id, Seen())
    assert (outcome.status, exit_code_of(outcome.status)) == (TaskStatus.CANCELLED, ExitCode.CANCELLED)
    assert await opened.tasks.cancel(started.task_id, "again") == "too_late"


@pytest.mark.parametrize(("end", "status"), [("cancel", TaskStatus.CANCELLED), ("terminate", TaskStatus.FAILED)])
async def test_a_run_ended_in_temporal_is_reported_as_such(opened: Connection, end: str, status: TaskStatus) -> None:
    started = await opened.tasks.start(image_task())
    await getattr(handle_of(opened, started), end)()
    outcome = await follow(opened, started.task_id, Seen())
    assert outcome.status is status
    assert outcome.sentence
    picture = await opened.tasks.show(started.task_id)
    assert picture.task.status == status.value


async def test_a_training_waits_for_its_price_and_ends_once_it_is_confirmed(opened: Connection) -> None:
    started = await opened.tasks.start(training_task())
    seen = Seen()
    following = asyncio.create_task(follow(opened, started.task_id, seen))

    async def is_shown() -> bool:
        return any(one.confirmation and one.confirmation.estimated_cost == 180 for one in seen.progress)

    await until(is_shown)
    with pytest.raises(InvalidInput, match="180 points are asked for"):
        await opened.tasks.confirm(started.task_id, 100)
    assert await opened.tasks.confirm(started.task_id, 200) == 200
    outcome = await following
    assert isinstance(outcome.result, TrainingResult)
    assert outcome.result.output is not None
    assert outcome.result.output.metrics == {"loss": 0.12}
    with pytest.raises(TaskOver, match="is over"):
        await opened.tasks.confirm(started.task_id, 300)


async def test_an_open_task_is_shown_with_stage_and_points(opened: Connection) -> None:
    started = await opened.tasks.start(image_task())
    picture = await opened.tasks.show(started.task_id)
    assert picture.progress is not None
    assert (picture.progress.stage, picture.task.tenant_id) == ("processing", "tenant-a")
    assert picture.credits is not None
    assert picture.credits.held == 24
    assert picture.outcome is None


async def test_a_paused_run_is_listed_and_shown_as_paused(opened: Connection) -> None:
    """The SDK's own list raises at its status, and with it at every other task (pitfall 42)."""
    task = image_task(tenant_id=unique("tenant"))
    started = await opened.tasks.start(task)
    await pause(opened.client, started.workflow_id)
    again = await opened.tasks.start(task)
    assert (again.is_new, again.run_id) == (False, started.run_id)
    picture = await opened.tasks.show(started.task_id)
    assert picture.task.is_paused and picture.outcome is None

    async def listed() -> list[bool]:
        filters = {"TenantId": task.tenant_id}
        return [row.is_paused async for row in opened.tasks.list(filters=filters, limit=10)]

    async def shown_as_paused() -> bool:
        return await listed() == [True]

    await until(shown_as_paused)
    await unpause(opened.client, started.workflow_id)
    assert await opened.tasks.cancel(started.task_id, "") == "accepted"


async def test_an_unknown_task_is_named(opened: Connection) -> None:
    with pytest.raises(UnknownTask, match="never-started"):
        await opened.tasks.show("never-started")
    with pytest.raises(UnknownTask, match="never-started"):
        await opened.tasks.cancel("never-started", "")


async def test_without_a_worker_watching_and_cancelling_say_so(
    opened: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comfyui_temporal.client.temporal_tasks.QUERY_TIMEOUT", timedelta(seconds=0.3))
    deserted = Connection(opened.client, opened.server, unique("queue"))
    started = await deserted.tasks.start(image_task())
    seen = Seen()
    following = asyncio.create_task(follow(deserted, started.task_id, seen))

    async def is_warned() -> bool:
        return bool(seen.sentences)

    await until(is_warned)
    assert deserted.task_queue in seen.sentences[0]
    monkeypatch.setattr("comfyui_temporal.client.temporal_tasks.UPDATE_SECONDS", 0.5)
    with pytest.raises(WorkerUnavailable, match=deserted.task_queue):
        await deserted.tasks.cancel(started.task_id, "")
    await handle_of(opened, started).terminate()
    assert (await following).code == "terminated"


async def test_a_list_by_status_holds_what_each_task_is_now(opened: Connection) -> None:
    """Search attributes stay as they were where a run continued as new, was reset or was terminated."""
    tenant = unique("tenant")
    tasks = [
        image_task(tenant_id=tenant, prompt=prompt) for prompt in ("a long story", "a cat", "a cat", "a cat", "a dog")
    ]
    continued, terminated, restarted, cancelled, completed = [await opened.tasks.start(task) for task in tasks]
    await handle_of(opened, terminated).terminate()
    await handle_of(opened, cancelled).cancel()
    await handle_of(opened, completed).signal("deliver")
    await opened.tasks.wait(completed.task_id)
    await opened.tasks.show(restarted.task_id)  # its worker has taken it
    first = Point(restarted.run_id or "", 4, 0)
    await reset(cast(Platform, opened), handle_of(opened, restarted), first)

    async def listed(status: TaskStatus | None) -> list[str]:
        return [row.task_id async for row in opened.tasks.list(status=status, filters={"TenantId": tenant})]

    async def is_listed() -> bool:
        return sorted(await listed(TaskStatus.QUEUED)) == sorted([continued.task_id, restarted.task_id])

    await until(is_listed, "only those that are open")
    assert await listed(TaskStatus.FAILED) == [terminated.task_id]
    assert await listed(TaskStatus.CANCELLED) == [cancelled.task_id]
    assert await listed(TaskStatus.RUNNING) == []
    assert len(await listed(None)) == len(tasks)
    by_command = await run_command("list", "--tenant", tenant, "--status", "failed", connection=opened)
    assert [line.split("\t")[0] for line in by_command.out.splitlines()] == [terminated.task_id]


async def test_a_cancelled_call_is_cancelled_on_every_python(
    opened: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on `asyncio.wait_for` calls in the caller's own task, and the SDK hides a cancellation."""

    async def wait_for(call: Coroutine[Any, Any, T], timeout: float) -> T:  # noqa: ASYNC109
        async with asyncio.timeout(timeout):
            return await call

    monkeypatch.setattr(asyncio, "wait_for", wait_for)
    deserted = Connection(opened.client, opened.server, unique("queue"))
    started = await deserted.tasks.start(image_task())
    handle = handle_of(opened, started)
    for call in (
        deserted.tasks.cancel(started.task_id),
        deserted.tasks.confirm(started.task_id, 5),
        updated(handle, "cancel_task", CancelTask(), CancelTaskOutcome),
    ):
        calling = asyncio.create_task(call)
        await asyncio.wait({calling}, timeout=0.5)
        assert not calling.done(), "no worker answers"
        calling.cancel()
        await asyncio.wait({calling}, timeout=5)
        assert calling.cancelled()
    await handle.terminate()


async def test_without_the_key_a_task_is_undecryptable_and_listed(opened: Connection) -> None:
    encrypted = opened.client.config()
    encrypted["plugins"] = [TasksPlugin(PayloadEncryption([EncryptionKey("2030", b"o" * 32)]))]
    encrypted["data_converter"] = DataConverter.default
    client, queue, tenant = Client(**encrypted), unique("queue"), unique("tenant")
    without_key = replace(opened, task_queue=queue)
    async with Worker(client, task_queue=queue, workflows=[ScriptedImage]):
        by_key = TemporalTasks(client, task_queue=queue)
        started = await by_key.start(image_task(tenant_id=tenant))
        assert (await by_key.show(started.task_id)).progress is not None
        for call in (without_key.tasks.show(started.task_id), anext(without_key.tasks.follow(started.task_id))):
            with pytest.raises(Undecryptable, match="2030"):
                await call
        with pytest.raises(Undecryptable, match="2030"):
            await follow(without_key, started.task_id, Seen())

        async def rows() -> list[TaskSummary]:
            return [row async for row in without_key.tasks.list(filters={"TenantId": tenant})]

        assert await glances(without_key, await until(rows)) == {started.task_id: Glance()}
        await by_key.cancel(started.task_id)
        await by_key.wait(started.task_id)
        with pytest.raises(Undecryptable, match="2030"):
            await without_key.tasks.wait(started.task_id)


async def test_confirming_too_late_is_no_bad_input(opened: Connection) -> None:
    started = await opened.tasks.start(training_task(max_credits=200))
    await opened.tasks.wait(started.task_id)
    for more in ([], ["--max-credits", "300"]):
        late = await run_command("confirm", started.task_id, *more, "--json", connection=opened)
        assert late.exit_code == ExitCode.TOO_LATE
        assert json.loads(late.out)["error"]["code"] == "task_over"


async def test_lists_are_filtered_and_safe_against_any_text(opened: Connection) -> None:
    tenant = unique("tenant")
    mine = [image_task(tenant_id=tenant), image_task(tenant_id=tenant, priority="accelerated")]
    for task in mine:
        await opened.tasks.start(task)

    async def ids(**filters: str) -> set[str]:
        return {row.task_id async for row in opened.tasks.list(filters=filters, limit=10)}

    async def both_visible() -> bool:
        return await ids(TenantId=tenant) == {task.task_id for task in mine}

    await until(both_visible)
    assert await ids(TenantId=tenant, TaskPriority="accelerated") == {mine[1].task_id}
    assert await ids(TenantId=f"x' OR TenantId = '{tenant}") == set()
    assert await ids(TenantId="back\\slash'") == set()
    assert len([row async for row in opened.tasks.list(filters={"TenantId": tenant}, limit=1)]) == 1
