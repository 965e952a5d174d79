"""The bytes of an upload as they arrive: a stalled sender is sent away, and one that leaves keeps what it has sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from gateway.problems import Problem

IDLE_SECONDS: Final = 30.0
"""So long nothing may arrive. A whole body has no limit of time: a large file takes what it takes."""
MAX_DROPPED_BYTES: Final = 64 * 1024 * 1024
MAX_DIGITS: Final = 18


class SentBytes:
    """A request's body, once. `has_left`: its sender went away before the end."""

    def __init__(self, request: Request, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._stream = request.stream()
        self._idle_seconds = idle_seconds
        self.stated = _stated(request.headers.get("content-length"))
        """What `Content-Length` says; None where it says nothing."""
        self.has_left = False
        self._waits = "100-continue" in request.headers.get("expect", "").lower()
        """The sender waits for `100 Continue`: an answer before that is read at once."""

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises HTTPException 408."""
        self._waits = False
        while True:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    chunk = await anext(self._stream, None)
            except TimeoutError:
                raise HTTPException(408) from None
            except ClientDisconnect:
                self.has_left = True
                return
            if chunk is None:
                return
            yield chunk

    @asynccontextmanager
    async def answered_at_its_end(self) -> AsyncIterator[None]:
        """Inside, a Problem is raised only once the rest was read and dropped, up to 64 MiB.

        Most clients read no answer before they have sent everything; for a longer rest the connection ends.
        """
        try:
            yield
        except Problem:
            await self._drop()
            raise

    async def _drop(self) -> None:
        if self._waits or (self.stated or 0) > MAX_DROPPED_BYTES:
            return
        left = MAX_DROPPED_BYTES
        with suppress(HTTPException):
            async for chunk in self.chunks():
                left -= len(chunk)
                if left < 0:
                    return


def _stated(content_length: str | None) -> int | None:
    is_number = content_length is not None and content_length.isascii() and content_length.isdigit()
    return int(content_length) if is_number and content_length and len(content_length) <= MAX_DIGITS else None
