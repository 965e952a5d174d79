"""ComfyUI's calls as a workflow gets them: what an activity adds to the call itself."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.comfyui import ComfyUIActivities, ComfyUIClient
from comfyui_temporal.contracts.calls import GpuQuestion, Post
from comfyui_temporal.contracts.comfyui import DatasetSnapshot, SnapshotReference, TaskPriority, TrainingDraft
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.templates import MAX_TEMPLATES, TemplateQuestion
from tests.activities.calls import call_for, tokens
from tests.activities.loopback import Answer, Seen, always, error_body, serving
from tests.activities.test_running_call import NO_TASKS_RUN, comfyui_before, environment

WHO = TemplateQuestion(tenant_id="tenant-demo", user_id="user-demo")
ACCEPTED = {"training_id": "training-1", "training_status": "queued", "gpu_hours": 1.5}


class SlowSnapshots:
    """A list of files that takes a while to be read."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def whole(self, reference: SnapshotReference) -> DatasetSnapshot:
        await asyncio.sleep(self._seconds)
        return DatasetSnapshot(dataset_id=reference.dataset_id, snapshot_uri=reference.snapshot_uri, files=[])


def draft() -> Post[TrainingDraft]:
    uri = "s3://temporary/snapshots/task-1/cats/files/"
    dataset = SnapshotReference(dataset_id="cats", snapshot_uri=uri)
    body = TrainingDraft(
        task_id="task-1",
        tenant_id="tenant-demo",
        user_id="user-demo",
        base_model="base",
        dataset=dataset,
        hyperparameters={"epochs": 1, "batch_size": 1, "learning_rate": 0.1},
        priority=TaskPriority.STANDARD,
        callback_url="http://127.0.0.1:1/callbacks/comfyui/task-1",
    )
    return Post(call_for=call_for(scene=Scene.MODEL_TRAIN), key="task-1:submit:1", body=body)


async def created(answer: Answer, *, reading: float, within: float) -> Any:
    """`create_training` with a list that is read for so long, ComfyUI's answer and the activity's time limit."""
    env = environment(start_to_close_timeout=timedelta(seconds=within), activity_type="create_training")
    async with serving(answer) as server, ComfyUIClient(server.url, tokens()) as client:
        activities = ComfyUIActivities(client, NO_TASKS_RUN, SlowSnapshots(reading))
        return (await env.run(activities.create_training, draft())).reply


async def test_a_training_is_created_in_the_time_that_reading_its_files_left() -> None:
    async def slow(request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        await always(202, ACCEPTED)(request, writer)

    assert (await created(slow, reading=0.1, within=10)).training_id == "training-1"


async def test_a_training_that_is_not_answered_fails_before_its_activity_times_out() -> None:
    """Otherwise Temporal would report a time-out, without a word about who did not answer."""

    async def silent(request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    began = time.monotonic()
    with pytest.raises(ApplicationError, match="POST /comfyui/v1/training") as raised:
        await created(silent, reading=1.0, within=3.0)
    assert raised.value.type == "comfyui_unavailable"
    assert time.monotonic() - began < 4


async def test_of_a_long_list_of_gpus_a_workflow_gets_the_requested_type() -> None:
    listed = [{"gpu_type": f"gpu-{number}", "total": 1, "available": 1} for number in range(500)]
    question = GpuQuestion(**call_for(scene=Scene.MODEL_TRAIN).model_dump(), gpu_type="gpu-499")
    async with comfyui_before(always(200, listed)) as (_, activities):
        answer = await environment(activity_type="list_gpus").run(activities.list_gpus, question)
    assert answer.reply is not None
    assert [pool.gpu_type for pool in answer.reply] == ["gpu-499"]


@pytest.mark.parametrize("reply", [always(501), always(422, error_body("payload_invalid", "42201"))])
async def test_where_no_gpus_are_listed_a_workflow_learns_why(reply: Answer) -> None:
    question = GpuQuestion(**call_for(scene=Scene.MODEL_TRAIN).model_dump())
    async with comfyui_before(reply) as (_, activities):
        answer = await environment(activity_type="list_gpus").run(activities.list_gpus, question)
    assert answer.reply is None
    assert answer.not_offered != (answer.refusal is not None)


async def test_of_a_very_long_list_of_templates_the_first_are_shown_without_their_servers() -> None:
    each = {"scene": "image.generate", "servers": {"total": 1, "fit": 0}}
    listed = [{"template_id": f"template-{number}", **each} for number in range(MAX_TEMPLATES + 1)]
    async with comfyui_before(always(200, listed)) as (_, activities):
        shown = (await environment(activity_type="list_templates").run(activities.list_templates, WHO)).templates
    assert shown is not None
    assert [view.template_id for view in shown] == [f"template-{number}" for number in range(MAX_TEMPLATES)]
    assert not any(view.is_available or hasattr(view, "servers") for view in shown)


async def test_a_comfyui_that_lists_no_templates_is_not_one_without_any() -> None:
    env = environment(activity_type="list_templates")
    async with comfyui_before(always(404)) as (server, activities):
        assert (await env.run(activities.list_templates, WHO)).templates is None
        server.answer = always(200, [])
        assert (await env.run(activities.list_templates, WHO)).templates == []


async def test_a_refused_list_of_templates_is_a_failure_that_no_repeat_helps() -> None:
    env = environment(activity_type="list_templates")
    async with comfyui_before(always(403, error_body("authorization_missing", "40302"))) as (_, activities):
        with pytest.raises(ApplicationError, match="authorization_missing") as raised:
            await env.run(activities.list_templates, WHO)
    assert (raised.value.type, raised.value.non_retryable) == ("not_authorized", True)
