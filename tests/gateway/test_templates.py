"""`GET /api/v1/templates`: what ComfyUI offers, read by a worker, for a tenant's eyes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from bridge.template_library import SHIPPED, load_library
from bridge.template_list import listed
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.templates import TEMPLATE_LIST_PREFIX, ListedTemplate
from tests.conftest import unique
from tests.gateway.conftest import Api
from tests.gateway.serving import bearer, served, token_for

TEMPLATES = "/api/v1/templates"


async def templates(api: Api, tenant: str) -> httpx.Response:
    """As read by a user of the tenant; each tenant's list is read for itself."""
    return await api.http.get(TEMPLATES, headers=bearer(token_for(tenant)), timeout=20)


async def test_templates_have_inputs_and_prices_and_name_no_server(api: Api) -> None:
    answer = await templates(api, unique("tenant"))

    assert answer.status_code == 200, answer.text
    rows: dict[str, Any] = {row["template_id"]: row for row in answer.json()["templates"]}
    assert sorted(rows) == ["image-to-image", "lora-train", "test-pattern", "text-to-image", "upscale"]
    text = rows["text-to-image"]
    assert {name: row["points"] for name, row in text["resolutions"].items()} == {"sd": 18, "hd": 24, "4k": 32}
    assert text["extras"]["hires_fix"] | {"type": "boolean", "points": 8} == text["extras"]["hires_fix"]
    assert (text["accelerated_points"], text["is_available"]) == (12, True)
    assert rows["upscale"]["controls"] == [{"kind": None, "required": True, "strength": False}]
    assert rows["lora-train"]["base_models"]["sdxl"]["points"] == 30
    for word in ("servers", "pool", "rtx4090"):
        assert word not in answer.text, "what runs it is no tenant's affair"


async def test_a_list_is_read_once_for_a_tenant_in_a_while(api: Api) -> None:
    tenant = unique("tenant")
    answers = await asyncio.gather(*(templates(api, tenant) for _ in range(5)))
    answers.append(await templates(api, tenant))

    assert {answer.status_code for answer in answers} == {200}
    handle = api.platform.client.get_workflow_handle(f"{TEMPLATE_LIST_PREFIX}{tenant}")
    first = (await handle.describe()).run_id
    assert (await templates(api, tenant)).status_code == 200
    assert (await handle.describe()).run_id == first


async def test_where_comfyui_lists_none_that_is_said(api: Api) -> None:
    faults, tenant = api.platform.simulators.admin.comfyui, unique("tenant")
    fault = await faults.fault("not_offered", route="list_templates", times=None)
    try:
        answer = await templates(api, tenant)
        again = await templates(api, tenant)
    finally:
        await faults.remove_fault(fault)
    for refused in (answer, again):
        assert (refused.status_code, refused.json()["code"]) == (503, "route_not_offered")
        assert int(refused.headers["retry-after"]) == 30


async def test_while_comfyui_fails_that_is_said_without_its_address_and_the_next_request_reads_again(api: Api) -> None:
    faults, tenant = api.platform.simulators.admin.comfyui, unique("tenant")
    await faults.fault("error", route="list_templates", times=1)
    refused = await templates(api, tenant)
    answer = await templates(api, tenant)
    assert (refused.status_code, refused.json()["code"]) == (503, "comfyui_unavailable")
    assert "http" not in refused.json()["detail"]
    assert answer.status_code == 200


@pytest.mark.slow
async def test_without_a_worker_that_is_said(api: Api) -> None:
    async with served(api.platform.client, api.platform.store, task_queue=unique("nobody")) as gateway:
        answer = await gateway.http.get(TEMPLATES, headers=bearer(token_for(unique("tenant"))), timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (503, "worker_unavailable")


def test_the_bridges_own_list_is_read_whole() -> None:
    """What the bridge says, field by field: nothing that a tenant may see is lost on the way."""
    rows = listed(load_library(SHIPPED), PriceTable(), [])
    for row in rows:
        view = ListedTemplate.model_validate(row).for_tenants()
        assert view.is_available is False, "there is no server"
        shown = view.model_dump()
        hidden = {"servers", "pool"}
        assert set(row) - set(shown) == hidden
        for name, value in row.items():
            if name in hidden:
                continue
            if isinstance(value, dict) and name in ("extras", "resolutions", "base_models"):
                kept = {key: {field: shown[name][key][field] for field in entry} for key, entry in value.items()}
                assert kept == value
            else:
                assert shown[name] == value
