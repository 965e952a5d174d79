"""One long-lived timer for everything a task waits for (step table 1, row 4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow


class Alarm:
    """Wakes the flow at an instant. A timer that stands is kept when a later instant is wanted.

    A timer per wake-up would cost two events for every callback; this one costs two for each time it rings.
    """

    def __init__(self) -> None:
        self._at: datetime | None = None
        self._timer: asyncio.Task[None] | None = None

    async def until(self, happened: Callable[[], bool], at: datetime | None, summary: str) -> None:
        """Wait until `happened()`, or until `at` at the latest (it may ring earlier: look again, and wait again)."""
        if happened() or (at is not None and at <= workflow.now()):
            return
        if at is not None and (self._at is None or at < self._at):
            self._set(at, summary)
        await workflow.wait_condition(lambda: happened() or self._has_rung())
        if self._has_rung():
            self._at = self._timer = None

    def clear(self) -> None:
        """Cancel the timer that stands, e.g. before a wait under another name."""
        if self._timer is not None:
            self._timer.cancel()
        self._at = self._timer = None

    def _set(self, at: datetime, summary: str) -> None:
        """`at` lies ahead."""
        self.clear()
        self._at = at
        # Timers have a resolution of milliseconds: a little later is right, a little earlier rings twice.
        span = at - workflow.now() + timedelta(milliseconds=1)
        self._timer = asyncio.create_task(workflow.sleep(span, summary=summary))

    def _has_rung(self) -> bool:
        return self._timer is not None and self._timer.done()
