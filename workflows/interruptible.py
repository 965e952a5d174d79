"""The waits that a cancel, the task's time and the end of its hold interrupt.

While a job runs, `Following` is the loop that checks all three. Everywhere else it is `InterruptibleWaits`: before the
first job, and between two attempts. Every other wait is in `UNINTERRUPTIBLE` with its reason; a test compares that
table with every `await` in this folder.
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
    """The hold of a task, as it is kept alive while the run waits for something else."""

    def is_needed(self) -> bool:
        """Whether there is, or was, a hold to keep."""

    def is_covered(self) -> bool:
        """Whether work may begin under it: it has life left, or nothing has to be paid."""

    def has_update(self) -> bool:
        """Whether `check` has something to do now."""

    def due(self) -> datetime | None:
        """When `check` has something to do next, or None."""

    def check(self) -> None:
        """Renew it if it is due. Raises TaskFailed `credit_exhausted`."""


def _no_hold() -> KeptHold | None:
    return None


def _no_limit() -> datetime | None:
    return None


class InterruptibleWaits:
    """The waits of one run before its delivery."""

    def __init__(
        self,
        stop: Stop,
        alarm: Alarm,
        *,
        hold: Callable[[], KeptHold | None] = _no_hold,
        latest: Callable[[], datetime | None] = _no_limit,
    ) -> None:
        """`hold`: the hold to keep alive. `latest`: when the task's time is over, None before its first start.

        Both are read at each wait: the hold itself waits here.
        """
        self._stop = stop
        self._alarm = alarm
        self._hold = hold
        self.latest = latest
        self.earlier = EarlierLives()  # the task may have ended in an earlier life

    def keeps_hold(self) -> bool:
        """Whether there is a hold to keep, in a run that does so."""
        return self._kept() is not None

    def _kept(self) -> KeptHold | None:
        hold = self._hold()
        is_kept = hold is not None and hold.is_needed() and workflow.patched("hold-kept-while-waiting")
        return hold if is_kept else None

    def raise_if_interrupted(self) -> None:
        """Raise TaskStopped after a cancel, RowEnded where the task has ended, TaskFailed where its credits ran out."""
        self._stop.raise_if_requested()
        self.earlier.raise_if_ended()
        hold = self._kept()
        if hold is not None:
            hold.check()

    def raise_if_over(self) -> None:
        """Raise TaskFailed `timeout` when the task's time is over."""
        latest = self.latest()
        if latest is not None and workflow.now() >= latest:
            raise _timeout()

    async def until(self, happened: Callable[[], bool], *, at: datetime | None = None, summary: str) -> bool:
        """Wait until `happened()`, or until `at`. Returns whether it happened. Raises as `raise_if_interrupted`."""
        while not happened():
            self.raise_if_interrupted()
            if at is not None and workflow.now() >= at:
                return False
            await self._woken(happened, at, summary)
        return True

    async def in_time(self, happened: Callable[[], bool], *, summary: str) -> None:
        """Wait until `happened()`. Raises TaskFailed `timeout` when the time is over, and as `raise_if_interrupted`."""
        while not happened():
            latest = self.latest()
            if not await self.until(self._or_less_time(happened, latest), at=latest, summary=summary):
                raise _timeout()

    def _or_less_time(self, happened: Callable[[], bool], latest: datetime | None) -> Callable[[], bool]:
        """Also when the task's time ends earlier than `latest`: its job has begun while a wait was on."""

        def has_less_time() -> bool:
            now = self.latest()
            return now is not None and latest is not None and now < latest

        return lambda: happened() or has_less_time()

    def is_covered(self) -> bool:
        """Whether work may begin under the hold. True in a run that keeps none."""
        hold = self._kept()
        return hold is None or hold.is_covered()

    async def covered(self) -> None:
        """Wait until work may begin under the hold. Raises as `in_time`."""
        if not self.is_covered():
            await self.in_time(self.is_covered, summary="3 wait: hold (until it is renewed)")

    async def answered(self, call: ActivityHandle[Any], *, at: datetime | None = None, summary: str) -> TaskEnd | None:
        """Wait until a setup call is answered, a cancel arrives, or `at`. Returns what ended the task meanwhile.

        A cancel is not raised here: what the call did is known only once it has ended. Under a hold the task's time
        counts too; before it only the call's own limit does.
        """
        if at is None and not self.keeps_hold():
            await workflow.wait_condition(lambda: call.done() or self._stop.requested)
            return None
        await workflow.wait_condition(lambda: True)  # a call that is cancelled before it has begun raises at once
        while not (call.done() or self._stop.requested or (at is not None and workflow.now() >= at)):
            latest, hold = None, self._kept()
            if hold is not None:
                latest = self.latest()
                try:
                    self.earlier.raise_if_ended()
                    hold.check()
                except TaskEnd as end:
                    return end
            if latest is not None and workflow.now() >= latest:
                return _timeout()
            await self._woken(self._or_less_time(call.done, latest), at or latest, summary)
        return None

    async def _woken(self, happened: Callable[[], bool], at: datetime | None, summary: str) -> None:
        """Wait until there is something to check."""
        hold = self._kept()
        dues = [due for due in (at, hold.due() if hold else None) if due is not None]

        def is_interrupted() -> bool:
            return self._stop.requested or (hold is not None and (self.earlier.has_update() or hold.has_update()))

        await self._alarm.until(lambda: happened() or is_interrupted(), min(dues, default=None), summary)


def _timeout() -> TaskFailed:
    return TaskFailed(FailureCode.TIMEOUT, "The task's time was over before its job had begun; it was given back.")
