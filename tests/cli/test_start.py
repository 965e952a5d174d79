"""Starting: the same input under the same id is one task, another input touches nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from comfyui_temporal.client.errors import TaskExists
from comfyui_temporal.client.submission import start_task
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.command_line.inputs import check_list_fits, manifest
from comfyui_temporal.contracts.tasks import INPUT_MEMO, input_sha256_of, workflow_id_of
from tests.cli.conftest import image_task, training_task


async def test_the_same_input_started_twice_is_one_run(opened: Connection) -> None:
    task = image_task()
    first = await start_task(opened.client, task, task_queue=opened.task_queue)
    again = await start_task(opened.client, task, task_queue=opened.task_queue)
    assert (first.is_new, again.is_new) == (True, False)
    assert first.run_id == again.run_id
    await first.handle.signal("deliver")
    result = await again.handle.result()
    assert result.result_urls == ["http://127.0.0.1/results/job-1/0.png"]


async def test_a_finished_task_is_not_run_again(opened: Connection) -> None:
    task = image_task()
    first = await start_task(opened.client, task, task_queue=opened.task_queue)
    await first.handle.signal("deliver")
    await first.handle.result()
    again = await start_task(opened.client, task, task_queue=opened.task_queue)
    assert (again.is_new, again.run_id) == (False, first.run_id)


async def test_a_default_spelled_out_is_the_same_input(opened: Connection) -> None:
    task = image_task()
    spelled = image_task(task_id=task.task_id, resolution="hd", extras={}, max_credits=None, options={})
    assert input_sha256_of(task) == input_sha256_of(spelled)
    assert input_sha256_of(task) != input_sha256_of(image_task(task_id=task.task_id, resolution="4k"))


async def test_another_input_under_the_id_is_refused_and_touches_nothing(opened: Connection) -> None:
    task = image_task()
    first = await start_task(opened.client, task, task_queue=opened.task_queue)
    with pytest.raises(TaskExists, match=task.task_id):
        await start_task(opened.client, image_task(task_id=task.task_id, prompt="a dog"), task_queue=opened.task_queue)
    with pytest.raises(TaskExists):
        await start_task(opened.client, training_task(task_id=task.task_id), task_queue=opened.task_queue)
    description = await first.handle.describe()
    assert description.run_id == first.run_id
    assert (await description.memo())[INPUT_MEMO] == input_sha256_of(task)


async def test_a_run_started_by_another_client_without_memo_is_recognised(opened: Connection) -> None:
    task = image_task()
    await opened.client.start_workflow(
        "ImageGenerationWorkflow",
        {"task_id": task.task_id, "tenant_id": "tenant-a", "user_id": "ann", "prompt": "a cat"}
        | {"template_id": "text-to-image"},
        id=workflow_id_of(task.task_id),
        task_queue=opened.task_queue,
    )
    again = await start_task(opened.client, task, task_queue=opened.task_queue)
    assert not again.is_new
    with pytest.raises(TaskExists):
        await start_task(opened.client, image_task(task_id=task.task_id, prompt="a dog"), task_queue=opened.task_queue)


async def test_a_run_carries_what_operators_look_for(opened: Connection) -> None:
    task = image_task(priority="accelerated", prompt="a secret cat")
    started = await start_task(opened.client, task, task_queue=opened.task_queue)
    description = await started.handle.describe()
    attributes = {pair.key.name: pair.value for pair in description.typed_search_attributes}
    assert (
        attributes.items()
        >= {
            "TaskId": task.task_id,
            "TenantId": "tenant-a",
            "UserId": "ann",
            "Scene": "image.generate",
            "TemplateId": "text-to-image",
            "TaskPriority": "accelerated",
            "TaskStatus": "queued",
        }.items()
    )
    assert await description.static_summary() == "text-to-image, hd, accelerated, for tenant-a"
    priority = description.raw_info.priority
    assert (priority.priority_key, priority.fairness_key) == (1, "tenant-a")


def test_a_list_that_temporal_does_not_take_says_what_to_do() -> None:
    names = [f"{n:05}".ljust(200, "x") for n in range(10_000)]
    task = training_task()
    fits = task.model_copy(update={"dataset": task.dataset.model_copy(update={"files": names})})
    check_list_fits(fits)
    longer = fits.model_copy(
        update={"dataset": fits.dataset.model_copy(update={"files": [f"{n}{10 * chr(120)}" for n in names]})}
    )
    with pytest.raises(BadInput, match="--manifest"):
        check_list_fits(longer)


def test_a_manifest_on_this_machine_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["a.png"]')
    reference = manifest(str(tmp_path / "list.json"), None)
    sha256 = hashlib.sha256(b'["a.png"]').hexdigest()
    assert reference == {"uri": (tmp_path / "list.json").as_uri(), "sha256": sha256}
    assert manifest("s3://bucket/list.json", "0" * 64) == {"uri": "s3://bucket/list.json", "sha256": "0" * 64}
    assert manifest("s3://bucket/list.json", None) == {"uri": "s3://bucket/list.json"}, "it has no checksum then"
    with pytest.raises(BadInput, match="cannot be read"):
        manifest(str(tmp_path / "gone.json"), None)
