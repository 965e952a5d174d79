"""The bytes of an upload as they arrive: a slow sender is sent away, and one that leaves keeps what it has sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from gateway.problems import Problem
from runtime.stated_size import stated_size

SLOW_SECONDS: Final = 30.0
SLOW_BYTES: Final = 128 * 1024
"""Within `SLOW_SECONDS` so much must arrive, or the end: some 35 kbit/s. A whole body has no limit of time: a large
file takes what it takes."""
MAX_DROPPED_BYTES: Final = 64 * 1024 * 1024


class SentBytes:
    """A request's body, once. `has_left`: its sender went away before the end, or was sent away (`end`)."""

    def __init__(self, request: Request) -> None:
        self._stream = request.stream()
        self._arriving: asyncio.Timeout | None = None
        """Set while it waits for bytes."""
        self.stated = stated_size(request.headers.get("content-length"))
        """What `Content-Length` says; None where it says nothing."""
        self.has_left = self.is_ended = False
        self._waits = "100-continue" in request.headers.get("expect", "").lower()
        """The sender waits for `100 Continue`: an answer before that is read at once."""

    def end(self) -> None:
        """Take no more of it, as though its sender had left."""
        self.is_ended = True
        if self._arriving is not None and not self._arriving.expired():
            self._arriving.reschedule(asyncio.get_running_loop().time())

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises HTTPException 408."""
        self._waits = False
        clock = asyncio.get_running_loop().time
        # Only the wait for the sender counts: storage may be slow too.
        seconds, missing = SLOW_SECONDS, SLOW_BYTES
        while not self.is_ended:
            began = clock()
            try:
                chunk = await self._next(seconds)
            except TimeoutError:
                if self.is_ended:
                    break
                raise HTTPException(408) from None
            except ClientDisconnect:
                self.has_left = True
                return
            if chunk is None:
                return
            seconds, missing = seconds - (clock() - began), missing - len(chunk)
            if missing <= 0:
                seconds, missing = SLOW_SECONDS, SLOW_BYTES
            yield chunk
        self.has_left = True

    async def _next(self, seconds: float) -> bytes | None:
        """None: it is complete. Raises TimeoutError."""
        try:
            async with asyncio.timeout(seconds) as self._arriving:
                return await anext(self._stream, None)
        finally:
            self._arriving = None

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
