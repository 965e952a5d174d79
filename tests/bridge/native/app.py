"""The application: routes, the executor and the publisher of messages, with the traps that affect every request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from tests.bridge.native.admin_routes import admin_router
from tests.bridge.native.prompt_queue import Json
from tests.bridge.native.proxy import Proxy
from tests.bridge.native.routes import file_routes, internal_routes, jobs_routes, prompt_routes, reading_routes
from tests.bridge.native.state import Native
from tests.bridge.native.traps import Traps

Handler = Callable[[Request], Awaitable[Response]]


def native_app(folder: Path, traps: Traps | None = None) -> FastAPI:
    """The application. Its files are in `folder` (`output`, `temp`, `input`)."""
    native = Native(folder, traps or Traps())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work) for work in (native.executor.work(), native.publish())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="A stand-in for ComfyUI", lifespan=lifespan, openapi_url=None)
    app.include_router(admin_router(native))
    app.include_router(jobs_routes(native))
    app.include_router(internal_routes(native))
    for prefix in ("", "/api"):
        for router in (prompt_routes(native), file_routes(native), reading_routes(native)):
            app.include_router(router, prefix=prefix)
    app.middleware("http")(_trapped(native))
    app.add_middleware(Proxy, traps=lambda: native.traps)
    return app


def _trapped(native: Native) -> Callable[[Request, Handler], Awaitable[Response]]:
    async def middleware(request: Request, call_next: Handler) -> Response:
        path = request.url.path.removeprefix("/api") or "/"
        if path.startswith("/admin"):
            return await call_next(request)
        body = await request.body() if request.method == "POST" and "json" in _content_type(request) else b""
        native.requests.append(_seen(request, path, body))
        await native.answers.wait()
        await asyncio.sleep(native.traps.answer_delay_seconds)
        for broken, status in native.traps.broken_routes.items():
            if path == broken or (broken.endswith("*") and path.startswith(broken[:-1])):
                return Response(status_code=status)
        # ComfyUI answers 403 to a foreign origin, so the bridge sends no Origin header.
        origin = request.headers.get("origin")
        if origin is not None and origin.split("://")[-1] != request.headers.get("host"):
            return Response(status_code=403)
        return await call_next(request)

    return middleware


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _seen(request: Request, path: str, body: bytes) -> Json:
    """What tests can read of a request: its prompt id, but not its graph."""
    parsed: Any = None
    with contextlib.suppress(ValueError):
        parsed = json.loads(body) if body else None
    ids = parsed.get("prompt_id") if isinstance(parsed, dict) else None
    return {
        "method": request.method,
        "path": path,
        "query": str(request.url.query),
        "origin": request.headers.get("origin"),
        "prompt_id": ids,
        "at": time.time(),
    }
