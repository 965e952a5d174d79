"""One body at a time for each upload, in one gateway process: the newest one has the turn.

    a connection breaks without notice           its sender begins again
    PATCH 1 ─▶ waits for bytes ─────────────────▶ is ended, and what it brought is counted ─▶ PATCH 2's turn

A sender that was refused while its broken connection is held would give up: tus clients try for some ten seconds.
Without turns each of many bodies for one upload would be buffered, and one of them taken.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from gateway.upload_body import SentBytes

TURN_SECONDS: Final = 20.0
"""So long a body waits until what came before it is stored."""


class TurnNotReached(Exception):
    """What came before it is still being stored."""


class UploadTurns:
    """The turns of all uploads of one process."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._newest: dict[str, SentBytes] = {}
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def of(self, upload_id: str, body: SentBytes | None = None) -> AsyncIterator[bool]:
        """Within this context nobody else has the upload's turn. An older body is ended. Raises TurnNotReached.

        Whether somebody had it before: what was read of the upload is old then.
        """
        if body is not None:
            if (older := self._newest.get(upload_id)) is not None:
                older.end()
            self._newest[upload_id] = body
        self._users[upload_id] += 1
        lock = self._locks.setdefault(upload_id, asyncio.Lock())
        has_waited, is_held = lock.locked(), False
        try:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    is_held = await lock.acquire()
            except TimeoutError:
                raise TurnNotReached from None
            yield has_waited
        finally:
            if is_held:
                lock.release()
            self._leave(upload_id, body)

    def _leave(self, upload_id: str, body: SentBytes | None) -> None:
        if body is not None and self._newest.get(upload_id) is body:
            del self._newest[upload_id]
        self._users[upload_id] -= 1
        if not self._users[upload_id]:
            del self._users[upload_id], self._locks[upload_id]
