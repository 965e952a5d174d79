"""Streams of tasks that were accepted and have no row yet: no worker has taken them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from temporalio.testing import WorkflowEnvironment
from websockets.asyncio.client import connect

from comfyui_temporal.contracts.tasks import workflow_id_of
from gateway.streams_cursors import cursor_of
from gateway.streams_hub import EventHub
from store import TaskStore
from tests.conftest import unique
from tests.gateway.conftest import DEMO_TOKEN, OTHER_TOKEN
from tests.gateway.serving import Gateway, bearer, served
from tests.store.facts import claim_of, end, write_of
from tests.streams.serving import Reader
from tests.waiting import until
from tests.workflows.platform import running_platform

TASKS = "/api/v1/tasks"
IMAGE = {"template_id": "text-to-image", "prompt": "a lighthouse at dusk"}


@asynccontextmanager
async def opened(gateway: Gateway, path: str) -> AsyncIterator[Reader]:
    async with gateway.http.stream("GET", f"{TASKS}{path}", headers=bearer(DEMO_TOKEN) | SSE) as response:
        assert response.status_code == 200, await response.aread()
        reader = Reader(response)
        reading = asyncio.create_task(reader.read())
        try:
            yield reader
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


SSE = {"accept": "text/event-stream"}


async def accepted(gateway: Gateway) -> str:
    """A task that nobody has taken; its id."""
    answer = await gateway.http.post(f"{TASKS}/images", json=IMAGE, headers=bearer(DEMO_TOKEN))
    assert answer.status_code == 202, answer.text
    task_id = str(answer.json()["task_id"])

    async def is_seen() -> bool:
        """The server shows a new run's search attributes a moment later."""
        return (await gateway.http.get(f"{TASKS}/{task_id}", headers=bearer(DEMO_TOKEN))).status_code == 200

    await until(is_seen)
    return task_id


async def status(gateway: Gateway, path: str, token: str = DEMO_TOKEN) -> int:
    async with gateway.http.stream("GET", f"{TASKS}{path}", headers=bearer(token) | SSE) as response:
        return response.status_code


async def test_a_task_is_streamed_from_its_acceptance_on(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> None:
    async with running_platform(temporal_env, task_store, tmp_path, speed=2_000) as platform, AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(served(platform.client, task_store, task_queue=platform.task_queue))
        old = unique("image")
        await task_store.claim(claim_of(old, tenant_id="tenant-demo", user_id="user-demo"))
        new = await accepted(gateway)
        paths = (f"/stream/sse?task_id={new}", f"/{new}/events", f"/stream/sse?subscribe={old},{new},nobodys")
        readers = [await stack.enter_async_context(opened(gateway, path)) for path in paths]
        assert await status(gateway, f"/stream/sse?task_id={new}", OTHER_TOKEN) == 404, "another tenant's"
        await readers[2].until_received(old, 1)
        await stack.enter_async_context(platform.worker())
        for reader in readers[:2]:
            await reader.until_ended(within=40)
        await task_store.write(write_of(old, end(), status="completed"))
        await readers[2].until_ended()
    written = [event.seq for event in await task_store.events(new)]
    assert [reader.seqs(new) for reader in readers] == [written] * 3
    assert readers[0].events[-1]["event"] == "task.completed"


async def test_a_task_id_that_another_tenant_claims_first_shows_nothing_of_it(
    temporal_env: WorkflowEnvironment, task_store: TaskStore
) -> None:
    """The run of the accepted task is terminated, and another tenant starts one under its id."""
    async with served(temporal_env.client, task_store, task_queue=unique("nobody")) as gateway:
        task_id = await accepted(gateway)
        async with opened(gateway, f"/stream/sse?task_id={task_id}") as reader:
            await task_store.claim(claim_of(task_id, tenant_id="tenant-other", user_id="user-other"))
            await task_store.write(write_of(task_id, end(), status="completed"))
            await reader.until_ended()
        assert reader.events == []
        assert await status(gateway, f"/stream/sse?task_id={task_id}") == 404


async def test_a_stream_of_tasks_that_ended_without_a_row_is_over_and_disturbs_no_other(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows were lost, with the store or to a purge: the cursor is beyond all that is left of them."""
    monkeypatch.setattr("gateway.app.EventHub", partial(EventHub, heartbeat_seconds=1))
    async with served(temporal_env.client, task_store, task_queue=unique("nobody")) as gateway:
        gone = [await accepted(gateway) for _ in range(2)]
        for task_id in gone:
            await temporal_env.client.get_workflow_handle(workflow_id_of(task_id)).terminate()
        cursor = cursor_of(dict.fromkeys(gone, 3))
        paths = [f"/stream/sse?subscribe={','.join(gone)}&last_event_id={cursor}"]
        paths.append(f"/stream/sse?task_id={gone[0]}&last_event_id={cursor_of({gone[0]: 3})}")
        for path in paths:
            assert await status(gateway, path) == 204


async def test_a_stream_ends_where_the_run_of_its_task_ended_without_a_row(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.streams_hub.WAITING_SECONDS", 1.0)
    async with served(temporal_env.client, task_store, task_queue=unique("nobody")) as gateway:
        task_id = await accepted(gateway)
        path = f"/stream/sse?task_id={task_id}"
        async with opened(gateway, path) as reader:
            await temporal_env.client.get_workflow_handle(workflow_id_of(task_id)).terminate()
            await reader.until_ended()
        assert reader.events == []
        await until(lambda: is_over(gateway, path))


async def is_over(gateway: Gateway, path: str) -> bool:
    return await status(gateway, path) == 204


@pytest.mark.parametrize("known", ["with a row", "without a row"])
async def test_a_websocket_names_what_it_leaves_out_in_its_first_frame(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, known: str
) -> None:
    async with served(temporal_env.client, task_store, task_queue=unique("nobody")) as gateway:
        task_id = await accepted(gateway)
        if known == "with a row":
            await task_store.claim(claim_of(task_id, tenant_id="tenant-demo", user_id="user-demo"))
        url = str(gateway.http.base_url).replace("http", "ws", 1)
        address = f"{url}{TASKS}/stream/ws?subscribe=nobodys,{task_id},nor-this"
        async with connect(address, additional_headers=bearer(DEMO_TOKEN), proxy=None) as socket:
            first = json.loads(await socket.recv())
            assert (first["event"], first["unknown_tasks"]) == ("system.heartbeat", ["nobodys", "nor-this"])
            if known == "without a row":
                await task_store.claim(claim_of(task_id, tenant_id="tenant-demo", user_id="user-demo"))
            assert json.loads(await socket.recv())["event"] == "task.accepted"
