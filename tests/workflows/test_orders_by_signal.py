"""`cancel_task` and `confirm_price` as signals: they replay, also where an older worker has let one pass."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio
from temporalio import workflow
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowHistory
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer

from comfyui_temporal.contracts.continuation import ImageRun
from comfyui_temporal.contracts.fields import CallerModel
from comfyui_temporal.contracts.tasks import ImageResult
from comfyui_temporal.plugin import TasksPlugin
from store import TaskStore
from tests.workflows.books import ended
from tests.workflows.platform import Handle, Platform, running_platform
from tests.workflows.record_histories import HISTORIES
from worker import WORKFLOWS
from workflows import outside_call
from workflows.image_generation import ImageGenerationWorkflow
from workflows.training import TrainingWorkflow

Ordered = TypeVar("Ordered", bound=CallerModel)


@workflow.defn(name="ImageGenerationWorkflow")
class EarlierImage(ImageGenerationWorkflow):
    """An earlier release's image, which knew no such signal."""

    @workflow.run
    async def run(self, task: ImageRun) -> ImageResult:
        return await super().run(task)

    def ordered(self, _payload: bytes | None, _model: type[Ordered]) -> Ordered | None:
        return None


@pytest_asyncio.fixture
async def bare(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Platform]:
    """No worker yet."""
    async with running_platform(temporal_env, task_store, tmp_path, speed=2_000) as platform:
        platform.policy |= {"deadline_factor": 1_000.0}
        yield platform


async def test_what_an_earlier_worker_let_pass_leaves_no_run_stuck(bare: Platform) -> None:
    """The history has a cancel that did nothing: the newer worker, which replays it, must agree."""
    task = bare.image()
    await bare.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], at=0.3)
    async with bare.worker(flows=(EarlierImage, TrainingWorkflow)):
        handle = await bare.start(task)
        await bare.until_held(task["task_id"])
        await handle.signal("cancel_task", {"reason": "too early"})
        await bare.until_settled(handle)
    async with bare.worker(max_cached_workflows=0, max_concurrent_workflow_tasks=1):
        await bare.until_settled(handle)
        assert (await bare.progress(handle))["status"] == "running"
        assert await bare.cancel(handle) == "accepted"
        ending = await ended(bare, handle)
    assert (ending.status, ending.charged) == ("cancelled", 0)


async def test_a_build_that_does_not_know_a_patch_cannot_take_its_run_back() -> None:
    """Why a rollback keeps such runs on the newer build (docs/operations.md)."""
    history = json.loads((HISTORIES / "image_cancelled_by_signal.json").read_text())
    workflow_id = history["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    replayer = Replayer(workflows=[EarlierImage], plugins=[TasksPlugin()], debug_mode=True)
    with pytest.raises(workflow.NondeterminismError, match="orders-by-signal"):
        await replayer.replay_workflow(WorkflowHistory.from_json(workflow_id, history))


@pytest.mark.parametrize("is_training", [False, True], ids=["image", "training"])
async def test_a_cancel_that_came_while_a_local_try_outlived_its_workflow_task_replays(
    quick_platform: Platform, monkeypatch: pytest.MonkeyPatch, is_training: bool
) -> None:
    """As the update's does (test_replay.py): replayed, it comes with the start."""
    monkeypatch.setattr(outside_call, "LOCAL_TIMEOUT", timedelta(seconds=60))
    may_claim, claim = asyncio.Event(), quick_platform.store.claim

    async def claim_late(*arguments: Any, **named: Any) -> bool:
        await may_claim.wait()
        return await claim(*arguments, **named)

    monkeypatch.setattr(quick_platform.store, "claim", claim_late)
    task = quick_platform.training() if is_training else quick_platform.image()
    handle = await quick_platform.start(task, task_timeout=timedelta(seconds=1))
    await quick_platform.until(lambda: has_workflow_tasks(handle, 1))
    await handle.signal("cancel_task", {"reason": "at once"})
    await quick_platform.until(lambda: has_workflow_tasks(handle, 4))
    may_claim.set()
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == ("cancelled", 0)
    replayer = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin()], debug_mode=True)
    await replayer.replay_workflow(await handle.fetch_history())


async def has_workflow_tasks(handle: Handle, count: int) -> bool:
    events = [event.event_type async for event in handle.fetch_history_events()]
    return events.count(EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED) >= count


async def test_a_flood_of_confirmations_continues_as_new_and_is_not_forgotten(quick_platform: Platform) -> None:
    quick_platform.policy |= {"continue_as_new_signals": 5}
    handle = await quick_platform.start_training(max_credits=None)

    async def waits() -> bool:
        return bool((await quick_platform.progress(handle))["confirmation"])

    await quick_platform.until(waits)
    for points in (1, 2, 3, 1_000, 4, 5):
        await handle.signal("confirm_price", {"max_credits": points})
    assert (await ended(quick_platform, handle)).status == "completed"
