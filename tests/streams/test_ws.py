"""The same streams over WebSocket."""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from store import TaskStore
from tests.streams.serving import Streams, Writer, streams_on, token_for
from tests.waiting import comes_true


def dialled(streams: Streams, tenant_id: str, query: str, *, token: str | None = None, origin: Any = None) -> connect:
    address = f"ws://127.0.0.1:{streams.port}/api/v1/tasks/stream/ws?{query}"
    headers = {"authorization": f"Bearer {token or token_for(tenant_id)}"}
    return connect(address, additional_headers=headers, origin=origin, proxy=None)


async def received(socket: ClientConnection, count: int) -> list[dict[str, Any]]:
    return [json.loads(await socket.recv()) for _ in range(count)]


async def close_code(socket: ClientConnection) -> int | None:
    with pytest.raises(ConnectionClosed):
        while True:
            await socket.recv()
    return socket.close_code


async def test_history_then_new_events_then_a_normal_close(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    await writer.write(task_id)
    async with dialled(streams, writer.tenant_id, f"task_id={task_id}") as socket:
        events = await received(socket, 2)
        await socket.send("whatever a client says is not looked at")
        await writer.write(task_id, 2)
        await writer.end(task_id)
        events += await received(socket, 3)
        assert await close_code(socket) == 1000
    assert [event["seq"] for event in events] == [1, 2, 3, 4, 5]
    assert events == [json.loads(event.model_dump_json()) for event in await writer.store.events(task_id)]
    async with dialled(streams, writer.tenant_id, f"task_id={task_id}&cursor={events[2]['cursor']}") as again:
        assert [event["seq"] for event in await received(again, 2)] == [4, 5]
    async with dialled(streams, writer.tenant_id, f"task_id={task_id}&cursor={events[-1]['cursor']}") as over:
        assert await close_code(over) == 1000


async def test_a_refusal_comes_before_the_handshake(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    for query, token, status in [
        (f"task_id={task_id}", token_for("another"), 404),
        (f"task_id={task_id}", "nonsense", 401),
        (f"task_id={task_id}", token_for(writer.tenant_id, scopes=[]), 403),
        ("cursor=", token_for(writer.tenant_id), 422),
    ]:
        with pytest.raises(InvalidStatus) as refused:
            async with dialled(streams, writer.tenant_id, query, token=token):
                pass
        assert refused.value.response.status_code == status
        assert json.loads(refused.value.response.body)["code"]


async def test_a_draining_process_says_so_and_an_expired_token_too(task_store: TaskStore, writer: Writer) -> None:
    task_id = await writer.begun()
    async with streams_on(task_store) as streams:
        short = token_for(writer.tenant_id, seconds=2)
        async with dialled(streams, writer.tenant_id, f"task_id={task_id}", token=short) as socket:
            assert await close_code(socket) == 3000
        async with dialled(streams, writer.tenant_id, f"task_id={task_id}") as socket:
            await received(socket, 1)
            streams.draining.begin()
            assert await close_code(socket) == 1012


async def test_clients_that_leave_while_they_are_sent_something_leave_no_traceback(
    streams: Streams, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen: one for each that closed its connection while its history was on its way."""
    task_id = await writer.begun()
    await writer.write(task_id, 300)
    for _ in range(20):
        async with dialled(streams, writer.tenant_id, f"task_id={task_id}") as socket:
            await socket.recv()
            socket.transport.abort()
    await comes_true(lambda: streams.hub.open_of("ws") == 0)
    gc.collect()
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
