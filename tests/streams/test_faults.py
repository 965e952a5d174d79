"""Streams while things go wrong: nothing is lost, nothing hangs, and the client learns when to reconnect."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Mapping

import asyncpg
import pytest

from gateway.streams_wires import EndReason
from store import StoredEvent, TaskStore
from store.task_store import MAX_PAGE
from tests.cable import Cable, cable_to_postgres
from tests.store.facts import NOON
from tests.streams.serving import Streams, Writer, stream_token_for, streams_on, token_for
from tests.waiting import comes_true

HEAVY = {"result_urls": [f"https://images.example/{n:02}-{'x' * 2_000}" for n in range(64)]}
"""An event of about 128 KiB."""


@pytest.fixture
async def on_a_cable(postgres_dsn: str) -> AsyncIterator[tuple[Streams, Cable]]:
    """A process of streams whose connection to PostgreSQL can be cut."""
    async with cable_to_postgres(postgres_dsn) as cable:
        store = TaskStore(cable.dsn)
        async with streams_on(store) as streams:
            yield streams, cable
            cable.plug_in()
        await store.close()


async def _insert_in_silence(dsn: str, task_id: str, seq: int) -> None:
    """Write an event without a notification."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute("UPDATE tasks SET last_seq = $2 WHERE task_id = $1", task_id, seq)
            await connection.execute(
                "INSERT INTO task_events (task_id, seq, key, event, ts, attempt, status) "
                "VALUES ($1, $2, $3, 'task.running', $4, 1, 'running')",
                *(task_id, seq, f"silent-{seq}", NOON),
            )
    finally:
        await connection.close()


@pytest.mark.parametrize("query", ["task_id={task_id}", "subscribe=*"])
async def test_an_event_whose_notification_is_lost_arrives_within_three_seconds(
    streams: Streams, writer: Writer, postgres_dsn: str, query: str
) -> None:
    task_id = await writer.begun()
    async with streams.opened(writer.tenant_id, query.format(task_id=task_id)) as reader:
        await comes_true(lambda: query != "subscribe=*" or writer.tenant_id in streams.hub.watched_tenants)
        await writer.write(task_id)
        await reader.until_received(task_id, 2)
        began = time.monotonic()
        await _insert_in_silence(postgres_dsn, task_id, 3)
        await reader.until_received(task_id, 3, within=3.0)
        assert time.monotonic() - began < 3.0


async def _restore(dsn: str, task_id: str, seq: int) -> None:
    """Bring the task back to where its newest event was `seq`, as a restored backup does."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute("DELETE FROM task_events WHERE task_id = $1 AND seq > $2", task_id, seq)
            await connection.execute("UPDATE tasks SET last_seq = $2 WHERE task_id = $1", task_id, seq)
    finally:
        await connection.close()


@pytest.mark.parametrize("ends_meanwhile", [False, True])
async def test_a_stream_says_the_end_of_a_task_whose_store_was_restored(
    streams: Streams, writer: Writer, postgres_dsn: str, ends_meanwhile: bool
) -> None:
    task_id = await writer.begun()
    await writer.write(task_id, 5)
    async with streams.opened(writer.tenant_id, f"task_id={task_id}") as reader:
        await reader.until_received(task_id, 6)
        await _restore(postgres_dsn, task_id, 2)
        if ends_meanwhile:
            await writer.end(task_id)
        await reader.until_ended()
    async with streams.opened(writer.tenant_id, f"task_id={task_id}&cursor={reader.last_id}") as again:
        if not ends_meanwhile:
            await writer.end(task_id)
        await again.until_ended()
    assert again.seqs(task_id) == [3]
    assert again.events[-1]["event"] == "task.completed"


async def test_a_stream_of_all_tasks_ends_where_the_store_was_restored(
    streams: Streams, writer: Writer, postgres_dsn: str
) -> None:
    """Its client shows numbers that come again with other events: it reads all that it shows again."""
    task_id = await writer.begun()
    async with streams.opened(writer.tenant_id, "subscribe=*") as reader:
        await comes_true(lambda: writer.tenant_id in streams.hub.watched_tenants)
        await writer.write(task_id, 5)
        await reader.until_received(task_id, 6)
        await _restore(postgres_dsn, task_id, 2)
        await reader.until_ended()


class _HeldReads(TaskStore):
    """Its stream reads of one position wait, after they have read, until they may go on."""

    held: int | None = None

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.is_held, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def events_of_each(self, positions: Mapping[str, int], *, limit_each: int = MAX_PAGE) -> list[StoredEvent]:
        is_first = self.held in positions.values() and not self.is_held.is_set()
        events = await super().events_of_each(positions, limit_each=limit_each)
        if is_first:
            self.is_held.set()
            await self.may_go_on.wait()
        return events


@pytest.mark.parametrize("ends", [True, False])
async def test_an_event_that_comes_while_a_resumed_stream_reads_is_not_lost(
    writer: Writer, postgres_dsn: str, ends: bool
) -> None:
    task_id = await writer.begun()
    await writer.write(task_id, 2)
    store = _HeldReads(postgres_dsn)
    async with streams_on(store) as streams:
        async with streams.opened(writer.tenant_id, f"task_id={task_id}") as first:
            await first.until_received(task_id, 3)
            store.held = 3
            query = f"task_id={task_id}&cursor={first.last_id}"
            async with streams.opened(writer.tenant_id, query) as resumed:
                await asyncio.wait_for(store.is_held.wait(), 5)
                await (writer.end(task_id) if ends else writer.write(task_id))
                await first.until_received(task_id, 4)
                store.may_go_on.set()
                await resumed.until_received(task_id, 4)
                if not ends:
                    await writer.end(task_id)
                await resumed.until_ended()
        assert resumed.seqs(task_id) == ([4] if ends else [4, 5])
    await store.close()


async def test_many_events_at_once_cut_no_stream_that_is_read(
    on_a_cable: tuple[Streams, Cable], writer: Writer
) -> None:
    streams, cable = on_a_cable
    async with streams.opened(writer.tenant_id, "subscribe=*") as reader:
        await comes_true(lambda: writer.tenant_id in streams.hub.watched_tenants)
        task_ids = [await writer.begun() for _ in range(8)]
        await reader.until(lambda reader: len(reader.events) == 8)
        cable.pull()
        for task_id in task_ids:
            await writer.write(task_id, 100)
        cable.plug_in()
        await reader.until(lambda reader: len(reader.events) == 808 or reader.has_ended)
        assert not reader.has_ended
    assert [reader.seqs(task_id) for task_id in task_ids] == [list(range(1, 102))] * 8


@pytest.mark.parametrize("fault", ["pull", "hang"])
async def test_streams_outlast_an_outage_of_postgresql(
    on_a_cable: tuple[Streams, Cable], writer: Writer, fault: str
) -> None:
    streams, cable = on_a_cable
    task_id = await writer.begun()
    async with streams.opened(writer.tenant_id, f"task_id={task_id}") as reader:
        await reader.until_received(task_id, 1)
        getattr(cable, fault)()
        await writer.write(task_id, 3)
        await comes_true(lambda: not streams.hub.is_listening)
        assert await streams.status(writer.tenant_id, f"task_id={task_id}") == 503
        await writer.write(task_id)
        cable.plug_in()
        await reader.until_received(task_id, 5)
        await writer.end(task_id)
        await reader.until_ended()
    assert reader.seqs(task_id) == [1, 2, 3, 4, 5, 6]


async def test_a_client_that_does_not_read_is_cut_and_goes_on_where_it_was(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    cut_before = streams.hub.ended[EndReason.SLOW]
    with socket.socket() as plug:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        plug.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(plug, ("127.0.0.1", streams.port))
        path = f"/api/v1/tasks/stream/sse?task_id={task_id}&token={stream_token_for(writer.tenant_id)}"
        await loop.sock_sendall(plug, f"GET {path} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
        assert b"200" in await loop.sock_recv(plug, 64)
        written = 1
        while streams.hub.ended[EndReason.SLOW] == cut_before:
            assert written < 300, "it was never cut"
            await writer.write(task_id, 5, **HEAVY)
            written += 5
        received = bytearray()
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += await asyncio.wait_for(loop.sock_recv(plug, 1 << 20), 5)
    text = received.decode()
    assert ": slow\nretry: 2000\n" in text
    ids = [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")]
    assert 0 < len(ids) < written
    async with streams.opened(writer.tenant_id, f"task_id={task_id}&cursor={ids[-1]}") as reader:
        await reader.until_received(task_id, written)
    assert reader.seqs(task_id) == list(range(len(ids) + 1, written + 1))


async def test_a_stream_ends_when_its_token_expires(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    token = token_for(writer.tenant_id, seconds=2)
    expired_before = streams.hub.ended[EndReason.EXPIRED]
    async with streams.opened(writer.tenant_id, f"task_id={task_id}", token=token) as reader:
        await reader.until_received(task_id, 1)
        await reader.until_ended(within=4)
    assert streams.hub.ended[EndReason.EXPIRED] == expired_before + 1


async def test_heartbeats_are_sent_while_nothing_happens(task_store: TaskStore, writer: Writer) -> None:
    task_id = await writer.begun()
    async with (
        streams_on(task_store, heartbeat_seconds=1) as streams,
        streams.opened(writer.tenant_id, f"task_id={task_id}") as reader,
    ):
        await reader.until(lambda reader: sum("heartbeat" in f.get("event", "") for f in reader.frames) >= 2)
    beat = next(frame for frame in reader.frames if frame.get("event") == "system.heartbeat")
    assert "id" not in beat, "a heartbeat must not move the cursor at which the stream resumes"
    assert "seq" not in beat["data"]
    assert reader.seqs(task_id) == [1]


async def test_a_draining_process_closes_its_streams_and_another_goes_on(
    streams: Streams, task_store: TaskStore, writer: Writer
) -> None:
    task_id = await writer.begun()
    async with streams_on(task_store) as leaving:
        async with leaving.opened(writer.tenant_id, f"task_id={task_id}") as reader:
            await reader.until_received(task_id, 1)
            leaving.draining.begin()
            await reader.until_ended()
        assert await leaving.status(writer.tenant_id, f"task_id={task_id}") == 503
    assert reader.frames[-1]["retry"].isdigit()
    await writer.write(task_id)
    async with streams.opened(writer.tenant_id, f"task_id={task_id}&cursor={reader.last_id}") as other:
        await other.until_received(task_id, 2)
    assert other.seqs(task_id) == [2]


async def test_streams_leave_nothing_behind(task_store: TaskStore, writer: Writer) -> None:
    task_ids = [await writer.begun() for _ in range(5)]
    async with streams_on(task_store) as streams:
        async with streams.opened(writer.tenant_id, "subscribe=" + ",".join(task_ids)) as reader:
            await reader.until(lambda reader: len(reader.events) == 5)
            assert streams.hub.open_streams.total() == 1
            assert streams.hub.watched_tasks == 5
        await comes_true(lambda: streams.hub.open_streams.total() == 0 and streams.hub.watched_tasks == 0)


async def test_many_streams_of_many_tasks_each_get_their_own_events(streams: Streams, writer: Writer) -> None:
    task_ids = [await writer.begun() for _ in range(40)]
    readers = {}
    async with asyncio.TaskGroup() as group:

        async def follow(task_id: str) -> None:
            async with streams.opened(writer.tenant_id, f"task_id={task_id}") as readers[task_id]:
                await readers[task_id].until_ended(within=20)

        for task_id in task_ids:
            group.create_task(follow(task_id))
        for _ in range(3):
            await asyncio.gather(*(writer.write(task_id, 2) for task_id in task_ids))
        await asyncio.gather(*(writer.end(task_id) for task_id in task_ids))
    received = [reader.seqs(task_id) for task_id, reader in readers.items()]
    assert received == [[1, 2, 3, 4, 5, 6, 7, 8]] * 40
    assert all(len(reader.events) == 8 for reader in readers.values())
