"""A server's one slot: pull is the router, and a server that is busy, silent or dead pulls nothing.

A job is taken by a short activity on the pool's queue; the slot stays held until the job's run on this server has
ended, so that the pool's worker asks for no other task in between.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog
from temporalio.worker import (
    CustomSlotSupplier,
    SlotMarkUsedContext,
    SlotPermit,
    SlotReleaseContext,
    SlotReserveContext,
)

from bridge.native import NativeServer
from bridge.native_errors import NativeFailure

TAKEN_SECONDS: Final = 20.0
"""How long a taken job may stay away before the slot is free again: its task was cancelled meanwhile."""
LOOK_SECONDS: Final = 0.5
DRAINED_SECONDS: Final = 600.0

log = structlog.get_logger(__name__)


class Slot:
    """Who holds the server, and whether it may take anything."""

    def __init__(self, server: NativeServer, *, taken_seconds: float = TAKEN_SECONDS) -> None:
        self._server = server
        self._taken_seconds = taken_seconds
        self._holder: str | None = None
        self._runs = 0
        self._taken_until = 0.0
        self._drained_until = 0.0
        self._changed = asyncio.Event()

    @property
    def is_held(self) -> bool:
        return self._runs > 0 or (self._holder is not None and time.monotonic() < self._taken_until)

    async def take(self, job_id: str) -> str | None:
        """Hold the slot for a job until its run begins; why not, or None."""
        if self.is_held and self._holder != job_id:
            return "the server is held by another job"
        problem = await self.problem()
        if problem is None:
            self._holder = job_id
            self._taken_until = time.monotonic() + self._taken_seconds
        return problem

    def begin(self, job_id: str) -> None:
        self._holder = job_id
        self._runs += 1

    def end(self) -> None:
        self._runs -= 1
        if not self._runs:
            self._holder = None
        self._changed.set()

    def drain(self, reason: str) -> None:
        """Take nothing for ten minutes, or until the server was restarted: it answers, and runs nothing."""
        log.warning("comfyui_server_drained", server=self._server.url, why=reason)
        self._drained_until = time.monotonic() + DRAINED_SECONDS

    async def problem(self) -> str | None:
        """Why the server may take nothing now, or None. A prompt of somebody else's is a reason."""
        try:
            queue = await self._server.queue()
        except NativeFailure as failure:
            # Gone for a moment: what comes back is another process.
            self._drained_until = 0.0
            return str(failure)
        if time.monotonic() < self._drained_until:
            return "the server runs nothing; restart it"
        return None if queue.is_empty else "the server runs something else"

    async def until_free(self) -> None:
        while True:
            self._changed.clear()
            if not self.is_held and await self.problem() is None:
                return
            try:
                async with asyncio.timeout(LOOK_SECONDS):
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
            # Several pollers may wait: the first to wake has it.
            if self._reserved == 0:
                self._reserved += 1
                return SlotPermit()
            await asyncio.sleep(LOOK_SECONDS)

    def try_reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit | None:
        return None

    def mark_slot_used(self, ctx: SlotMarkUsedContext) -> None:
        return None

    def release_slot(self, ctx: SlotReleaseContext) -> None:
        self._reserved -= 1
