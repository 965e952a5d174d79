"""How much memory the large bodies of requests take in one gateway process: uploads, and orders with files in them.

A body reserves what it may take before any of it is read, and waits a little where nothing is left: TCP holds its
sender back meanwhile. No tenant takes all of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from gateway.problems import Problem, ProblemCode

MIB: Final = 1024 * 1024
MOST_BYTES: Final = 256 * MIB
"""Storage clients copy what they write: twice as much, and the process itself, must fit into a container of 1 GiB."""
MOST_BYTES_OF_TENANT: Final = MOST_BYTES // 2
LEAST_BYTES: Final = 64 * 1024
"""A small body counts as so much: the server buffers it."""
WAIT_SECONDS: Final = 10.0
MOST_WAITING_OF_TENANT: Final = 64
RETRY_AFTER_SECONDS: Final = 5


class BodyMemory:
    """The memory for large bodies, in bytes, of all tenants of one process."""

    def __init__(self) -> None:
        self._taken = 0
        self._taken_by: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def reserved(self, tenant_id: str, size: int) -> AsyncIterator[None]:
        """Within this context `size` bytes are the tenant's. Raises Problem 429 where they do not become free soon."""
        # One that is larger than the whole share would never fit.
        size = min(max(size, LEAST_BYTES), MOST_BYTES_OF_TENANT)
        if not self._fits(tenant_id, size):
            await self._wait(tenant_id, size)
        self._take(tenant_id, size)
        try:
            yield
        finally:
            self._take(tenant_id, -size)
            self._given_back.set()
            self._given_back = asyncio.Event()

    async def _wait(self, tenant_id: str, size: int) -> None:
        if self._waiting[tenant_id] >= MOST_WAITING_OF_TENANT:
            raise _refused(tenant_id)
        self._waiting[tenant_id] += 1
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not self._fits(tenant_id, size):
                    await self._given_back.wait()
        except TimeoutError:
            raise _refused(tenant_id) from None
        finally:
            _change(self._waiting, tenant_id, -1)

    def _fits(self, tenant_id: str, size: int) -> bool:
        return self._taken + size <= MOST_BYTES and self._taken_by[tenant_id] + size <= MOST_BYTES_OF_TENANT

    def _take(self, tenant_id: str, size: int) -> None:
        self._taken += size
        _change(self._taken_by, tenant_id, size)


def _change(counts: Counter[str], tenant_id: str, by: int) -> None:
    counts[tenant_id] += by
    if counts[tenant_id] <= 0:
        del counts[tenant_id]


def _refused(tenant_id: str) -> Problem:
    return Problem(
        ProblemCode.RATE_LIMITED,
        f"Too many large bodies of the tenant {tenant_id}, or of all tenants, are arriving here at once. Send fewer at "
        f"a time, and this one again in {RETRY_AFTER_SECONDS} s.",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )
