"""How large a request may be and how long it may take to arrive, before anything of it is read as JSON.

Streams are not touched: once a body is complete, waiting for the client to leave has no limit.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES: Final = 128 * 1024
BODY_SECONDS: Final = 10.0
LIMITED_PATHS: Final = "/api/"
"""Callbacks have limits of their own (contract §2)."""


class RequestLimits:
    """ASGI middleware: 413 beyond 128 KiB, counted, whatever length is stated; 408 where it takes over 10 s."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int = MAX_BODY_BYTES, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(LIMITED_PATHS):
            await self._app(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        size = 0
        is_complete = False
        until = asyncio.get_running_loop().time() + self._body_seconds

        async def limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise HTTPException(413)
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return limited
