"""A server's one slot. Servers pull jobs: a busy, silent or dead server pulls none.

A short activity on the pool's queue takes a job. The slot stays held until the job's run on this server has ended, so
the pool's worker polls for no other task in between.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from temporalio.worker import (
    CustomSlotSupplier,
    SlotMarkUsedContext,
    SlotPermit,
    SlotReleaseContext,
    SlotReserveContext,
)

from bridge.server import Server, ServerError
from bridge.server_health import ServerHealth
from bridge.storage_health import StorageHealth

TAKEN_SECONDS: Final = 20.0
"""If a taken job has not started by then, it was cancelled and the slot is free again."""
CHECK_SECONDS: Final = 0.5


class Slot:
    """Which job holds the server, and whether the server may take one."""

    def __init__(
        self,
        server: Server,
        health: ServerHealth,
        *,
        storage_health: StorageHealth | None = None,
        taken_seconds: float = TAKEN_SECONDS,
    ) -> None:
        self._server = server
        self.health = health
        self._storage_health = storage_health
        self._taken_seconds = taken_seconds
        self._holder: str | None = None
        self._runs = 0
        self._taken_until = 0.0
        self._changed = asyncio.Event()
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._seen_problem: str | None = None

    @property
    def is_held(self) -> bool:
        return self._runs > 0 or (self._holder is not None and time.monotonic() < self._taken_until)

    @property
    def sickness(self) -> str | None:
        """Why the server may take no job even if it runs nothing, or None: it is sick, or object storage is away."""
        return self.health.problem or (self._storage_health.problem if self._storage_health else None)

    async def take(self, job_id: str) -> str | None:
        """Hold the slot for a job until its run begins. Returns None, or the reason why it cannot."""
        if self.is_held and self._holder != job_id:
            return "the server is held by another job"
        problem = await self.problem()
        if problem is None and self.is_held and self._holder != job_id:
            return "the server is held by another job"
        if problem is None:
            self._holder = job_id
            self._taken_until = time.monotonic() + self._taken_seconds
        return problem

    def hold(self, run_id: str) -> bool:
        """Begin a run that no job asked for, unless the slot is held. Returns whether it has begun."""
        if self.is_held:
            return False
        self.begin(run_id)
        return True

    def begin(self, job_id: str) -> None:
        self._holder = job_id
        self._runs += 1

    def end(self, *, kept_for: str | None = None) -> None:
        """A run is over. `kept_for`: the job whose next run begins at once, as after a `take`."""
        self._runs -= 1
        if not self._runs:
            self._holder = kept_for
            self._taken_until = time.monotonic() + self._taken_seconds
        self._looked_at = float("-inf")
        self._changed.set()

    async def problem(self) -> str | None:
        """Why the server may take no job now, or None. Another client's prompt is a reason."""
        if self.sickness is not None:
            return self.sickness
        try:
            queue = await self._server.queue()
        except ServerError as error:
            return str(error)
        return None if queue.is_empty else "the server runs something else"

    async def _recent_problem(self) -> str | None:
        """As `problem`, for many who ask at once: the server is asked once for all of them."""
        async with self._looking:
            if time.monotonic() - self._looked_at >= CHECK_SECONDS / 2:
                self._seen_problem = await self.problem()
                self._looked_at = time.monotonic()
            return self._seen_problem

    async def until_free(self) -> None:
        while True:
            self._changed.clear()
            if not self.is_held and await self._recent_problem() is None and not self.is_held:
                return
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue


class FreeSlots(CustomSlotSupplier):
    """Lets the pool's worker poll only while the server is free, with one task at a time."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._reserved = 0

    async def reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit:
        while True:
            await self._slot.until_free()
            # Several pollers may wait here: the first to wake gets the slot.
            if self._reserved == 0:
                self._reserved += 1
                return SlotPermit()
            await asyncio.sleep(CHECK_SECONDS)

    def try_reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit | None:
        return None

    def mark_slot_used(self, ctx: SlotMarkUsedContext) -> None:
        return None

    def release_slot(self, ctx: SlotReleaseContext) -> None:
        self._reserved -= 1
