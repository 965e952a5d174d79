"""`OWN_TASKS_ONLY`: for a user of the same tenant a task is as unknown as a stranger's, on every route and stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from store import TaskStore
from tests.conftest import unique
from tests.gateway.conftest import Api
from tests.gateway.serving import bearer, served, token_for
from tests.gateway.test_permissions import NAMES_A_TASK, Route, asked, state_of
from tests.store.facts import claim_of, end, fact, write_of
from tests.waiting import until


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def apart(api: Api) -> AsyncIterator[Api]:
    """A gateway that keeps users apart, before the same platform."""
    platform = api.platform
    async with served(platform.client, platform.store, task_queue=platform.task_queue, own_tasks_only=True) as gateway:
        yield Api(platform, gateway)


async def task_of(store: TaskStore, tenant_id: str, user_id: str) -> str:
    task_id = unique("ended")
    await store.claim(claim_of(task_id, tenant_id=tenant_id, user_id=user_id))
    await store.write(write_of(task_id, end(), status="completed"))
    return task_id


async def listed(api: Api, token: str) -> set[str]:
    page = (await api.call("GET", "", token=token)).json()
    return {task["task_id"] for task in page["tasks"]}


@pytest.mark.parametrize("route", sorted(NAMES_A_TASK), ids=" ".join)
async def test_no_route_and_no_stream_shows_a_colleagues_task(api: Api, apart: Api, route: Route) -> None:
    store, tenant = api.platform.store, unique("tenant")
    task_id = await task_of(store, tenant, "ada")
    before = await state_of(store, task_id)
    for streamed in {False, route[1].endswith("/events")}:
        answer = await asked(apart, route, task_id, token_for(tenant, "ben"), as_stream=streamed)
        assert answer.status == 404 and answer.code in (None, "task_unknown")
        assert (await asked(apart, route, task_id, token_for(tenant, "ada"), as_stream=streamed)).status != 404
        assert (await asked(api, route, task_id, token_for(tenant, "ben"), as_stream=streamed)).status != 404
    assert await state_of(store, task_id) == before


async def test_a_list_has_ones_own_tasks_only_and_by_default_the_tenants(api: Api, apart: Api) -> None:
    store, tenant = api.platform.store, unique("tenant")
    adas, bens = await task_of(store, tenant, "ada"), await task_of(store, tenant, "ben")
    assert await listed(apart, token_for(tenant, "ben")) == {bens}
    assert await listed(api, token_for(tenant, "ben")) == {adas, bens}


async def test_a_stream_of_all_tasks_has_ones_own_only(apart: Api) -> None:
    store, tenant = apart.platform.store, unique("tenant")
    hub = apart.gateway.app.state.streams
    headers = bearer(token_for(tenant, "ben"))
    async with apart.http.stream("GET", "/api/v1/tasks/stream/sse?subscribe=*", headers=headers) as response:

        async def is_watching() -> bool:
            return tenant in hub.watched_tenants

        await until(is_watching)
        adas, bens = unique("task"), unique("task")
        for task_id, user_id in ((adas, "ada"), (bens, "ben")):
            await store.claim(claim_of(task_id, tenant_id=tenant, user_id=user_id))
            await store.write(write_of(task_id, fact("a"), end()))
        seen: set[str] = set()
        async for line in response.aiter_lines():
            seen |= {task_id for task_id in (adas, bens) if task_id in line}
            if bens in line and "task.completed" in line:
                break
    assert seen == {bens}


async def test_the_same_idempotency_key_of_two_users_is_two_tasks(api: Api, apart: Api) -> None:
    tenant, key = unique("tenant"), unique("key")
    order: dict[str, Any] = {"template_id": "text-to-image", "prompt": "a lighthouse at dusk"}
    answers = [
        await apart.call("POST", "/images", order, token=token_for(tenant, user), X_Idempotency_Key=key)
        for user in ("ada", "ben", "ada")
    ]
    assert [answer.status_code for answer in answers] == [202, 202, 200]
    assert answers[0].json()["task_id"] == answers[2].json()["task_id"] != answers[1].json()["task_id"]
