"""One open row that cannot be looked at holds up no other: it is counted, kept for `doctor`, and tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from temporalio import workflow
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ActivityError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from activities import closed_runs
from comfyui_temporal import runs as runs_seen
from comfyui_temporal.contracts.give_back import give_back_id_of
from comfyui_temporal.contracts.tasks import TaskStatus
from store import TaskStore
from tests.conftest import NewDatabase
from tests.pausing import pause, unpause
from tests.store.facts import claim_of, new_task_id
from tests.workflows.books import ended, ended_without_its_run
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of
from tests.workflows.test_reconciler import PAUSE_SECONDS, reconcile, waiting_image

UNKNOWN_STATUS = 99
Spoil = Callable[[Any], Any]


@pytest_asyncio.fixture
async def dsn(new_database: NewDatabase) -> str:
    return await new_database()


@pytest_asyncio.fixture
async def reconciled(temporal_env: WorkflowEnvironment, dsn: str, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform whose store holds this test's rows alone."""
    store = TaskStore(dsn)
    async with running_platform(temporal_env, store, tmp_path, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 5_000.0}
        async with platform.worker():
            yield platform
    await store.close()


def at_the_edge(monkeypatch: pytest.MonkeyPatch, platform: Platform, spoilt: Mapping[str, Spoil]) -> None:
    """Replace the server's answers for some workflow ids."""
    service = platform.client.workflow_service
    describe = service.describe_workflow_execution

    async def described(request: Any, **options: Any) -> Any:
        answer = await describe(request, **options)
        spoil = spoilt.get(request.execution.workflow_id)
        return answer if spoil is None else spoil(answer)

    monkeypatch.setattr(service, "describe_workflow_execution", described)


def with_unknown_status(answer: Any) -> Any:
    answer.workflow_execution_info.status = UNKNOWN_STATUS
    return answer


def too_large(answer: Any) -> Any:
    raise RPCError("received message larger than max", RPCStatusCode.RESOURCE_EXHAUSTED, b"")


def not_as_expected(answer: Any) -> Any:
    raise AssertionError("a bug of ours")


async def left_image(platform: Platform) -> Handle:
    """An image whose run was terminated while its credits were held."""
    handle = await waiting_image(platform)
    await handle.terminate("by a test")
    return handle


async def reasons(platform: Platform) -> dict[str, str]:
    return {task.task_id: task.reason for task in await platform.store.unseen_tasks()}


async def test_rows_that_cannot_be_looked_at_hold_up_no_other(
    reconciled: Platform, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused run, an unknown status, an answer too large, a refusal, a bug, an unreadable row: six of seven."""
    paused = await waiting_image(reconciled)
    unknown, large, bug, lost = [await left_image(reconciled) for _ in range(4)]
    refused, unreadable = new_task_id(), new_task_id()
    await reconciled.store.claim(claim_of(refused).model_copy(update={"workflow_id": ""}))
    await reconciled.store.claim(claim_of(unreadable))
    connection = await asyncpg.connect(dsn)
    await connection.execute("UPDATE tasks SET status = 'archived' WHERE task_id = $1", unreadable)
    await pause(reconciled.client, paused.id)
    with monkeypatch.context() as patch:
        spoilt = {unknown.id: with_unknown_status, large.id: too_large, bug.id: not_as_expected}
        at_the_edge(patch, reconciled, spoilt)
        await asyncio.sleep(PAUSE_SECONDS)
        result = await reconcile(reconciled)

    assert result.task_ids == [task_id_of(lost)]
    assert (result.given_back, result.unseen) == (1, 6)
    assert (await ended_without_its_run(reconciled, task_id_of(lost))).status is TaskStatus.FAILED
    why = await reasons(reconciled)
    assert set(why) == {task_id_of(handle) for handle in (paused, unknown, large, bug)} | {refused, unreadable}
    assert "unpause" in why[task_id_of(paused)] and str(UNKNOWN_STATUS) in why[task_id_of(unknown)]
    assert "RESOURCE_EXHAUSTED" in why[task_id_of(large)] and "status" in why[unreadable]

    await unpause(reconciled.client, paused.id)
    await connection.execute("UPDATE tasks SET status = 'queued' WHERE task_id = $1", unreadable)
    await connection.close()
    await asyncio.sleep(PAUSE_SECONDS)
    result = await reconcile(reconciled)
    assert set(result.task_ids) == {task_id_of(handle) for handle in (unknown, large, bug)} | {unreadable}
    assert list(await reasons(reconciled)) == [refused]
    [still] = await reconciled.store.unseen_tasks()
    assert still.times >= 2 and still.first_at < still.last_at
    await reconciled.cancel(paused)
    await ended(reconciled, paused)


async def test_a_page_that_hangs_still_reports_what_it_saw(
    reconciled: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, lost = [await left_image(reconciled) for _ in range(2)]
    describe = runs_seen.describe_run

    async def slow(client: Any, workflow_id: str, *rest: Any, **options: Any) -> Any:
        if workflow_id == hanging.id:
            await asyncio.Event().wait()
        return await describe(client, workflow_id, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(closed_runs, "describe_run", slow)
        patch.setattr(closed_runs, "ROW_SECONDS", 0.3)
        await asyncio.sleep(PAUSE_SECONDS)
        result = await reconcile(reconciled)
    assert (result.task_ids, result.unseen) == ([task_id_of(lost)], 1)
    assert "in time" in (await reasons(reconciled))[task_id_of(hanging)]
    assert (await reconcile(reconciled)).task_ids == [task_id_of(hanging)]
    assert await reasons(reconciled) == {}


async def test_a_give_back_that_cannot_be_started_holds_up_no_other(
    reconciled: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, lost = [await left_image(reconciled) for _ in range(2)]
    start = workflow.start_child_workflow

    async def refusing(*arguments: Any, **options: Any) -> Any:
        if options["id"] == give_back_id_of(task_id_of(refused)):
            raise RuntimeError("Unknown child start fail cause: 9")
        return await start(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "start_child_workflow", refusing)
        await asyncio.sleep(PAUSE_SECONDS)
        result = await reconcile(reconciled)
    assert (result.task_ids, result.not_started) == ([task_id_of(lost)], 1)
    await asyncio.sleep(PAUSE_SECONDS)
    assert (await reconcile(reconciled)).task_ids == [task_id_of(refused)]


async def test_unreadable_orphans_are_recorded_and_retried(
    reconciled: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await left_image(reconciled)
    task_id = task_id_of(handle)
    with monkeypatch.context() as patch:
        at_the_edge(patch, reconciled, {handle.id: too_large})
        giving_back = await reconciled.client.start_workflow(
            "GiveBackWorkflow",
            {"task_id": task_id},
            id=give_back_id_of(task_id),
            task_queue=reconciled.task_queue,
        )

        async def is_recorded() -> bool:
            return task_id in await reasons(reconciled)

        await reconciled.until(is_recorded)
    await giving_back.result()
    assert await reasons(reconciled) == {}
    assert (await ended_without_its_run(reconciled, task_id)).status is TaskStatus.FAILED


async def test_a_give_back_leaves_a_paused_run_alone(reconciled: Platform) -> None:
    handle = await waiting_image(reconciled)
    await pause(reconciled.client, handle.id)
    giving_back = await reconciled.client.start_workflow(
        "GiveBackWorkflow",
        {"task_id": task_id_of(handle)},
        id=give_back_id_of(task_id_of(handle)),
        task_queue=reconciled.task_queue,
    )
    with pytest.raises(WorkflowFailureError) as refused:
        await giving_back.result()
    assert isinstance(refused.value.cause, ActivityError) and "paused" in str(refused.value.cause.cause)
    await unpause(reconciled.client, handle.id)
    await reconciled.cancel(handle)
    await ended(reconciled, handle)
