"""Whether object storage can be used, as one GPU worker sees it: by what it copied and read last, and by a probe.

    well ── a copy fails, or a preparation and then the probe ──────→ away
    away ── a copy succeeds, or a small object is stored and read ─→ well

While it is away the server takes no job: what it ran could not be kept. Where a preparation fails and the probe does
not, only that job's objects cannot be read, and others go on. A full store may have room for the probe, so a copy is
not judged by it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import structlog

from bridge.server_health import Sickness
from bridge.storage import STORAGE_ERRORS, Storage
from runtime.background import running_in_background

PROBE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 0.25
_CONTENT: Final = b"comfyui-temporal"

log = structlog.get_logger(__name__)


class StorageAway(Exception):
    """Object storage cannot be used now."""

    def __init__(self, storage: Storage, error: Exception) -> None:
        super().__init__(
            f"Object storage at {storage.url} cannot be used: {type(error).__name__}. It is retried; check "
            "COMFYUI_TEMPORAL_BRIDGE_STORE_URL, its credentials and its free space."
        )


class ObjectUnreadable(Exception):
    """What a job needs cannot be read, though storage can be used."""

    def __init__(self, storage: Storage, error: Exception) -> None:
        super().__init__(
            f"An object at {storage.url} that the job needs cannot be read: {type(error).__name__}. Others can."
        )


class StorageHealth:
    """Storage as one server uses it. It is probed while `watched` is entered."""

    def __init__(
        self,
        storage: Storage,
        server_name: str,
        *,
        probe_seconds: float = PROBE_SECONDS,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage = storage
        self._path = f"probes/{hashlib.sha256(server_name.encode()).hexdigest()[:40]}"
        self._probe_seconds = probe_seconds
        self.on_change = on_change
        self.sickness: Sickness | None = None
        self._relapses = 0
        self._probe_at = 0.0

    @property
    def problem(self) -> str | None:
        """Why no job may be taken, or None."""
        return self.sickness.reason if self.sickness else None

    @asynccontextmanager
    async def used(self, *, keeps: bool = False) -> AsyncIterator[None]:
        """Storage is used in the body. A missing object is FileNotFoundError. Raises StorageAway, ObjectUnreadable.

        `keeps`: the body stores what a run made; its success shows that storage is well.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except STORAGE_ERRORS as error:
            if not keeps and await self._answers():
                raise ObjectUnreadable(self._storage, error) from None
            away = StorageAway(self._storage, error)
            self._failed(str(away))
            raise away from None
        if keeps:
            self._relapses = 0
            self._is_well()

    def _failed(self, reason: str) -> None:
        """Take nothing until a probe or a copy succeeds. What a probe does not find is probed later each time."""
        if self.sickness is not None:
            return
        self.sickness = Sickness(datetime.now(UTC), reason)
        pause = self._probe_seconds * 2**self._relapses
        self._probe_at = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)
        self._relapses = min(self._relapses + 1, 16)
        log.warning("storage_away", reason=reason)
        self.on_change()

    def _is_well(self) -> None:
        if self.sickness is not None:
            self.sickness = None
            log.info("storage_well")
            self.on_change()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Probe storage while it is away, as long as the body runs."""
        async with running_in_background(self._watch()):
            yield

    async def _watch(self) -> None:
        while True:
            if self.sickness is not None and time.monotonic() >= self._probe_at:
                await self._look()
            await asyncio.sleep(min(LOOK_SECONDS, self._probe_seconds))

    async def _look(self) -> None:
        if await self._answers():
            self._is_well()
        self._probe_at = time.monotonic() + self._probe_seconds

    async def _answers(self) -> bool:
        """Whether a small object can be stored and read."""
        try:
            await self._storage.write(self._path, _CONTENT)
            return await self._storage.read_whole(self._path) == _CONTENT
        except STORAGE_ERRORS:
            return False
