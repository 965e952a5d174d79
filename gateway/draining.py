"""Shutdown: streams are notified before the server stops, so that they can end by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

import uvicorn


class Draining:
    """Whether the process is shutting down. Streams wait for it and end with a retry hint."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()

    def begin(self) -> None:
        self._begun.set()

    @property
    def has_begun(self) -> bool:
        return self._begun.is_set()

    async def wait(self) -> None:
        """Return once the shutdown has begun."""
        await self._begun.wait()


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal begins the draining before the server stops accepting connections."""

    def __init__(self, config: uvicorn.Config, draining: Draining) -> None:
        super().__init__(config)
        self._draining = draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._draining.begin()
        super().handle_exit(sig, frame)


class SideServer(uvicorn.Server):
    """uvicorn beside another server of the process, which takes the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served_beside(config: uvicorn.Config) -> AsyncIterator[None]:
    """Serves until the block ends."""
    server = SideServer(config)
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
