"""A tenant's limits at the gateway: 429 with Retry-After before anything is started, for all gateways together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from comfyui_temporal.contracts.tenant_limits import TenantLimits
from store import TaskStore
from tests.cable import cable_to_postgres
from tests.conftest import unique
from tests.gateway.serving import Gateway, bearer, gateway_process, served, token_for
from tests.waiting import until

LIMITS = TenantLimits(starts_per_minute=4, bytes_per_minute=2_000, open_tasks=10, open_streams=2)
IMAGE = {"template_id": "text-to-image", "prompt": "a lighthouse at dusk"}
TASKS = "/api/v1/tasks"


@pytest_asyncio.fixture
async def gateways(temporal_env: WorkflowEnvironment, postgres_dsn: str) -> AsyncIterator[list[Gateway]]:
    """Two, on one task store, with low limits; no worker takes the tasks."""
    async with AsyncExitStack() as stack:
        stores = [TaskStore(postgres_dsn), TaskStore(postgres_dsn)]
        for store in stores:
            stack.push_async_callback(store.close)
        yield [
            await stack.enter_async_context(
                served(temporal_env.client, store, task_queue=unique("nobody"), limits_of=lambda _tenant: LIMITS)
            )
            for store in stores
        ]


async def start(gateway: Gateway, tenant_id: str, **order: str) -> httpx.Response:
    headers = bearer(token_for(tenant_id))
    return await gateway.http.post(f"{TASKS}/images", json={**IMAGE, **order}, headers=headers)


async def test_starts_beyond_the_limit_are_refused_by_both_and_start_nothing(
    gateways: list[Gateway], temporal_env: WorkflowEnvironment
) -> None:
    tenant_id = unique("tenant")
    task_ids = [f"{tenant_id}-{n}" for n in range(10)]
    answers = await asyncio.gather(
        *(start(gateways[n % 2], tenant_id, task_id=task_id) for n, task_id in enumerate(task_ids))
    )
    assert sorted(answer.status_code for answer in answers) == [202] * 4 + [429] * 6
    for answer, task_id in zip(answers, task_ids, strict=True):
        assert '"starts";q=4;w=60' in answer.headers["RateLimit-Policy"]
        assert '"starts";r=' in answer.headers["RateLimit"]
        if answer.status_code == 429:
            assert answer.json()["code"] == "rate_limited" and tenant_id in answer.json()["detail"]
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            with pytest.raises(Exception, match="not found"):
                await temporal_env.client.get_workflow_handle(f"task-{task_id}").describe()
    lefts = sorted(answer.headers["RateLimit"].split(",")[0] for answer in answers if answer.status_code == 202)
    assert [left.split(";")[1] for left in lefts] == ["r=0", "r=1", "r=2", "r=3"]
    admitted = next(task_id for answer, task_id in zip(answers, task_ids, strict=True) if answer.status_code == 202)
    assert (await start(gateways[0], tenant_id, task_id=admitted)).status_code == 200, "a repeat is no further start"
    assert (await start(gateways[0], unique("tenant"))).status_code == 202, "another tenant's limits are its own"


async def test_no_start_waits_in_line_while_postgresql_hangs(
    temporal_env: WorkflowEnvironment, postgres_dsn: str
) -> None:
    tenant_id = unique("tenant")
    limits = TenantLimits(starts_per_minute=1_000)
    async with cable_to_postgres(postgres_dsn) as cable:
        store = TaskStore(cable.dsn)
        async with served(
            temporal_env.client, store, task_queue=unique("nobody"), limits_of=lambda _tenant: limits
        ) as gateway:
            assert (await start(gateway, tenant_id)).status_code == 202
            cable.hang()
            began = time.monotonic()
            answers = await asyncio.gather(*(start(gateway, tenant_id) for _ in range(20)))
            took = time.monotonic() - began
            cable.plug_in()
        await store.close()
    assert [answer.status_code for answer in answers] == [202] * 20
    assert took < 6.0


async def test_the_bytes_of_orders_are_counted_as_they_were_sent(gateways: list[Gateway]) -> None:
    tenant_id = unique("tenant")
    first, second = [await start(gateway, tenant_id, prompt="x" * 1_200) for gateway in gateways]
    assert (first.status_code, second.status_code) == (202, 429)
    assert "bytes of orders" in second.json()["detail"]


async def test_streams_beyond_the_limit_are_refused_until_one_is_closed(gateways: list[Gateway]) -> None:
    tenant_id = unique("tenant")
    path, headers = f"{TASKS}/stream/sse?subscribe=*", bearer(token_for(tenant_id))
    async with gateways[0].http.stream("GET", path, headers=headers) as first:
        assert first.status_code == 200 and '"open-streams";r=1' in first.headers["RateLimit"]
        url = str(gateways[1].http.base_url).replace("http", "ws", 1)
        async with connect(f"{url}{TASKS}/stream/ws?subscribe=*", additional_headers=headers):
            refused = await gateways[1].http.get(path, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
            assert int(refused.headers["Retry-After"]) > 0
            with pytest.raises(InvalidStatus) as closed:
                await connect(f"{url}{TASKS}/stream/ws?subscribe=*", additional_headers=headers)
            assert closed.value.response.status_code == 429

        async def opens() -> bool:
            async with gateways[1].http.stream("GET", path, headers=headers) as again:
                return again.status_code == 200

        assert await until(opens)


@pytest.mark.slow
async def test_two_processes_admit_exactly_the_limits_together(
    temporal_env: WorkflowEnvironment, postgres_dsn: str
) -> None:
    settings = {
        "TEMPORAL_ADDRESS": temporal_env.client.service_client.config.target_host,
        "DATABASE_DSN": postgres_dsn,
        "TASK_QUEUE": unique("nobody"),
        "TENANT_STARTS_PER_MINUTE": "5",
        "TENANT_OPEN_STREAMS": "3",
    }
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(gateway_process(settings)) for _ in range(2)]
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{process.port}", headers=bearer(token_for("tenant-of-two")), timeout=30
                )
            )
            for process in processes
        ]
        starts = await asyncio.gather(*(clients[n % 2].post(f"{TASKS}/images", json=IMAGE) for n in range(14)))
        assert sorted(answer.status_code for answer in starts) == [202] * 5 + [429] * 9

        async def opened(n: int) -> int:
            stream = clients[n % 2].stream("GET", f"{TASKS}/stream/sse?subscribe=*")
            return (await stack.enter_async_context(stream)).status_code

        assert sorted([await opened(n) for n in range(6)]) == [200] * 3 + [429] * 3
