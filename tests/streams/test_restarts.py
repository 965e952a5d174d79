"""Processes that are killed or restarted while streams are open: each client receives every event once, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from store import StoreUnavailable, TaskStore, migrate
from tests.conftest import unique
from tests.gateway.serving import gateway_process, token_for
from tests.postgres import postgres_of_its_own
from tests.streams.serving import Reader, Streams, Writer, streams_on
from tests.streams.serving import token_for as stream_token_for
from tests.waiting import comes_true, until


async def test_a_client_of_a_killed_gateway_goes_on_at_another_without_loss_or_repeat(
    temporal_env: WorkflowEnvironment, streams: Streams, writer: Writer, postgres_dsn: str
) -> None:
    """SIGKILL in the middle of a stream, while the task moves on; the other process does not know this client."""
    task_id = await writer.begun()
    address = temporal_env.client.service_client.config.target_host
    path = f"/api/v1/tasks/stream/sse?task_id={task_id}"

    async def move() -> None:
        for _ in range(60):
            await writer.write(task_id, 5)
            await asyncio.sleep(0.01)
        await writer.end(task_id)

    async with gateway_process({"TEMPORAL_ADDRESS": address, "DATABASE_DSN": postgres_dsn}) as doomed:
        headers = {"authorization": f"Bearer {token_for(writer.tenant_id)}"}
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{doomed.port}") as http,
            http.stream("GET", path, headers=headers) as response,
        ):
            reader = Reader(response)
            reading = asyncio.create_task(reader.read())
            moving = asyncio.create_task(move())
            await reader.until_received(task_id, 20)
            doomed.process.kill()
            await doomed.process.wait()
            with pytest.raises(httpx.TransportError):
                await reading
    assert 20 <= len(reader.seqs(task_id)) < 302, "it was killed in the middle"
    async with streams.opened(writer.tenant_id, f"task_id={task_id}&cursor={reader.last_id}") as other:
        await other.until_ended()
    await moving
    assert reader.seqs(task_id) + other.seqs(task_id) == list(range(1, 303))


async def test_a_terminated_gateway_closes_its_streams_and_ends(
    temporal_env: WorkflowEnvironment, writer: Writer, postgres_dsn: str
) -> None:
    task_id = await writer.begun()
    address = temporal_env.client.service_client.config.target_host
    headers = {"authorization": f"Bearer {token_for(writer.tenant_id)}"}
    async with (
        gateway_process({"TEMPORAL_ADDRESS": address, "DATABASE_DSN": postgres_dsn}) as leaving,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{leaving.port}") as http,
        http.stream("GET", f"/api/v1/tasks/stream/sse?task_id={task_id}", headers=headers) as response,
    ):
        reader = Reader(response)
        reading = asyncio.create_task(reader.read())
        await reader.until_received(task_id, 1)
        leaving.process.terminate()
        await reading
        assert await asyncio.wait_for(leaving.process.wait(), 20) == 0
    assert int(reader.frames[-1]["retry"]) > 0, "a hint when to reconnect"
    assert reader.seqs(task_id) == [1]


class OwnPostgres:
    """A PostgreSQL that a test may stop; on a socket, as the session's is."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.dsn = str(server.get_uri())

    async def restart(self) -> None:
        await asyncio.to_thread(self._server.stop)
        await asyncio.to_thread(self._server.start)


@pytest_asyncio.fixture
async def own_postgres() -> AsyncIterator[OwnPostgres]:
    own = postgres_of_its_own()
    postgres = OwnPostgres(await asyncio.to_thread(own.__enter__))
    await migrate(postgres.dsn)
    yield postgres
    await asyncio.to_thread(own.__exit__, None, None, None)


async def test_a_restart_of_postgresql_under_load_costs_no_client_an_event(own_postgres: OwnPostgres) -> None:
    """Ten tasks move all the time, each watched by clients that reconnect whenever their stream is closed."""
    store = TaskStore(own_postgres.dsn)
    writer = Writer(store, unique("tenant"))
    task_ids = [await writer.begun() for _ in range(10)]
    written = dict.fromkeys(task_ids, 0)
    is_restarted = False

    async def move(task_id: str) -> None:
        while not is_restarted or written[task_id] < 20:
            await _persistently(writer, task_id)
            written[task_id] += 1
        await _persistently(writer, task_id, ends=True)

    async with streams_on(store) as streams:
        following = [
            asyncio.create_task(_followed(streams, writer.tenant_id, task_id)) for task_id in (*task_ids, *task_ids)
        ]
        moving = [asyncio.create_task(move(task_id)) for task_id in task_ids]
        await comes_true(lambda: sum(written.values()) > 100)
        await own_postgres.restart()
        is_restarted = True
        async with asyncio.timeout(30):
            await asyncio.gather(*moving)
            received = await asyncio.gather(*following)
    await store.close()
    # Beside what was written here: the task's beginning and its end.
    assert received == [list(range(1, written[task_id] + 3)) for task_id in (*task_ids, *task_ids)]


async def _persistently(writer: Writer, task_id: str, *, ends: bool = False) -> None:
    """One write, retried until it succeeds, as a workflow's activity does: the same facts under the same keys."""
    write = writer.ending(task_id) if ends else writer.writing(task_id, 1)

    async def is_written() -> bool:
        try:
            await writer.store.write(write)
        except StoreUnavailable:
            return False
        return True

    await until(is_written, within_seconds=20)


async def _followed(streams: Streams, tenant_id: str, task_id: str) -> list[int]:
    """Every `seq` that a client received; it reopens the stream from its last cursor until the task has ended."""
    seqs: list[int] = []
    headers = {"authorization": f"Bearer {stream_token_for(tenant_id)}"}
    while True:
        path = f"/api/v1/tasks/stream/sse?task_id={task_id}"
        async with streams.http.stream("GET", path, headers=headers) as response:
            if response.status_code == 204:
                return seqs
            reader = Reader(response)
            await reader.read()
        if reader.events:
            seqs += reader.seqs(task_id)
            headers["last-event-id"] = reader.last_id
        await asyncio.sleep(0.05)
