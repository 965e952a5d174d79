"""An application served by uvicorn in this process, on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from tests.waiting import comes_true


@asynccontextmanager
async def served_app(app: FastAPI) -> AsyncIterator[int]:
    """Serve it; its port. Its lifespan runs too."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve())
    await comes_true(lambda: server.started or serving.done())
    assert server.started, "the application ended while it was starting"
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving
