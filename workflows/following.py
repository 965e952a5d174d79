"""Row 4: follow one job until it ends, the task is cancelled or its time is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Protocol

from comfyui_temporal.contracts.continuation import JobUpdate
from workflows.alarm import Alarm
from workflows.job_clock import JobClock
from workflows.job_watch import JobWatch
from workflows.step_labels import WAIT
from workflows.stop import Stop


class Concern(Protocol):
    """Something that is checked while a job runs."""

    def has_update(self) -> bool:
        """Whether `check` has something to do now."""

    def due(self) -> datetime | None:
        """When `check` has something to do next, or None."""

    def check(self) -> None:
        """Act if it is due. Raises TaskEnd where the task has to end."""


class Following:
    """The one loop that waits for a job. It reads the inbox first, then a cancel, then everything that is due.

    So a delivery in the inbox wins over a cancel and a deadline (decision 8).
    """

    def __init__(
        self,
        watch: JobWatch,
        clock: JobClock,
        stop: Stop,
        alarm: Alarm,
        concerns: Sequence[Concern],
        continue_as_new: Callable[[], Awaitable[bool]],
    ) -> None:
        self._watch = watch
        self._clock = clock
        self._stop = stop
        self._alarm = alarm
        self._concerns = concerns
        self._continue_as_new = continue_as_new

    async def job_end(self) -> JobUpdate:
        """Wait for the current job's final update, a success or a failure. Raises TaskEnd, or continues as new."""
        while True:
            self._watch.read()
            newest = self._watch.newest
            if newest is not None and newest.is_final:
                self._watch.stop_polling()
                return newest
            self._stop.raise_if_requested()
            for concern in self._concerns:
                concern.check()
            if await self._continue_as_new():
                continue
            self._clock.show_wait()
            await self._alarm.until(self._has_update, self._next_due(), WAIT)

    def _has_update(self) -> bool:
        return self._stop.requested or any(concern.has_update() for concern in self._concerns)

    def _next_due(self) -> datetime | None:
        dues = [due for concern in self._concerns if (due := concern.due()) is not None]
        return min(dues) if dues else None
