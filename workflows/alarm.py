"""One long-lived timer for everything a task waits for (step table 1, row 4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow


class Alarm:
    """Wakes the flow at a given time. A running timer is kept when a later time is wanted.

    A timer for each wait would cost two events for every callback; this one costs two each time it fires.
    """

    def __init__(self) -> None:
        self._at: datetime | None = None
        self._timer: asyncio.Task[None] | None = None

    async def until(self, happened: Callable[[], bool], at: datetime | None, summary: str) -> None:
        """Wait until `happened()`, or until `at` at the latest. It may return earlier: the caller checks again."""
        if happened() or (at is not None and at <= workflow.now()):
            return
        if at is not None and (self._at is None or at < self._at):
            self._set(at, summary)
        await workflow.wait_condition(lambda: happened() or self._has_fired())
        if self._has_fired():
            self._at = self._timer = None

    def clear(self) -> None:
        """Cancel the running timer, for example before a wait with another label."""
        if self._timer is not None:
            self._timer.cancel()
        self._at = self._timer = None

    def _set(self, at: datetime, summary: str) -> None:
        """`at` is in the future."""
        self.clear()
        self._at = at
        # Timers have a resolution of milliseconds: one that fires a little early would have to be set twice.
        span = at - workflow.now() + timedelta(milliseconds=1)
        self._timer = asyncio.create_task(workflow.sleep(span, summary=summary))

    def _has_fired(self) -> bool:
        return self._timer is not None and self._timer.done()
