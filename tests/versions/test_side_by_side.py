"""Workers of two versions on one task queue: a run goes from one to the other and back, and its money stays correct.

The newer worker is today's code with fields that today's code does not know; today's code acts as the older worker.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import model_validator
from temporalio import workflow
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts import scenes
from comfyui_temporal.contracts.continuation import ImageRun, TrainingRun
from comfyui_temporal.contracts.give_back import give_back_id_of
from comfyui_temporal.contracts.handed_on import read_tolerantly
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TRAINING_WORKFLOW, ImageResult, TaskStatus, TrainingResult
from comfyui_temporal.runs import RunStatus, describe_run
from store import TaskStore
from tests.conftest import NewDatabase, unique
from tests.versions.words import NEW_FIELD, at, new_fields_in, with_new_fields
from tests.workflows.books import ended, ended_without_its_run, runs_of
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of
from tests.workflows.reset_scenarios import work_goes_on
from tests.workflows.resets import points_of, reset
from workflows.guards import validated_input
from workflows.image_generation import ImageGenerationWorkflow
from workflows.training import TrainingWorkflow

SIGNALS = 3
"""After so many a run continues as new."""
KEPT_FOR_SURE = [
    (),
    ("carried",),
    ("carried", "policy"),
    ("carried", "policy", "prices"),
    ("carried", "hold"),
    ("carried", "hold", "asked", 0),
    ("carried", "hold", "asked", 0, "request"),
    ("carried", "jobs", 0),
    ("carried", "record"),
    ("carried", "record", "state"),
    ("carried", "clock"),
    ("carried", "watch"),
    ("carried", "price"),
    ("carried", "dataset"),
    ("options",),
]
"""Places that no step of a waiting run empties."""
SPOILT = "in-words"


class NewerImageRun(ImageRun):
    """With a field for callers, and a charge that only this version can read."""

    style: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_in_words(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("carried") and given["carried"]["hold"]["charged"] == SPOILT:
            given["carried"]["hold"]["charged"] = 0
        return given


@workflow.defn(name=IMAGE_WORKFLOW)
class NewerImage(ImageGenerationWorkflow):
    """Passes on an unknown field in every object."""

    @workflow.init
    @validated_input
    def __init__(self, task: NewerImageRun) -> None:
        super().__init__(task)

    @workflow.run
    async def run(self, task: NewerImageRun) -> ImageResult:  # type: ignore[override]
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    def _continuation(self) -> ImageRun:
        document = with_new_fields(super()._continuation())
        return read_tolerantly(NewerImageRun, json.dumps(document).encode())


@workflow.defn(name=IMAGE_WORKFLOW)
class UnreadableImage(NewerImage):
    """Passes on what today's code cannot read."""

    @workflow.init
    @validated_input
    def __init__(self, task: NewerImageRun) -> None:
        super().__init__(task)

    @workflow.run
    async def run(self, task: NewerImageRun) -> ImageResult:  # type: ignore[override]
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    def _continuation(self) -> Any:
        document = super()._continuation().model_dump(mode="json")
        document["carried"]["hold"]["charged"] = SPOILT
        return document


class NewerTrainingRun(TrainingRun):
    style: str | None = None


@workflow.defn(name=TRAINING_WORKFLOW)
class NewerTraining(TrainingWorkflow):
    @workflow.init
    @validated_input
    def __init__(self, task: NewerTrainingRun) -> None:
        super().__init__(task)

    @workflow.run
    async def run(self, task: NewerTrainingRun) -> TrainingResult:  # type: ignore[override]
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    def _continuation(self) -> TrainingRun:
        document = with_new_fields(super()._continuation())
        return read_tolerantly(NewerTrainingRun, json.dumps(document).encode())


NEWER = (NewerImage, NewerTraining)


@pytest_asyncio.fixture
async def bare(temporal_env: WorkflowEnvironment, new_database: NewDatabase, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform without a worker, whose runs continue as new after some signals."""
    store = TaskStore(await new_database())
    async with running_platform(temporal_env, store, tmp_path, speed=2_000) as platform:
        platform.policy = {
            "deadline_factor": 5_000.0,
            "continue_as_new_signals": SIGNALS,
            # Another job's callback does not wake the run: a poll does.
            "poll_after_seconds": 0.2,
            "poll_at_most_seconds": 0.4,
        }
        yield platform
    await store.close()


async def waiting(platform: Platform, task: dict[str, Any]) -> Handle:
    """A task whose credits are held and whose job never ends by itself."""
    await platform.simulators.admin.comfyui.fault("job_stall", task_id=task["task_id"])
    handle = await platform.start(task)
    await platform.until_held(task["task_id"])
    await platform.until_settled(handle)
    return handle


async def continued(platform: Platform, handle: Handle) -> dict[str, Any]:
    """Make the run continue once more; what it passed on."""
    count = len(await runs_of(platform, handle))
    for sequence in range(SIGNALS):
        await platform.callback(handle, job_id="another", training_id="another", sequence=sequence)

    async def is_continued() -> bool:
        return len(await runs_of(platform, handle)) > count

    await platform.until(is_continued)
    newest = (await runs_of(platform, handle))[-1]
    async for event in newest.fetch_history_events():
        [payload] = event.workflow_execution_started_event_attributes.input.payloads
        document: dict[str, Any] = json.loads(payload.data)
        return document
    raise AssertionError("a run has no first event")


async def delivered(platform: Platform, handle: Handle) -> None:
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "finish")


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_run_goes_from_a_newer_worker_to_an_older_one_and_back(bare: Platform, kind: str) -> None:
    task = bare.image() if kind == "image" else bare.training()
    latest = bare.client.get_workflow_handle(f"task-{task['task_id']}")
    async with bare.worker(flows=NEWER):
        handle = await waiting(bare, task)
        by_newer = new_fields_in(await continued(bare, handle))
    assert by_newer >= set(KEPT_FOR_SURE)
    async with bare.worker():
        assert (await bare.progress(latest))["status"] in ("queued", "running")
        by_older = await continued(bare, handle)
    assert new_fields_in(by_older) >= set(KEPT_FOR_SURE), set(KEPT_FOR_SURE) - new_fields_in(by_older)
    assert at(by_older, ("carried", "hold", "asked", 0))["pre_deduct_id"]
    async with bare.worker(flows=NEWER):
        assert new_fields_in(await continued(bare, handle)) >= set(KEPT_FOR_SURE)
    async with bare.worker():
        await delivered(bare, handle)
        ending = await ended(bare, handle)
    assert ending.status is TaskStatus.COMPLETED and len(await runs_of(bare, handle)) >= 4
    assert len(await bare.simulators.admin.credits.holds(task["task_id"])) == 1
    assert len(await bare.simulators.admin.comfyui.jobs(task["task_id"])) == 1


async def failed_workflow_tasks(platform: Platform, handle: Handle) -> int:
    run = (await runs_of(platform, handle))[-1]
    described = (await run.describe()).raw_description
    return described.pending_workflow_task.attempt


@pytest.mark.slow
async def test_what_an_older_worker_cannot_read_waits_for_the_newer_one(bare: Platform) -> None:
    """Neither the run nor its hold ends: only workflow tasks fail, until a worker that can read them takes one."""
    task = bare.image()
    async with bare.worker(flows=[UnreadableImage, TrainingWorkflow]):
        handle = await waiting(bare, task)
        document = await continued(bare, handle)
    assert document["carried"]["hold"]["charged"] == SPOILT
    async with bare.worker():

        async def fails_again_and_again() -> bool:
            return await failed_workflow_tasks(bare, handle) >= 2

        await bare.until(fails_again_and_again)
    run = await describe_run(bare.client, handle.id, rpc_timeout=timedelta(seconds=5))
    assert run.status is RunStatus.RUNNING
    [hold] = await bare.simulators.admin.credits.holds(task["task_id"])
    assert hold.phase == "open"
    async with bare.worker(flows=[UnreadableImage, TrainingWorkflow]):
        await delivered(bare, handle)
        ending = await ended(bare, handle, exempt={"bug"})
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


async def test_a_run_that_a_newer_worker_began_with_a_new_field_goes_on_on_an_older_one(bare: Platform) -> None:
    """Its history is replayed and its input is read again, with the new field."""
    task = bare.image(style="etching")
    async with bare.worker(flows=NEWER):
        handle = await waiting(bare, task)
    async with bare.worker():
        assert (await bare.progress(handle))["status"] in ("queued", "running")
        document = await continued(bare, handle)
        assert document["style"] == "etching"
        await delivered(bare, handle)
        ending = await ended(bare, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_run_that_a_newer_worker_began_with_a_new_field_is_reset_on_an_older_one(
    bare: Platform, kind: str
) -> None:
    """Nothing of it is replayed: it was accepted all the same. A caller's same input is still refused."""
    task = bare.image(style="etching") if kind == "image" else bare.training(style="etching")
    async with bare.worker(flows=NEWER):
        handle = await waiting(bare, task)
    async with bare.worker():
        run = await reset(bare, handle, (await points_of(bare, handle))[0])
        async with work_goes_on(bare, run):
            ending = await ended(bare, run)
        assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24 if kind == "image" else 120)
        afresh = await bare.start(task | {"task_id": unique("afresh")})
        with pytest.raises(WorkflowFailureError) as failed:
            await afresh.result()
    assert isinstance(failed.value.cause, ApplicationError) and failed.value.cause.type == "input_invalid"


@pytest.mark.slow
async def test_what_a_newer_workers_run_left_is_given_back_by_an_older_one(bare: Platform) -> None:
    """With unknown fields it is given back; what cannot be read stops it visibly until a worker comes that can."""
    readable, unreadable = bare.image(), bare.image()
    async with bare.worker(flows=NEWER):
        left = await waiting(bare, readable)
        await continued(bare, left)
    async with bare.worker(flows=[UnreadableImage, TrainingWorkflow]):
        spoilt = await waiting(bare, unreadable)
        await continued(bare, spoilt)
    await bare.client.get_workflow_handle(left.id).terminate("by a test")
    await bare.client.get_workflow_handle(spoilt.id).terminate("by a test")
    async with bare.worker():
        first, second = [await begun_give_back(bare, handle) for handle in (left, spoilt)]
        await first.result()
        assert (await ended_without_its_run(bare, readable["task_id"])).status is TaskStatus.FAILED

        async def is_recorded() -> str:
            unseen = {task.task_id: task.reason for task in await bare.store.unseen_tasks()}
            return unseen.get(unreadable["task_id"], "")

        assert "carried.hold.charged" in await bare.until(is_recorded)
        [hold] = await bare.simulators.admin.credits.holds(unreadable["task_id"])
        assert hold.phase == "open"
        with pytest.MonkeyPatch.context() as patch:
            newer = replace(scenes.SCENE_OF_WORKFLOW[IMAGE_WORKFLOW], run=NewerImageRun)
            patch.setitem(scenes.SCENE_OF_WORKFLOW, IMAGE_WORKFLOW, newer)
            await second.result()
    assert (await ended_without_its_run(bare, unreadable["task_id"])).status is TaskStatus.FAILED
    assert await bare.store.unseen_tasks() == []


async def begun_give_back(platform: Platform, handle: Handle) -> Handle:
    task_id = task_id_of(handle)
    return await platform.client.start_workflow(
        "GiveBackWorkflow",
        {"task_id": task_id, NEW_FIELD: "of a newer gateway"},
        id=give_back_id_of(task_id),
        task_queue=platform.task_queue,
    )
