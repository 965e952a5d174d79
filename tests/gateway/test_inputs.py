"""What was asked for, as callers read it back and search it; and the tenant at a glance."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from comfyui_temporal.contracts.tasks import ImageTask, TrainingTask, input_document
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from gateway.inputs import StoredInputs
from store import StoredInput, TaskStore
from tests.conftest import unique
from tests.gateway.conftest import DEMO_TOKEN, OTHER_TOKEN, Api
from tests.gateway.serving import bearer, token_for
from tests.store.facts import claim_of, end, fact, new_task_id, write_of

IDS = {"tenant_id": "tenant-demo", "user_id": "user-demo"}


async def found(api: Api, text: str, *, token: str = DEMO_TOKEN) -> list[str]:
    answer = await api.http.get("/api/v1/tasks", params={"text": text}, headers=bearer(token))
    assert answer.status_code == 200, answer.text
    return [task["task_id"] for task in answer.json()["tasks"]]


async def test_what_was_asked_for_is_read_back_and_can_be_ordered_again(api: Api) -> None:
    order = {
        "template_id": "text-to-image",
        "prompt": "a lighthouse at dusk",
        "resolution": "4k",
        "extras": {"seed": 7},
        "max_credits": 90,
    }
    first = await api.ended((await api.call("POST", "/images", order)).json()["task_id"])
    listed = (await api.call("GET", "?limit=1")).json()["tasks"][0]

    assert first["input"] == order | {"priority": "standard", "controls": []}
    assert listed["input"] == first["input"]
    again = await api.call("POST", "/images", first["input"])
    assert again.status_code == 202, again.text
    second = await api.ended(again.json()["task_id"])
    assert second["input"] == first["input"] and second["task_id"] != first["task_id"]


async def test_tasks_are_found_by_a_part_of_their_prompt_or_id_and_no_foreign_ones(api: Api) -> None:
    word = unique("Heron")
    body = {"template_id": "text-to-image", "prompt": f"a {word} at 100% zoom_level"}
    task_id = (await api.ended((await api.call("POST", "/images", body)).json()["task_id"]))["task_id"]

    assert await found(api, word.lower()) == [task_id]
    assert await found(api, task_id[3:]) == [task_id]
    assert await found(api, f"{word} at 100% zoom_") == [task_id]
    assert await found(api, f"{word}%zoom") == [], "a percent sign is a percent sign"
    assert await found(api, word, token=OTHER_TOKEN) == []


async def test_a_list_leaves_a_datasets_files_out_and_the_task_has_them(api: Api) -> None:
    tenant, task_id = unique("tenant"), new_task_id()
    given = {"dataset": {"dataset_id": "faces", "source_uri": "s3://faces/", "files": ["1.png", "2.png"]}}
    activities_claim = claim_of(task_id, tenant_id=tenant)
    await api.platform.store.claim(activities_claim, given=StoredInput(document=given))
    token = token_for(tenant, "user-a")

    listed = (await api.call("GET", "", token=token)).json()["tasks"][0]
    task = (await api.call("GET", f"/{task_id}", token=token)).json()

    assert "files" not in listed["input"]["dataset"]
    assert task["input"] == given


def test_an_input_is_kept_whole_or_not_at_all() -> None:
    training: dict[str, Any] = {
        "task_id": "t",
        **IDS,
        "template_id": "lora-train",
        "dataset": {"dataset_id": "faces", "source_uri": "s3://faces/", "files": ["1.png"]},
        "hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.1},
    }
    kept = input_document(TrainingTask.model_validate(training))
    assert kept is not None and "task_id" not in kept and "max_credits" not in kept and "options" not in kept
    long: dict[str, Any] = {**training["dataset"], "files": [f"{n:0500}.png" for n in range(600)]}
    assert input_document(TrainingTask.model_validate({**training, "dataset": long})) is None
    image = ImageTask(task_id="t", **IDS, template_id="t", prompt="p", options={"deadline_factor": 2})
    options = (input_document(image) or {})["options"]
    assert options == {"deadline_factor": 2}


async def test_inputs_of_a_key_that_was_removed_are_left_out_and_logged_once(task_store: TaskStore) -> None:
    ids = [new_task_id() for _ in range(3)]
    old, new = (PayloadEncryption([EncryptionKey(name, name.encode() * 16)]) for name in ("k1", "k2"))
    for task_id, key in zip(ids, (old, old, new), strict=True):
        sealed = key.sealed(json.dumps({"prompt": task_id}).encode())
        await task_store.claim(claim_of(task_id), given=StoredInput(sealed=sealed))
    inputs = StoredInputs(task_store, new)

    with capture_logs() as lines:
        seen = [await inputs.of_tasks(ids) for _ in range(2)]

    assert seen == [{ids[2]: {"prompt": ids[2]}}] * 2
    assert [(line["event"], line["code"]) for line in lines] == [("inputs_not_shown", "encryption_key_missing")]
    assert "'k1'" in lines[0]["detail"]


async def test_the_tenant_is_told_what_is_open_its_balance_and_what_its_token_allows(api: Api) -> None:
    tenant = unique("tenant")
    store = api.platform.store
    ids = [new_task_id() for _ in range(3)]
    for task_id in ids:
        await store.claim(claim_of(task_id, tenant_id=tenant))
    await store.write(write_of(ids[0], fact("a", balance_after=976), version=2))
    await store.write(write_of(ids[1], end(), version=2))
    token = token_for(tenant, "user-a", scopes=["task.read"])

    seen = (await api.http.get("/api/v1/tenant", headers=bearer(token))).json()

    assert (seen["tenant_id"], seen["user_id"], seen["operations"]) == (tenant, "user-a", ["read_comfyui", "read_task"])
    assert (seen["queued"], seen["running"], seen["balance"]) == (1, 1, 976)


@pytest.mark.parametrize("text", ["", "x" * 201])
async def test_a_search_that_is_none_is_refused(api: Api, text: str) -> None:
    answer = await api.http.get("/api/v1/tasks", params={"text": text}, headers=bearer(DEMO_TOKEN))
    assert answer.status_code == 422
