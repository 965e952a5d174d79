"""Turns: what is counted of one tenant is counted one after the other in this process too.

So a tenant's starts hold one connection to PostgreSQL at a time. While PostgreSQL is away nobody waits in line: all who
wait for a turn that fails for that fail with it, and none waits for longer than it was given.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from store.failures import StoreUnavailable


class _Turn:
    __slots__ = ("__weakref__", "failed_at", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.failed_at = -math.inf
        """When the newest turn failed because the store could not be used."""


class Turns:
    """Of all tenants, for one process."""

    def __init__(self) -> None:
        self._of: WeakValueDictionary[str, _Turn] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, tenant_id: str, *, within_seconds: float) -> AsyncIterator[None]:
        """Within this context the turn is the caller's. Raises StoreUnavailable."""
        turn = self._of.setdefault(tenant_id, _Turn())
        since = time.monotonic()
        try:
            async with asyncio.timeout(within_seconds):
                await turn.lock.acquire()
        except TimeoutError:
            raise StoreUnavailable(
                f"Others of the tenant {tenant_id} were counted for {within_seconds:.1f} s: try again."
            ) from None
        try:
            if turn.failed_at >= since:
                raise StoreUnavailable(f"The task store could not be used for the tenant {tenant_id}: try again.")
            try:
                yield
            except StoreUnavailable:
                turn.failed_at = time.monotonic()
                raise
        finally:
            turn.lock.release()
