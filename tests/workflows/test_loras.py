"""Images that use what their tenant trained: found at the claim, sent with each attempt, charged once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import ValidationError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.prices import PriceTable, UnknownPrice
from comfyui_temporal.contracts.task_store import TrainedModel
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus, input_document
from store import TaskStore
from tests.conftest import unique
from tests.store.facts import claim_of, end, write_of
from tests.workflows.books import ended, runs_of
from tests.workflows.payers import kinds_of
from tests.workflows.platform import Platform, running_platform, sent, task_id_of

HD = 18 + 6
URL = "https://models.example.org/style.safetensors"
TENANT = "tenant-demo"


@pytest_asyncio.fixture
async def priced(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform whose price table asks five points of each LoRA."""
    running = running_platform(temporal_env, task_store, tmp_path, speed=2_000, prices=PriceTable(lora=5))
    async with running as platform, platform.worker():
        yield platform


async def trained(store: TaskStore, tenant_id: str = TENANT, *, status: str = "completed", **fields: Any) -> str:
    """A training as the store has it, by its task id."""
    task_id = unique("trained")
    await store.claim(claim_of(task_id, tenant_id=tenant_id, **{"scene": Scene.MODEL_TRAIN, **fields}))
    output = TrainingOutput(model_path=f"s3://models/{task_id}.safetensors", sha256="a" * 64)
    is_over = status == "completed"
    await store.write(write_of(task_id, *([end()] if is_over else []), status=status, output=output))
    return task_id


async def test_what_a_task_trained_is_used_by_another_and_charged_once(priced: Platform) -> None:
    """Two attempts, and a run that continues as new between them: it is looked up once."""
    training = await priced.start_training()
    output = (await ended(priced, training)).result["output"]
    assert len(output["sha256"]) == 64
    priced.policy |= {"retry_after_seconds": [0.5], "continue_as_new_events": 5}
    task = priced.image(loras=[{"model_id": task_id_of(training), "strength": 0.8}])
    await priced.simulators.admin.comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    handle = await priced.start(task)
    ending = await ended(priced, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["attempts"] == 2
    assert ending.charged == HD + 5
    bodies = [[call["body"] for call in await sent(run, "submit_job")] for run in await runs_of(priced, handle)]
    assert bodies[0] and not bodies[0][1:], "the second attempt is a later run's"
    wanted = [{"model_path": output["model_path"], "sha256": output["sha256"], "strength": 0.8}]
    assert [body["loras"] for of_run in bodies for body in of_run] == [wanted, wanted]
    row = await priced.store.task(task["task_id"])
    assert row is not None
    assert (row.prices.job, row.prices.estimate, row.prices.table) == (HD + 5, HD + 5, HD + 5)


@pytest.mark.parametrize("of", ["nobody", "another tenant", "an open training", "an image"])
async def test_a_model_that_is_not_the_tenants_ends_the_task_before_anything_begins(
    quick_platform: Platform, of: str
) -> None:
    store = quick_platform.store
    match of:
        case "nobody":
            model_id = unique("trained")
        case "another tenant":
            model_id = await trained(store, "tenant-other")
        case "an open training":
            model_id = await trained(store, status="running")
        case _:
            model_id = await trained(store, scene=Scene.IMAGE_GENERATE)
    own = await trained(store)
    handle = await quick_platform.start_image(loras=[{"model_id": own}, {"model_id": model_id}])
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "input_invalid")
    sentence = f"loras.1.model_id: this tenant has no completed training {model_id}."
    assert ending.result["error_details"]["message"] == f"The input is not valid: {sentence}"
    assert await sent(handle, "submit_job") == []
    assert await kinds_of(quick_platform, handle) == []


async def test_the_store_names_models_of_one_tenant_or_user_alone(quick_platform: Platform) -> None:
    store = quick_platform.store
    ada = await trained(store, user_id="ada")
    ben = await trained(store, user_id="ben")
    model = TrainedModel(model_id=ada, model_path=f"s3://models/{ada}.safetensors", sha256="a" * 64)
    assert await store.models(TENANT, [ada, ben], user_id="ada") == [model]
    assert {found.model_id for found in await store.models(TENANT, [ada, ben])} == {ada, ben}
    assert await store.models("tenant-other", [ada, ben]) == []


async def test_a_model_at_an_address_is_sent_as_given_and_costs_the_same(priced: Platform) -> None:
    own = await trained(priced.store)
    lora = {"model_url": URL, "sha256": "b" * 64, "strength": 0.4}
    refused = await priced.start_image(loras=[lora | {"model_url": "https://evil.example.com/a"}])
    ending = await ended(priced, refused)
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "input_invalid")
    assert await kinds_of(priced, refused) == []
    handle = await priced.start_image(loras=[lora])
    ending = await ended(priced, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD + 5)
    [call] = await sent(handle, "submit_job")
    assert call["body"]["loras"] == [{"model_path": URL, "sha256": "b" * 64, "strength": 0.4}]
    handle = await priced.start_image(loras=[lora, {"model_id": own}, {"model_id": "unknown"}])
    ending = await ended(priced, handle)
    assert "loras.2.model_id: this tenant has no completed training unknown" in str(ending.result["error_details"])


def test_a_lora_costs_nothing_unless_the_table_says_so() -> None:
    table = PriceTable()
    assert table.image(resolution="hd", accelerated=False, extras={}, loras=3) == HD
    assert table.points_of_extras({}, loras=3) == {}
    table = PriceTable(lora=4)
    assert table.image(resolution="hd", accelerated=False, extras={}, loras=3) == HD + 12
    assert table.points_of_extras({"hires_fix": True}, loras=3) == {"hires_fix": 8, "loras": 12}
    with pytest.raises(UnknownPrice):
        table.points_of_extras({"loras": 1})


def test_a_task_without_loras_is_what_it_was() -> None:
    """A worker that does not know the field takes it, and its stored input has no new field."""
    ids = {"task_id": "t", "tenant_id": "a", "user_id": "b"}
    task = ImageTask.model_validate({**ids, "template_id": "text-to-image", "prompt": "a cat", "loras": []})
    assert "loras" not in task.model_dump_json()
    document = input_document(task)
    assert document is not None and "loras" not in document


@pytest.mark.parametrize(
    "loras",
    [
        [{"model_id": "a"}] * 2,
        [{"model_id": "a", "strength": 2.1}],
        [{"model_id": f"m{n}"} for n in range(9)],
        [{}],
        [{"model_url": URL}],
        [{"model_id": "a", "sha256": "b" * 64}],
        [{"model_id": "a", "model_url": URL, "sha256": "b" * 64}],
        [{"model_url": URL, "sha256": "b" * 64}] * 2,
        [{"model_url": "http" + URL[5:], "sha256": "b" * 64}],
        [{"model_url": "https://user:secret@models.example.org/a", "sha256": "b" * 64}],
        [{"model_url": "https:///a", "sha256": "b" * 64}],
        [{"model_url": URL + " ", "sha256": "b" * 64}],
        [{"model_url": URL, "sha256": "B" * 64}],
    ],
)
def test_loras_out_of_range_are_refused(loras: list[dict[str, object]]) -> None:
    ids = {"task_id": "t", "tenant_id": "a", "user_id": "b"}
    with pytest.raises(ValidationError, match="loras"):
        ImageTask.model_validate({**ids, "template_id": "text-to-image", "prompt": "a cat", "loras": loras})
