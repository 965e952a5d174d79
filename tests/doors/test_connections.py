"""What a connection may cost before it says who it is: real sockets, and a small application behind a door of ours."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from temporalio.testing import WorkflowEnvironment
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from local_stack.ports import any_free_port
from proof.simulators.serving import TEST_CALLBACK_SECRET, TEST_TOKEN_SECRET
from runtime import doors
from runtime.door_limits import Door, DoorLimits, Refusal
from runtime.doors import DoorConfig
from tests.gateway.serving import gateway_process
from tests.waiting import comes_true, until

PROJECT = Path(__file__).parents[2]
GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
HEAD_SECONDS = 0.5
QUICK = DoorLimits(head_seconds=HEAD_SECONDS, kept_seconds=60, stall_seconds=HEAD_SECONDS)
ELSEWHERE = "192.0.2.0/24"
"""Trusted instead of 127.0.0.1, so that these tests are strangers."""
MEBIBYTE = 1024 * 1024


class Connection:
    """One connection, of which a test sends every byte itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int, address: str = "127.0.0.1") -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0)))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def status(self) -> int:
        """Of the next answer, whose body is read too; 0 once the connection has ended."""
        try:
            async with asyncio.timeout(10):
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), b"")
                await self.reader.readexactly(int(length.partition(b":")[2] or b"0"))
                return int(head.split()[1])
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0

    async def ended(self) -> float:
        """Seconds until the other end has closed."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(10):
                while await self.reader.read(65_536):
                    pass
        except ConnectionError:
            pass
        return time.monotonic() - began

    def close(self) -> None:
        self.writer.transport.abort()


def handshake(path: str) -> bytes:
    """A WebSocket's, without the empty line that ends it."""
    key = base64.b64encode(b"k" * 16).decode()
    lines = (
        f"GET {path} HTTP/1.1",
        *("Host: here", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        f"Sec-WebSocket-Key: {key}",
    )
    return "".join(f"{line}\r\n" for line in lines).encode()


class Served:
    def __init__(self, server: uvicorn.Server, door: Door, refused: Counter[Refusal]) -> None:
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.tasks = server.server_state.tasks
        self.door, self.refused = door, refused
        self._open: list[Connection] = []

    async def connection(self, address: str = "127.0.0.1") -> Connection:
        connection = await Connection.to(self.port, address)
        self._open.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._open:
            connection.close()


async def hello(_request: Request) -> Response:
    return PlainTextResponse("hello")


async def read_all(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def large(_request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * MEBIBYTE

    return StreamingResponse(parts())


async def listen(socket: WebSocket) -> None:
    await asyncio.sleep(float(socket.query_params.get("after_seconds", "0")))
    await socket.accept()
    if "greeted_after_seconds" in socket.query_params:
        await asyncio.sleep(float(socket.query_params["greeted_after_seconds"]))
        await socket.send_text("hello")
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


async def refuse(socket: WebSocket) -> None:
    await socket.send_denial_response(PlainTextResponse("no", 401))


APP = Starlette(
    routes=[
        Route("/", hello, methods=["GET", "POST"]),
        Route("/read", read_all, methods=["POST"]),
        Route("/large", large),
        WebSocketRoute("/ws", listen),
        WebSocketRoute("/refused", refuse),
    ]
)


@asynccontextmanager
async def served(limits: DoorLimits = QUICK) -> AsyncIterator[Served]:
    refused: Counter[Refusal] = Counter()
    door = Door(limits, lambda refusal: refused.update([refusal]))
    config = DoorConfig(APP, door, host="127.0.0.1", port=0, websockets=True, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await comes_true(lambda: server.started or serving.done())
    found = Served(server, door, refused)
    try:
        yield found
    finally:
        found.close()
        await comes_true(lambda: door.open == 0, "every connection is counted out again")
        server.should_exit = True
        await serving
    assert not door._of_address and not door._waiting


@pytest.fixture(autouse=True)
def nothing_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No client can make a traceback."""
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nHost: he", b"\r\n\r\n"])
async def test_a_connection_that_sends_no_whole_head_is_closed(first: bytes) -> None:
    async with served() as door:
        slow = await door.connection()
        await slow.send(first)
        assert HEAD_SECONDS * 0.5 < await slow.ended() < HEAD_SECONDS * 4
        assert door.refused == {Refusal.HEAD_TOO_SLOW if first else Refusal.IDLE: 1}


async def drip(connection: Connection) -> None:
    """One header after another, each well within any pause that a server could allow."""
    try:
        while True:
            await connection.send(b"X-More: and more\r\n")
            await asyncio.sleep(HEAD_SECONDS / 10)
    except ConnectionError:
        return


@pytest.mark.parametrize("before", [b"", GET])
async def test_a_head_that_drips_is_closed_also_after_an_answer(before: bytes) -> None:
    async with served() as door:
        slow = await door.connection()
        if before:
            await slow.send(before)
            assert await slow.status() == 200
        await slow.send(b"GET / HTTP/1.1\r\nHost: here\r\n")
        dripping = asyncio.create_task(drip(slow))
        assert await slow.ended() < HEAD_SECONDS * 4
        dripping.cancel()
        assert door.refused == {Refusal.HEAD_TOO_SLOW: 1}


async def test_a_websockets_handshake_that_drips_is_closed() -> None:
    async with served() as door:
        slow = await door.connection()
        await slow.send(b"GET /ws HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
        dripping = asyncio.create_task(drip(slow))
        assert await slow.ended() < HEAD_SECONDS * 4
        dripping.cancel()


async def test_a_patient_caller_that_asks_now_and_then_is_served() -> None:
    """The time is one head's, not the connection's; and an answer may take longer than a head."""
    async with served() as door:
        caller = await door.connection()
        until_seconds = time.monotonic() + HEAD_SECONDS * 3
        while time.monotonic() < until_seconds:
            await caller.send(GET)
            assert await caller.status() == 200
            await asyncio.sleep(HEAD_SECONDS / 4)
        caller.close()
        async with connect(f"ws://127.0.0.1:{door.port}/ws", proxy=None) as socket:
            await asyncio.sleep(HEAD_SECONDS * 2)
            await (await socket.ping())
        assert not door.refused


async def test_a_connection_is_kept_for_its_next_request_longer_than_a_load_balancer_keeps_it() -> None:
    """Seen: it was closed after 5 s, as HTTP clients close theirs, and a request that came then was lost."""
    assert DoorLimits().kept_seconds > 60
    async with served() as door:
        caller = await door.connection()
        for _ in range(2):
            await caller.send(GET)
            assert await caller.status() == 200
            await asyncio.sleep(HEAD_SECONDS * 2)
        await caller.send(b"GET / HTTP/1.1\r\nHost: he")
        assert HEAD_SECONDS * 0.5 < await caller.ended() < HEAD_SECONDS * 4
        assert door.refused == {Refusal.HEAD_TOO_SLOW: 1}


async def test_a_kept_connection_that_sends_nothing_more_is_closed_in_the_end() -> None:
    async with served(DoorLimits(head_seconds=HEAD_SECONDS, kept_seconds=1)) as door:
        caller = await door.connection()
        await caller.send(GET)
        assert await caller.status() == 200
        assert 0.8 < await caller.ended() < 5
        assert not door.refused


async def test_kept_connections_leave_room_for_whoever_asks() -> None:
    async with served(DoorLimits(connections=5)) as door:
        for _ in range(20):
            caller = await door.connection()
            await caller.send(GET)
            assert await caller.status() == 200
        assert door.door.open <= 6


LARGE = b"x" * (doors.HEAD_BYTES + 1)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\nX-Large: " + LARGE + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: here\r\nX-Endless: " + LARGE,
        b"GET /" + LARGE,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (doors.HEAD_BYTES // 5),
        b"\r\n" * doors.HEAD_BYTES,
        b"GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nCookie: " + LARGE + b"\r\n\r\n",
    ],
    ids=["one header", "an endless header", "an address", "many headers", "empty lines", "a handshake"],
)
@pytest.mark.parametrize("before", [b"", GET], ids=["first", "second"])
async def test_a_head_that_is_too_large_is_431_and_no_more_of_it_is_kept(head: bytes, before: bytes) -> None:
    async with served() as door:
        connection = await door.connection()
        if before:
            await connection.send(before)
            assert await connection.status() == 200
        # In parts: the first is small, as it comes from a network.
        await connection.send(head[:1_000])
        await connection.send(head[1_000:] + head[-2:] * MEBIBYTE)
        assert await connection.status() == 431
        await connection.ended()
        assert door.refused == {Refusal.HEAD_TOO_LARGE: 1}


async def test_a_large_head_within_the_limit_is_answered() -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(b"GET / HTTP/1.1\r\nHost: here\r\nCookie: " + b"x" * 15_000 + b"\r\n\r\n")
        assert await connection.status() == 200
        # A body and the next head may come in one piece.
        body = b"b" * 100_000
        await connection.send(b"POST /read HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\n" + body + GET)
        assert (await connection.status(), await connection.status()) == (200, 200)


@pytest.mark.parametrize(
    "headers",
    [b"X-Line: " + b"x" * 9_000 + b"\r\n", b"a: b\r\n" * 200],
    ids=["a long line", "many headers"],
)
async def test_a_handshake_that_the_websocket_library_does_not_take_is_refused(headers: bytes) -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(handshake("/ws") + headers + b"\r\n")
        assert await connection.status() == 431
        assert await connection.ended() < 1


async def test_a_refused_handshake_is_no_error_of_ours() -> None:
    """Seen: an error in the log for each, at a stranger's will."""
    async with served() as door:
        connection = await door.connection()
        await connection.send(handshake("/refused") + b"\r\n")
        assert await connection.status() == 401
        assert await connection.ended() < 1


async def test_frames_before_the_handshake_is_answered_leave_no_traceback() -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(handshake("/ws?after_seconds=0.2") + b"\r\n")
        await asyncio.sleep(0.05)
        await connection.send(b"\xff" * 100)
        assert await connection.ended() < 1


async def test_an_address_has_so_many_connections_and_others_are_served() -> None:
    limits = DoorLimits(connections_per_address=3, trusted_proxies=[ELSEWHERE])
    async with served(limits) as door:
        kept = [await door.connection("127.0.0.2") for _ in range(3)]
        await comes_true(lambda: door.door.open == 3)
        one_too_many = await door.connection("127.0.0.2")
        assert await one_too_many.status() == 429
        another = await door.connection("127.0.0.3")
        await another.send(GET)
        assert await another.status() == 200
        await kept[0].send(GET)
        assert await kept[0].status() == 200
        kept[0].close()

        async def is_let_in() -> bool:
            again = await door.connection("127.0.0.2")
            await again.send(GET)
            return await again.status() == 200

        await until(is_let_in)


async def test_a_websocket_counts_as_the_connection_that_it_was() -> None:
    limits = DoorLimits(connections_per_address=1, trusted_proxies=[ELSEWHERE])
    async with served(limits) as door:
        address = f"ws://127.0.0.1:{door.port}/ws"
        async with connect(address, proxy=None, local_addr=("127.0.0.2", 0)):
            assert await (await door.connection("127.0.0.2")).status() == 429
        await comes_true(lambda: door.door.open == 0)
        async with connect(address, proxy=None, local_addr=("127.0.0.2", 0)):
            pass


@pytest.mark.parametrize(
    "limits",
    [
        DoorLimits(connections_per_address=1),
        DoorLimits(connections_per_address=1, trusted_proxies=["127.0.0.0/8"]),
        DoorLimits(connections_per_address=0, trusted_proxies=[ELSEWHERE]),
    ],
    ids=["its default", "a network", "no limit"],
)
async def test_a_trusted_proxy_opens_as_many_as_it_needs(limits: DoorLimits) -> None:
    async with served(limits) as door:
        for _ in range(20):
            connection = await door.connection()
            await connection.send(GET)
            assert await connection.status() == 200


def test_an_ipv6_site_counts_as_one_address_and_a_mapped_one_as_ipv4() -> None:
    door = Door(DoorLimits(connections_per_address=1, trusted_proxies=["127.0.0.1"]))
    assert door.enter("2001:db8::1") is None
    assert door.enter("2001:db8::2") is Refusal.TOO_MANY_OF_ADDRESS
    assert door.enter("2001:db8:0:1::2") is None
    assert door.enter("203.0.113.5") is None
    assert door.enter("::ffff:203.0.113.5") is Refusal.TOO_MANY_OF_ADDRESS
    assert [door.enter("::ffff:127.0.0.1") for _ in range(3)] == [None] * 3


async def test_a_flood_of_idle_connections_leaves_room_for_whoever_asks() -> None:
    """With uvicorn's own limit each request was 503 then, and connections were accepted without end."""
    most = 50
    async with served(DoorLimits(connections=most)) as door:
        busy = await door.connection()
        await busy.send(b"POST /read HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n1")
        idle = [await door.connection() for _ in range(most * 3)]
        for _ in range(20):
            caller = await door.connection()
            await caller.send(GET)
            assert await caller.status() == 200
            assert door.door.open <= most + 1
            idle += [await door.connection() for _ in range(5)]
        await busy.send(b"2")
        assert await busy.status() == 200
        assert door.refused[Refusal.MADE_ROOM] >= most * 2


async def test_where_every_place_is_at_work_one_more_is_503() -> None:
    async with served(DoorLimits(connections=2)) as door:
        for _ in range(2):
            await (await door.connection()).send(b"POST /read HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n1")
        await comes_true(lambda: not door.door._waiting)
        assert await (await door.connection()).status() == 503


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\xff\x16\x03\x01" * 50, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET \r\n\r\n", b"GET ?a HTTP/1.1\r\n\r\n"],
)
async def test_garbage_is_400_and_behind_a_good_request_the_good_one_is_answered_first(garbage: bytes) -> None:
    async with served() as door:
        alone = await door.connection()
        await alone.send(garbage)
        assert await alone.status() == 400
        assert await alone.ended() < 5
        behind = await door.connection()
        await behind.send(GET + garbage)
        assert await behind.status() == 200
        await behind.ended()
        assert door.refused == {Refusal.UNREADABLE: 2}


async def test_pipelined_requests_are_answered_in_order_and_only_so_many_are_kept() -> None:
    async with served() as door:
        polite = await door.connection()
        await polite.send(GET * 10)
        assert [await polite.status() for _ in range(10)] == [200] * 10
        polite.close()
        flood = await door.connection()
        await flood.send(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n" + GET * 5_000)
        await flood.ended()
        assert door.refused == {Refusal.TOO_MANY_PIPELINED: 1}


async def test_a_body_that_nobody_reads_is_not_taken_without_end() -> None:
    """Seen: after a 401 or 404 the rest of the body was read for as long as it came."""
    async with served() as door:
        connection = await door.connection()
        await connection.send(b"POST /nothing-here HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000000\r\n\r\n")
        assert await connection.status() == 404
        with pytest.raises(ConnectionError):
            for _ in range(100):
                await connection.send(b"b" * MEBIBYTE)
        assert door.refused == {Refusal.BODY_AFTER_ANSWER: 1}
        slow = await door.connection()
        await slow.send(b"POST /nothing-here HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n")
        assert await slow.status() == 404
        dripping = asyncio.create_task(drip(slow))
        assert await slow.ended() < HEAD_SECONDS * 4
        dripping.cancel()


async def test_a_small_body_that_nobody_reads_leaves_the_connection_open() -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 500000\r\n\r\n")
        assert await connection.status() == 200
        await connection.send(b"b" * 500_000 + GET)
        assert await connection.status() == 200


async def test_a_chunked_body_that_ends_in_endless_headers_is_refused() -> None:
    async with served() as door:
        connection = await door.connection()
        head = b"POST /read HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Trailer: "
        await connection.send(head)
        await asyncio.sleep(0)
        await connection.send(b"t" * MEBIBYTE)
        assert await connection.status() in (431, 400)


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_traceback() -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(b"POST /read HTTP/1.1\r\nHost: here\r\nContent-Length: 10\r\n\r\n1")
        await comes_true(lambda: not door.door._waiting)
        connection.close()


async def test_a_body_that_is_garbage_from_a_client_that_waits_to_send_it_leaves_no_traceback() -> None:
    """Seen in ten minutes of fuzz: the 100 Continue was written after the connection's end."""
    async with served() as door:
        connection = await door.connection()
        head = b"POST /read HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        await connection.send(head + b"no chunk\r\n")
        assert await connection.status() == 400
        await comes_true(lambda: not door.tasks)


@pytest.mark.parametrize("when", ["after_seconds", "greeted_after_seconds"])
async def test_a_client_that_leaves_before_it_is_sent_something_leaves_no_traceback(when: str) -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(handshake(f"/ws?{when}=0.1") + b"\r\n")
        await comes_true(lambda: not door.door._waiting)
        connection.close()
        await comes_true(lambda: not door.tasks)


async def test_an_answer_that_nobody_reads_is_given_up() -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        await comes_true(lambda: door.refused == {Refusal.NOT_READ: 1}, within_seconds=10)


async def test_a_slow_reader_that_gets_on_has_its_answer() -> None:
    async with served() as door:
        connection = await door.connection()
        await connection.send(b"GET /large HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        read = 0
        while part := await connection.reader.read(MEBIBYTE):
            read += len(part)
            await asyncio.sleep(HEAD_SECONDS / 50)
        assert read > 64 * MEBIBYTE
        assert not door.refused


@pytest.mark.parametrize("message", ["x" * (doors.MAX_MESSAGE_BYTES + 1), b"x" * (doors.MAX_MESSAGE_BYTES + 1)])
async def test_a_large_message_of_a_client_closes_its_websocket(message: Any) -> None:
    async with served() as door, connect(f"ws://127.0.0.1:{door.port}/ws", proxy=None) as socket:
        for small in ("hello", b"\x00"):
            await socket.send(small)
        await (await socket.ping())
        await socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


async def test_text_that_is_no_text_is_dropped_like_every_message() -> None:
    """Seen: a traceback for each, at a client's will."""
    async with served() as door, connect(f"ws://127.0.0.1:{door.port}/ws", proxy=None) as socket:
        await socket.send(b"\xff\xfe not UTF-8", text=True)
        await (await socket.ping())


async def test_refusals_are_logged_once_a_minute_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with served() as door:
        for _ in range(100):
            garbage = await door.connection()
            await garbage.send(b"garbage\r\n\r\n")
            await garbage.ended()
        assert door.refused == {Refusal.UNREADABLE: 100}
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 2


@asynccontextmanager
async def process(command: list[str], settings: dict[str, str], port: int) -> AsyncIterator[int]:
    named = {f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}
    running = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=PROJECT, env={**os.environ, **named, "PYTHONPATH": str(PROJECT)}
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:

            async def answers() -> bool:
                assert running.returncode is None, "the process ended at its start"
                try:
                    return (await http.get("/healthz")).is_success
                except httpx.TransportError:
                    return False

            await until(answers, within_seconds=30)
        yield port
    finally:
        running.terminate()
        await running.wait()


@pytest.mark.slow
async def test_every_http_door_of_ours_has_these_limits(
    temporal_env: WorkflowEnvironment, postgres_dsn: str, tmp_path: Path
) -> None:
    temporal = temporal_env.client.service_client.config.target_host
    operations, bridge, codec = any_free_port(), any_free_port(), any_free_port()
    limits = {"CONNECTIONS_PER_ADDRESS": "2", "TRUSTED_PROXIES": ELSEWHERE}
    gateway_settings = {"DATABASE_DSN": postgres_dsn, "GATEWAY_OPERATIONS_PORT": str(operations)}
    bridge_settings = {
        **{"BRIDGE_PORT": str(bridge), "BRIDGE_STORE_URL": tmp_path.as_uri(), "SERVICE_SECRET": TEST_TOKEN_SECRET},
        **{"CALLBACK_SECRETS": TEST_CALLBACK_SECRET, "BRIDGE_TASK_QUEUE": "doors"},
    }
    codec_settings = {
        "CODEC_SERVER_PORT": str(codec),
        "CODEC_SERVER_TOKEN": TEST_TOKEN_SECRET,
        "ENCRYPTION_KEYS": "k1:" + base64.b64encode(b"k" * 32).decode(),
    }
    async with (
        gateway_process({**limits, **gateway_settings, "TEMPORAL_ADDRESS": temporal}) as gateway,
        process(["-m", "bridge"], {**limits, **bridge_settings, "TEMPORAL_ADDRESS": temporal}, bridge),
        process(["codec_server.py"], {**limits, **codec_settings}, codec),
    ):
        for port in (gateway.port, operations, bridge, codec):
            at_its_limit = [await Connection.to(port, "127.0.0.9") for _ in range(3)]
            assert await at_its_limit[2].status() == 429, port
            await at_its_limit[0].send(b"GET / HTTP/1.1\r\nX-Large: " + LARGE + b"\r\n\r\n")
            assert await at_its_limit[0].status() == 431, port
            for connection in at_its_limit:
                connection.close()
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"http://127.0.0.1:{operations}/metrics")).text
        assert 'gateway_connections_refused_total{reason="head_too_large"} 2.0' in metrics
        assert 'gateway_connections_refused_total{reason="too_many_of_address"} 2.0' in metrics
        assert "gateway_connections_open 0.0" in metrics
