"""Whether a server may be given jobs, judged by what it did with the ones that it had.

    well ── refuses a submit, a broken GPU, runs nothing, fails faster than any run ──→ sick
    sick ── a test pattern is run, at once and then less and less often ── it succeeds ──→ well

A sick server takes no job. The job that found it sick goes elsewhere. Nobody has to bring the server back. What fails
for one tenant only, and not in the test pattern, may be that tenant's inputs: it keeps the server away for a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog

from bridge.orders import GraphOutcome
from bridge.probe import Probe
from bridge.server import Server
from comfyui_temporal.contracts.errors import FailureCode
from runtime.background import running_in_background

QUICK_FAILURES: Final = 3
"""So many different jobs in a row, each failed faster than any run that succeeded, make a server sick."""
QUICK_SECONDS: Final = 2.0
"""Faster than this is quick as long as no run has succeeded."""
FIRST_PAUSE_SECONDS: Final = 15.0
LONGEST_PAUSE_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 0.25
_SERVERS_CODES: Final = frozenset({FailureCode.NODE_ERROR.value, FailureCode.INTERNAL.value})

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Sickness:
    """Since when, and why, for a person to read."""

    since: datetime
    reason: str


class ServerHealth:
    """One server's health. It is probed while `watched` is entered."""

    def __init__(
        self,
        server: Server,
        *,
        probe: Probe | None = None,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = server
        self._probe = probe or Probe()
        self._first_pause = first_pause_seconds
        self.on_change = on_change
        self.sickness: Sickness | None = None
        self._relapses = 0
        self._probe_at = 0.0
        self._fastest = QUICK_SECONDS
        self._has_succeeded = False
        self._quick: dict[str, str] = {}
        """Task → tenant, of the jobs in a row that failed so fast."""

    @property
    def problem(self) -> str | None:
        """Why the server takes nothing, or None."""
        return f"the server is sick: {self.sickness.reason}" if self.sickness else None

    def fell_sick(self, reason: str, *, are_one_tenants: bool = False) -> None:
        """Take nothing until a test pattern succeeds. A relapse is probed later than the first time.

        `are_one_tenants`: only jobs of one tenant speak against the server. Its inputs may be what fails, so others do
        not wait longer and longer for it.
        """
        since = self.sickness.since if self.sickness else datetime.now(UTC)
        is_known = self.sickness is not None
        self.sickness = Sickness(since, reason)
        self._quick.clear()
        if not is_known:
            log.warning("comfyui_server_sick", server=self._server.url, reason=reason)
            self._wait_before_probe(at_most_first=are_one_tenants)
        self.on_change()

    def ran(
        self, task_id: str, tenant_id: str, outcome: GraphOutcome, seconds: float, *, is_whole: bool = True
    ) -> str | None:
        """A run ended after `seconds`. Returns why this makes the server sick, or None.

        `is_whole`: it was seen from its beginning. Otherwise a success does not show how fast a run can be.
        """
        if outcome.error is None:
            if is_whole:
                self._fastest = min(self._fastest, seconds) if self._has_succeeded else seconds
                self._has_succeeded = True
            self._relapses = 0
            self._quick.clear()
            return None
        if outcome.error.code not in _SERVERS_CODES or seconds >= max(self._fastest, QUICK_SECONDS):
            return None
        self._quick[task_id] = tenant_id
        if len(self._quick) < QUICK_FAILURES:
            return None
        reason = f"{len(self._quick)} jobs in a row failed faster than any run; the last: {outcome.error.message}"
        self.fell_sick(reason, are_one_tenants=len(set(self._quick.values())) == 1)
        return reason

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Probe the server whenever it is sick, while the body runs."""
        async with running_in_background(self._watch()):
            yield

    async def _watch(self) -> None:
        while True:
            if self.sickness is not None and time.monotonic() >= self._probe_at:
                await self._look(self.sickness)
            await asyncio.sleep(min(LOOK_SECONDS, self._first_pause))

    async def _look(self, sickness: Sickness) -> None:
        problem = await self._probe.problem(self._server)
        if problem is None:
            log.info("comfyui_server_well", server=self._server.url, was=sickness.reason)
            self.sickness = None
            self.on_change()
            return
        log.info("comfyui_server_still_sick", server=self._server.url, reason=problem)
        self._wait_before_probe()

    def _wait_before_probe(self, *, at_most_first: bool = False) -> None:
        """No wait the first time, then doubled up to ten minutes until a job succeeds.

        `at_most_first`: the first pause at most, and later ones do not grow by it.
        """
        relapses = min(self._relapses, 1) if at_most_first else self._relapses
        pause = self._first_pause * 2 ** (relapses - 1) if relapses else 0.0
        self._probe_at = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)
        self._relapses = max(self._relapses, 1) if at_most_first else min(self._relapses + 1, 16)
