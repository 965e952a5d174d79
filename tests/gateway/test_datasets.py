"""`GET /api/v1/datasets`: what a tenant may train on, read by a worker, and nothing of another tenant's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from comfyui_temporal.contracts.datasets import DATASET_LIST_PREFIX
from comfyui_temporal.contracts.permissions import Scope
from tests.conftest import unique
from tests.gateway.conftest import Api
from tests.gateway.serving import bearer, served, token_for

DATASETS = "/api/v1/datasets"


def dataset_of(api: Api, tenant: str, name: str, files: int = 2) -> None:
    folder = api.platform.folder / "datasets" / tenant / name
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text("a picture")


async def datasets(api: Api, tenant: str) -> httpx.Response:
    return await api.http.get(DATASETS, headers=bearer(token_for(tenant)), timeout=20)


async def test_a_tenant_sees_its_own_datasets_alone(api: Api) -> None:
    mine, others = unique("tenant"), unique("tenant")
    dataset_of(api, mine, "faces")
    dataset_of(api, others, "secret", files=1)

    answer = await datasets(api, mine)

    assert answer.status_code == 200, answer.text
    address = (api.platform.folder / "datasets" / mine / "faces").as_uri() + "/"
    row = {"dataset_id": "faces", "source_uri": address, "name": "faces"}
    counted = {"file_count": 2, "total_bytes": 18, "is_whole": True}
    assert answer.json() == {"datasets": [row | counted], "is_whole": True}
    assert [row["name"] for row in (await datasets(api, others)).json()["datasets"]] == ["secret"]


async def test_a_dataset_is_trained_on_as_it_is_listed(api: Api) -> None:
    dataset_of(api, "tenant-demo", name := f"猫 {unique('of')}")
    token = token_for("tenant-demo", "user-demo")
    listed = (await api.http.get(DATASETS, headers=bearer(token), timeout=20)).json()["datasets"]
    (found,) = [row for row in listed if row["name"] == name]
    order: dict[str, Any] = {
        "template_id": "lora-train",
        "dataset": {"dataset_id": found["dataset_id"], "source_uri": found["source_uri"]},
        "hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.001},
        "max_credits": 100_000,
    }
    started = await api.call("POST", "/trainings", order)
    task_id = started.json()["task_id"]
    await api.call("POST", f"/{task_id}/confirm-price", {"max_credits": 100_000})
    task = await api.ended(task_id)
    assert task["status"] == "completed", task["error"]


async def test_a_list_is_read_once_for_a_tenant_in_a_while(api: Api) -> None:
    tenant = unique("tenant")
    answers = await asyncio.gather(*(datasets(api, tenant) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    handle = api.platform.client.get_workflow_handle(f"{DATASET_LIST_PREFIX}{tenant}")
    first = (await handle.describe()).run_id
    assert (await datasets(api, tenant)).status_code == 200
    assert (await handle.describe()).run_id == first


async def test_it_needs_the_right_to_read(api: Api) -> None:
    token = token_for("tenant-demo", scopes=[Scope.MODEL_TRAIN])
    assert (await api.http.get(DATASETS, headers=bearer(token))).status_code == 403
    assert (await api.http.get(DATASETS)).status_code == 401


async def test_where_users_are_kept_apart_no_dataset_is_listed(api: Api) -> None:
    tenant = unique("tenant")
    dataset_of(api, tenant, "faces")
    async with served(
        api.platform.client, api.platform.store, task_queue=api.platform.task_queue, own_tasks_only=True
    ) as gateway:
        answer = await gateway.http.get(DATASETS, headers=bearer(token_for(tenant)), timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (503, "route_not_offered")
    assert "faces" not in answer.text


async def test_a_storage_that_cannot_be_read_is_said_without_its_address(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = unique("tenant")
    folder = api.platform.folder / "datasets" / tenant
    folder.mkdir(parents=True)

    async def away(_self: object) -> list[str]:
        raise OSError(f"{folder} is away")

    with monkeypatch.context() as broken:
        broken.setattr("activities.object_folders.ObjectFolder.folders", away)
        refused = await datasets(api, tenant)
    assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
    assert str(folder) not in refused.text
    assert (await datasets(api, tenant)).status_code == 200


@pytest.mark.slow
async def test_without_a_worker_that_is_said(api: Api) -> None:
    async with served(api.platform.client, api.platform.store, task_queue=unique("nobody")) as gateway:
        answer = await gateway.http.get(DATASETS, headers=bearer(token_for(unique("tenant"))), timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (503, "worker_unavailable")
