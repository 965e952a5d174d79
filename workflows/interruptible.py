"""How a run waits: it obeys the wish to stop, the time that is left, and the life of its hold.

While a job runs, `Following` is the loop that checks all three. Everywhere else it is `Waiting`, before the first job
and between two attempts. Every other wait stands in `UNINTERRUPTIBLE` with its reason; a test compares that table with
every `await` in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from temporalio import workflow
from temporalio.workflow import ActivityHandle

from comfyui_temporal.contracts.errors import FailureCode
from workflows.alarm import Alarm
from workflows.earlier_life import EarlierLives
from workflows.failures import TaskEnd, TaskFailed
from workflows.stop import Stop


class KeptHold(Protocol):
    """The hold of a task, as it is looked after while the run waits for something else."""

    def is_needed(self) -> bool:
        """Whether there is, or was, a hold to look after."""

    def is_covered(self) -> bool:
        """Whether something may begin under it: it has life left, or nothing is to be paid for."""

    def has_update(self) -> bool:
        """Whether it wants to be looked at at once."""

    def due(self) -> datetime | None:
        """When it wants to be looked at next, or None."""

    def check(self) -> None:
        """Renew it if it is due. Raises TaskFailed `credit_exhausted`."""


class Waiting:
    """The waits of one run before a delivery. `latest()`: when its time is over, None before its first start."""

    def __init__(self, stop: Stop, alarm: Alarm) -> None:
        self._stop = stop
        self._alarm = alarm
        self._hold: KeptHold | None = None
        self.latest: Callable[[], datetime | None] = lambda: None
        self.earlier = EarlierLives()  # what answers tell of an earlier life: the task may have ended in it

    def look_after(self, hold: KeptHold, latest: Callable[[], datetime | None]) -> None:
        """From now on every wait renews this hold when it is due, and knows when the task's time is over."""
        self._hold, self.latest = hold, latest

    def keeps_hold(self) -> bool:
        """Whether there is a hold to look after, in a run that does so."""
        hold = self._hold
        return hold is not None and hold.is_needed() and workflow.patched("hold-kept-while-waiting")

    def raise_if_interrupted(self) -> None:
        """Raise TaskStopped where a stop was asked for, RowEnded where the task has ended, TaskFailed by the hold."""
        self._stop.raise_if_requested()
        self.earlier.raise_if_ended()
        if self._hold is not None and self.keeps_hold():
            self._hold.check()

    async def until(self, happened: Callable[[], bool], *, at: datetime | None = None, summary: str) -> bool:
        """Wait until `happened()`, or until `at`; whether it happened. Raises as `obey`."""
        while not happened():
            self.raise_if_interrupted()
            if at is not None and workflow.now() >= at:
                return False
            await self._woken(happened, at, summary)
        return True

    async def in_time(self, happened: Callable[[], bool], *, summary: str) -> None:
        """Wait until `happened()`. Raises as `obey`, and TaskFailed `timeout` when the time is over."""
        if not await self.until(happened, at=self.latest(), summary=summary):
            raise _timeout()

    def is_covered(self) -> bool:
        """Whether something may begin under the hold; in a run that does not look after it this is not looked at."""
        return self._hold is None or not self.keeps_hold() or self._hold.is_covered()

    async def covered(self) -> None:
        """Wait until something may begin under the hold. Raises as `in_time`."""
        if not self.is_covered():
            await self.in_time(self.is_covered, summary="3 hold: wait until it is renewed")

    async def answered(self, call: ActivityHandle[Any], *, at: datetime | None = None, summary: str) -> TaskEnd | None:
        """Wait until an opening call is answered, a stop is asked for, or `at` has come; what ended the task meanwhile.

        The wish to stop is not obeyed yet: what the call did is known only once it has ended. Under a hold the task's
        time counts too; before it there is none but the call's own.
        """
        if at is None and not self.keeps_hold():
            await workflow.wait_condition(lambda: call.done() or self._stop.requested)
            return None
        await workflow.wait_condition(lambda: True)  # a call that is cancelled before it has begun raises at once
        while not (call.done() or self._stop.requested or (at is not None and workflow.now() >= at)):
            latest = None
            if self._hold is not None and self.keeps_hold():
                latest = self.latest()
                try:
                    self.earlier.raise_if_ended()
                    self._hold.check()
                except TaskEnd as end:
                    return end
            if latest is not None and workflow.now() >= latest:
                return _timeout()
            await self._woken(call.done, at or latest, summary)
        return None

    async def _woken(self, happened: Callable[[], bool], at: datetime | None, summary: str) -> None:
        """Wait for what is to be looked at next."""
        hold = self._hold if self.keeps_hold() else None
        dues = [due for due in (at, hold.due() if hold else None) if due is not None]

        def has_update() -> bool:
            return (
                happened()
                or self._stop.requested
                or (hold is not None and (self.earlier.has_update() or hold.has_update()))
            )

        await self._alarm.until(has_update, min(dues, default=None), summary)


def _timeout() -> TaskFailed:
    return TaskFailed(FailureCode.TIMEOUT, "The task's time was over before its job had begun; it was given back.")
