"""A way to a server that a test can cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from sqlalchemy.engine import make_url

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Cable:
    """A forwarder to a server on a free TCP port: it can be pulled out, left hanging, and plugged in again."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        """`connect` opens a connection to the server, e.g. `asyncio.open_unix_connection`."""
        self._connect = connect
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.is_plugged = True
        self.port = 0
        self.dsn = ""
        """To PostgreSQL, where the cable leads there."""

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Cable]:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        yield self
        server.close()
        self.pull()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def pull(self) -> None:
        self.is_plugged = False
        for writer in self._writers:
            writer.close()

    def hang(self) -> None:
        self._flows.clear()

    def plug_in(self) -> None:
        self.is_plugged = True
        self._flows.set()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_plugged:
            writer.close()
            return
        far_reader, far_writer = await self._connect()
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pipe = asyncio.create_task(self._pipe(source, sink))
            self._pipes.add(pipe)

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while chunk := await source.read(65_536):
                await self._flows.wait()
                sink.write(chunk)
        except OSError:
            pass
        finally:
            sink.close()


@asynccontextmanager
async def cable_to_postgres(dsn: str) -> AsyncIterator[Cable]:
    """A cable to the server of `dsn`, which names a unix socket."""
    url = make_url(dsn)
    async with Cable(lambda: asyncio.open_unix_connection(f"{url.query['host']}/.s.PGSQL.5432")).laid() as cable:
        cable.dsn = f"postgresql://postgres:secret-word@127.0.0.1:{cable.port}/{url.database}"
        yield cable
