"""Images that use what their tenant trained: checked before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.permissions import Scene
from store import TaskStore
from tests.conftest import unique
from tests.gateway.conftest import Api
from tests.gateway.serving import served, token_for
from tests.store.facts import claim_of, end, write_of


async def task_of(store: TaskStore, tenant_id: str, *, user_id: str = "ada", **fields: Any) -> str:
    """A task as the store has it: a completed training, unless the fields say otherwise."""
    task_id, status = unique("trained"), fields.pop("status", "completed")
    await store.claim(claim_of(task_id, tenant_id=tenant_id, user_id=user_id, **{"scene": Scene.MODEL_TRAIN, **fields}))
    facts = [end()] if status == "completed" else []
    output = TrainingOutput(model_path=f"s3://models/{task_id}.safetensors")
    await store.write(write_of(task_id, *facts, status=status, output=output))
    return task_id


def order(*model_ids: str, **fields: Any) -> dict[str, Any]:
    loras = [{"model_id": model_id} for model_id in model_ids]
    return {"template_id": "text-to-image", "prompt": "a cat", "loras": loras, **fields}


async def test_what_was_trained_through_the_gateway_is_used_through_it(api: Api) -> None:
    dataset = api.platform.training()["dataset"]
    training = {
        "template_id": "lora-train",
        "dataset": dataset,
        "hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.001},
        "max_credits": 1_000,
    }
    trained = await api.ended((await api.call("POST", "/trainings", training)).json()["task_id"])
    assert trained["status"] == "completed", trained
    started = await api.call("POST", "/images", order(trained["task_id"]))
    assert started.status_code == 202, started.text
    image = await api.ended(started.json()["task_id"])
    assert image["status"] == "completed", image
    assert image["input"]["loras"] == [{"model_id": trained["task_id"], "strength": 1.0}]
    again = await api.call("POST", "/images", order(trained["task_id"], task_id=image["task_id"]))
    assert again.status_code == 200, again.text


@pytest.mark.parametrize("of", ["nobody", "another tenant", "an open training", "an image"])
async def test_a_model_that_is_not_the_tenants_is_refused_in_the_same_words(api: Api, of: str) -> None:
    store, tenant = api.platform.store, unique("tenant")
    match of:
        case "nobody":
            model_id = unique("trained")
        case "another tenant":
            model_id = await task_of(store, unique("tenant"))
        case "an open training":
            model_id = await task_of(store, tenant, status="running")
        case _:
            model_id = await task_of(store, tenant, scene=Scene.IMAGE_GENERATE)
    own, task_id = await task_of(store, tenant), unique("image")
    at_address = {"model_url": "https://models.example.org/a", "sha256": "b" * 64}
    body = order(task_id=task_id) | {"loras": [at_address, {"model_id": own}, {"model_id": model_id}]}
    refused = await api.call("POST", "/images", body, token=token_for(tenant, "ada"))
    assert refused.status_code == 422
    assert refused.json()["code"] == "input_invalid"
    message = f"this tenant has no completed training {model_id}"
    assert refused.json()["fields"] == [{"field": "loras.2.model_id", "message": message}]
    assert (await api.call("GET", f"/{task_id}", token=token_for(tenant, "ada"))).status_code == 404


async def test_where_users_are_kept_apart_a_colleagues_model_is_unknown(api: Api) -> None:
    platform, tenant = api.platform, unique("tenant")
    adas = await task_of(platform.store, tenant, user_id="ada")
    body = order(adas, task_id=unique("image"))
    async with served(platform.client, platform.store, task_queue=platform.task_queue, own_tasks_only=True) as gateway:
        apart = Api(platform, gateway)
        refused = await apart.call("POST", "/images", body, token=token_for(tenant, "ben"))
        assert refused.status_code == 422
        assert refused.json()["fields"][0]["field"] == "loras.0.model_id"
        started = await apart.call("POST", "/images", body, token=token_for(tenant, "ada"))
    assert started.status_code == 202, started.text
