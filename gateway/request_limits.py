"""Limits for the size and the duration of a request, before any of it is parsed as JSON.

Streams are not limited: once a body is complete, waiting for the client to leave has no limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfyui_temporal.contracts.size_budget import KIB, MAX_FILE_LIST_BYTES
from gateway.access import Access
from runtime.stated_size import is_stated_above

MAX_BODY_BYTES: Final = 128 * KIB
BODY_SECONDS: Final = 10.0
START_IMAGE: Final = "/api/v1/tasks/images"
START_TRAINING: Final = "/api/v1/tasks/trainings"
UPLOADS: Final = "/api/v1/uploads"
LONG_BODY_SECONDS: Final = 30.0
"""For a list of files: 4 MiB over a line of little more than 1 Mbit/s."""
BODY_BYTES: Final = "body_bytes"
"""Under this name a request's state holds how long its body is."""
LIMITED_PATHS: Final = "/api/"
"""Callbacks have their own limits (contract §2)."""


class RequestLimits:
    """ASGI middleware: 413 beyond 128 KiB, by the stated length before anything is read, and counted regardless of
    it; 408 if it takes over 10 s.

    The order of a training may also hold a list of files of 4 MiB, that of an image files of `inline_bytes` in base64,
    and take 30 s. An upload has limits of its own (upload_body.py, uploads.py). None of this is for a stranger, whose
    body is read before its token.
    """

    def __init__(self, app: ASGIApp, access: Access | None, *, inline_bytes: int = 0) -> None:
        self._app = app
        self._access = access
        self._more = {START_TRAINING: MAX_FILE_LIST_BYTES, START_IMAGE: -(-inline_bytes // 3) * 4}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(LIMITED_PATHS):
            await self._app(scope, receive, send)
            return
        max_bytes, seconds = MAX_BODY_BYTES, BODY_SECONDS
        path = scope["path"].rstrip("/")
        is_upload = path == UPLOADS or path.startswith(f"{UPLOADS}/")
        if (is_upload or self._more.get(path)) and await self._is_known(scope):
            if is_upload:
                await self._app(scope, receive, send)
                return
            max_bytes, seconds = MAX_BODY_BYTES + self._more[path], LONG_BODY_SECONDS
        is_too_large = is_stated_above(Headers(scope=scope).get("content-length"), max_bytes)
        state = scope.setdefault("state", {})
        limited = _limited(receive, max_bytes, seconds, state, is_too_large=is_too_large)
        await self._app(scope, limited, send)

    async def _is_known(self, scope: Scope) -> bool:
        return self._access is not None and await self._access.knows(HTTPConnection(scope))


def _limited(
    receive: Receive, max_bytes: int, seconds: float, state: MutableMapping[str, Any], *, is_too_large: bool
) -> Receive:
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
