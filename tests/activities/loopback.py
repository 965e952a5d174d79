"""A tiny HTTP/1.1 server on loopback that answers whatever a test says, down to the bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Loopback:
    """`answer` writes the whole response; the connection is kept unless it closes the writer."""

    answer: Answer
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, target, _ = first.split(" ")
                request = Seen(method, target, headers, body)
                self.seen.append(request)
                await self.answer(request, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Loopback]:
    """Serve on 127.0.0.1, a free port, until left."""
    loopback = Loopback(answer)
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(loopback.serve(reader, writer))
        tasks.add(task)
        await task

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=1024 * 1024)
    loopback.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield loopback
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def http_bytes(status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Answer", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in ({"content-type": "application/json"} | (headers or {})).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def always(status: int, body: Any = b"", headers: dict[str, str] | None = None) -> Answer:
    """The same answer to everything; `body` is bytes, or a value sent as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def answer(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(http_bytes(status, raw, headers))

    return answer


def error_body(message: str, code: str | int = "", **more: Any) -> dict[str, Any]:
    return {"detail": {"code": code, "message": message, **more}}
