"""Limits for the size and the duration of a request, before any of it is parsed as JSON.

Streams are not limited: once a body is complete, waiting for the client to leave has no limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfyui_temporal.contracts.size_budget import KIB, MAX_FILE_LIST_BYTES
from gateway.access import Access
from gateway.body_memory import BodyMemory
from gateway.problems import Problem
from runtime.stated_size import is_stated_above, stated_size

MAX_BODY_BYTES: Final = 128 * KIB
BODY_SECONDS: Final = 10.0
START_IMAGE: Final = "/api/v1/tasks/images"
START_TRAINING: Final = "/api/v1/tasks/trainings"
UPLOADS: Final = "/api/v1/uploads"
LONG_BODY_SECONDS: Final = 30.0
"""For a list of files: 4 MiB over a line of little more than 1 Mbit/s."""
COPIES: Final = 3
"""A long order is held so often at once: as bytes, as text, and as what was read from it."""
BODY_BYTES: Final = "body_bytes"
"""Under this name a request's state holds how long its body is."""
LIMITED_PATHS: Final = "/api/"
"""Callbacks have their own limits (contract §2)."""


class RequestLimits:
    """ASGI middleware: 413 beyond 128 KiB, by the stated length before anything is read, and counted regardless of
    it; 408 if it takes over 10 s.

    The order of a training may also hold a list of files of 4 MiB, that of an image files of `inline_bytes` in base64,
    and take 30 s; what is longer than 128 KiB has its memory reserved first (body_memory.py: 429). An upload has limits
    of its own (upload_body.py, uploads.py). None of this is for a stranger, whose body is read before its token.
    """

    def __init__(self, app: ASGIApp, access: Access | None, memory: BodyMemory, *, inline_bytes: int = 0) -> None:
        self._app = app
        self._access = access
        self._memory = memory
        self._more = {START_TRAINING: MAX_FILE_LIST_BYTES, START_IMAGE: -(-inline_bytes // 3) * 4}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(LIMITED_PATHS):
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        is_upload = path == UPLOADS or path.startswith(f"{UPLOADS}/")
        tenant_id = await self._tenant_of(scope) if is_upload or self._more.get(path) else None
        if tenant_id is None:
            await self._app(scope, _limited(scope, receive, MAX_BODY_BYTES, BODY_SECONDS), send)
        elif is_upload:
            await self._app(scope, receive, send)
        else:
            await self._answer_long(tenant_id, MAX_BODY_BYTES + self._more[path], scope, receive, send)

    async def _answer_long(self, tenant_id: str, max_bytes: int, scope: Scope, receive: Receive, send: Send) -> None:
        limited = _limited(scope, receive, max_bytes, LONG_BODY_SECONDS)
        stated = stated_size(Headers(scope=scope).get("content-length"))
        size = max_bytes if stated is None else stated
        async with AsyncExitStack() as room:
            if MAX_BODY_BYTES < size <= max_bytes:
                try:
                    await room.enter_async_context(self._memory.reserved(tenant_id, COPIES * size))
                except Problem as problem:
                    limited = _refusing(problem)
            await self._app(scope, limited, send)

    async def _tenant_of(self, scope: Scope) -> str | None:
        return None if self._access is None else await self._access.tenant_of(HTTPConnection(scope))


def _refusing(problem: Problem) -> Receive:
    """Refuses where the body is read, so that the refusal is counted and recorded as others are."""

    async def refuse() -> Message:
        raise HTTPException(problem.status, problem.detail, headers=problem.headers)

    return refuse


def _limited(scope: Scope, receive: Receive, max_bytes: int, seconds: float) -> Receive:
    is_too_large = is_stated_above(Headers(scope=scope).get("content-length"), max_bytes)
    state: MutableMapping[str, Any] = scope.setdefault("state", {})
    size = 0
    is_complete = False
    until = asyncio.get_running_loop().time() + seconds

    async def limited() -> Message:
        nonlocal size, is_complete
        too_large = HTTPException(413, f"{max_bytes // KIB} KiB")
        if is_too_large:
            raise too_large
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408) from None
        size += len(message.get("body", b""))
        state[BODY_BYTES] = size
        if size > max_bytes:
            raise too_large
        is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return limited
