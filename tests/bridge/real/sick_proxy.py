"""A proxy before a real server that makes it sick on demand, and keeps what was submitted through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Any, Final, Self
from urllib.parse import urlsplit

PIECE_BYTES: Final = 65_536
SUBMIT: Final = b"POST /prompt "
_REQUEST: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE) /")


class SickProxy:
    """Passes on bytes, sockets too. It reads where requests begin: the bridge's client sends one at a time."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        assert parts.hostname is not None
        self.server = server
        self._target = (parts.hostname, parts.port or 80)
        self._listening: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._submitted: list[bytearray] = []
        self._speaks = asyncio.Event()
        self._speaks.set()
        self.refused = 0
        self.refuses_prompts = False
        """Answer 503 to each submit."""

    @property
    def url(self) -> str:
        assert self._listening is not None
        return f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"

    @property
    def submitted(self) -> list[dict[str, Any]]:
        """The bodies of the submits that the server was given, in order: `prompt_id`, `prompt` (the graph)."""
        return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in self._submitted]

    def silence(self) -> None:
        """Take connections and requests, and pass on nothing, as a process that hangs."""
        self._speaks.clear()

    def speak(self) -> None:
        self._speaks.set()

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listening is not None
        self._listening.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            with contextlib.suppress(OSError):
                await self._passed_on(reader, writer)
        finally:
            self._connections.discard(connection)
            writer.close()

    async def _passed_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._speaks.wait()
        from_server, to_server = await asyncio.open_connection(*self._target)
        try:
            pumps = [
                asyncio.ensure_future(self._requests(reader, to_server, writer)),
                asyncio.ensure_future(self._answers(from_server, writer)),
            ]
            _, open_ones = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in open_ones:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            to_server.close()

    async def _requests(
        self, reader: asyncio.StreamReader, to_server: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        """Until the client closes, or a submit was refused."""
        submitted: bytearray | None = None
        while piece := await reader.read(PIECE_BYTES):
            if _REQUEST.match(piece):
                if piece.startswith(SUBMIT) and self.refuses_prompts:
                    self.refused += 1
                    writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    await writer.drain()
                    return
                submitted = None
                if piece.startswith(SUBMIT):
                    self._submitted.append(submitted := bytearray())
            if submitted is not None:
                submitted += piece
            await self._speaks.wait()
            to_server.write(piece)
            await to_server.drain()

    async def _answers(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await from_server.read(PIECE_BYTES):
            await self._speaks.wait()
            writer.write(piece)
            await writer.drain()
