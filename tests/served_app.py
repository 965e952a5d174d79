"""An application served by uvicorn in this process, on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from runtime.door_limits import Door, DoorLimits
from runtime.doors import DoorConfig
from tests.waiting import comes_true


@asynccontextmanager
async def served_app(app: ASGIApp, limits: DoorLimits | None = None) -> AsyncIterator[int]:
    """Serve it behind a door of ours; its port. Its lifespan runs too."""
    door = Door(limits or DoorLimits())
    server = uvicorn.Server(DoorConfig(app, door, host="127.0.0.1", port=0, websockets=True))
    serving = asyncio.create_task(server.serve())
    await comes_true(lambda: server.started or serving.done())
    assert server.started, "the application ended while it was starting"
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving
