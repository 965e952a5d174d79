"""Callbacks → signals: one in flight per task, coalesced and rate limited (decision 4).

    take(callback)
      the workflow knows the same, or something newer   → coalesced
      a newer one of the job waits in the task's line   → coalesced
      else it joins the line and replaces an older one; the line sends one signal after the other
        within the rate limit  → the sender waits for its signal's outcome: unavailable means send again
        beyond the rate limit  → coalesced immediately; the line signals the newest as soon as the limit allows

The sender of a job's end always waits for its own signal, and a part of the burst is reserved for it.

Departures from "one callback, one signal"
1. A callback that only changes `queue_position`, `next_eta`, `gpu_hours_used` or a fraction of a percent is not
   signalled: the poll of a silent job brings those.
2. Beyond the rate limit the answer comes before the signal. If it waited, a sender that delivers in order would lag
   behind its own job. A crash can lose the newest tick of the last half second, and polling covers missing callbacks
   (contract §2).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Protocol

import structlog

from comfyui_temporal.contracts.scenes import Callback
from gateway.callback_news import News, Pace, Reported, news_of
from runtime.trace_context import Context, current_context, in_context

log = structlog.get_logger(__name__)

TAKE_SECONDS: Final = 2.5
"""How long a sender waits for its signal before it must send again."""
RETRY_SECONDS: Final = 1.0
MAX_RETRIES: Final = 60
"""Pause between tries of a tick whose sender was answered already, while Temporal is away."""
MAX_JOBS: Final = 16
"""Jobs that are remembered for one task; a task has four attempts."""
MAX_LINES: Final = 10_000
"""Tasks that are remembered. A forgotten one costs one superfluous signal."""


class Relayed(StrEnum):
    SIGNALLED = "signalled"
    COALESCED = "coalesced"
    TASK_OVER = "task_over"
    TASK_UNKNOWN = "task_unknown"
    UNAVAILABLE = "unavailable"


class Signals(Protocol):
    """Sends signals: `gateway.task_runs.TaskRuns`."""

    async def signal(self, task_id: str, callback: Callback) -> Relayed: ...


@dataclass
class Waiting:
    """A callback in line. `answer` is None if its sender has been answered already."""

    callback: Callback
    answer: asyncio.Future[Relayed] | None
    retries: int = 0
    context: Context = field(default_factory=current_context)
    """The trace of the callback's own request, which its signal continues."""

    @property
    def place(self) -> tuple[str, bool]:
        """Its key in the line: at most one tick and one end of a job wait."""
        return (self.callback.job_id, self.callback.has_ended())

    def resolve(self, relayed: Relayed) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(relayed)


class TaskLine:
    """The callbacks of one task on their way to its workflow."""

    def __init__(self, task_id: str, signals: Signals, clock: Callable[[], float]) -> None:
        self._task_id = task_id
        self._signals = signals
        self._pace = Pace(clock)
        self._reported: dict[str, Reported] = {}
        self._waiting: dict[tuple[str, bool], Waiting] = {}
        self._arrived = asyncio.Event()
        self._in_flight: str | None = None
        self._signalling: News | None = None
        self._is_failing = False
        self.sender: asyncio.Task[None] | None = None

    async def take(self, callback: Callback) -> Relayed:
        if not self._is_undecided(callback.job_id) and self._is_covered(callback):
            return Relayed.COALESCED
        is_awaited = callback.has_ended() or self._is_failing or self._pace.ready_in(is_final=False) == 0
        joining = Waiting(callback, asyncio.get_running_loop().create_future() if is_awaited else None)
        older = self._waiting.get(joining.place)
        if older is not None and older.callback.sequence > callback.sequence:
            return Relayed.COALESCED
        if older is None and len(self._waiting) >= 2 * MAX_JOBS:
            return Relayed.UNAVAILABLE
        if older is not None:
            older.resolve(Relayed.COALESCED)
        self._waiting[joining.place] = joining
        self._arrived.set()
        if self.sender is None or self.sender.done():
            self.sender = asyncio.create_task(self._send())
        return Relayed.COALESCED if joining.answer is None else await self._outcome_of(joining, joining.answer)

    def has_signalled_like(self, job_id: str, digest: str) -> bool | None:
        """Whether the newest signal of the job says the same but for figures; None without one."""
        reported = self._reported.get(job_id)
        news = self._signalling if self._in_flight == job_id else reported.news if reported else None
        return None if news is None else news.digest == digest

    def forget(self, job_id: str) -> None:
        """The next report of the job is signalled, whatever was signalled before."""
        self._reported.pop(job_id, None)

    async def _outcome_of(self, joining: Waiting, answer: asyncio.Future[Relayed]) -> Relayed:
        await asyncio.wait({answer}, timeout=TAKE_SECONDS)
        if answer.done():
            return answer.result()
        if self._waiting.get(joining.place) is joining:
            del self._waiting[joining.place]
        return Relayed.UNAVAILABLE

    async def _send(self) -> None:
        while self._waiting:
            place = min(self._waiting, key=lambda place: not place[1])
            if delay := self._pace.ready_in(is_final=place[1]):
                await self._pause(delay)
                continue
            first = self._waiting.pop(place)
            if self._is_covered(first.callback):
                first.resolve(Relayed.COALESCED)
            else:
                await self._signal(first)

    async def _signal(self, first: Waiting) -> None:
        self._pace.spend()
        self._in_flight, self._signalling = first.callback.job_id, news_of(first.callback)
        with in_context(first.context):
            relayed = await self._signalled(first.callback)
        self._in_flight = self._signalling = None
        self._is_failing = relayed is Relayed.UNAVAILABLE
        if relayed is Relayed.SIGNALLED:
            self._remember(first.callback)
        first.resolve(relayed)
        if self._is_failing:
            self._pace.refund()
            await self._after_failure(first)

    async def _signalled(self, callback: Callback) -> Relayed:
        try:
            return await self._signals.signal(self._task_id, callback)
        except Exception:
            log.exception("callback_signal_broke", task_id=self._task_id)
            return Relayed.UNAVAILABLE

    async def _after_failure(self, failed: Waiting) -> None:
        """Senders that still wait repeat by themselves. A tick whose sender was answered must be repeated here."""
        for waiting in list(self._waiting.values()):
            if waiting.answer is not None:
                waiting.resolve(Relayed.UNAVAILABLE)
                del self._waiting[waiting.place]
        if failed.answer is not None:
            return
        if failed.retries >= MAX_RETRIES:
            log.warning("callback_given_up", task_id=self._task_id, job_id=failed.callback.job_id)
            return
        failed.retries += 1
        self._waiting.setdefault(failed.place, failed)
        await self._pause(RETRY_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Wait, but end early at the next arrival: it may be an end, which need not wait."""
        self._arrived.clear()
        # Not `asyncio.wait_for`: Python 3.11 loses a cancellation that comes in the same step as the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._arrived.wait()

    def _is_undecided(self, job: str) -> bool:
        """Whether a signal of the job is in flight, or an end waits: then the last reported state is not known yet."""
        return self._in_flight == job or (job, True) in self._waiting

    def _is_covered(self, callback: Callback) -> bool:
        reported = self._reported.get(callback.job_id)
        if reported is None or not reported.covers(callback):
            return False
        reported.sequence = max(reported.sequence, callback.sequence)
        return True

    def _remember(self, callback: Callback) -> None:
        reported = Reported(callback.sequence, news_of(callback), callback.has_ended())
        before = self._reported.pop(callback.job_id, None)
        if before is not None and before.sequence > reported.sequence:
            reported = replace(before, is_final=before.is_final or reported.is_final)
        self._reported[callback.job_id] = reported
        if len(self._reported) > MAX_JOBS:
            del self._reported[next(iter(self._reported))]


class CallbackRelay:
    """Relays callbacks to workflows. Each task has its own line, so that no task waits for another."""

    def __init__(self, signals: Signals, clock: Callable[[], float] = time.monotonic) -> None:
        self._signals = signals
        self._clock = clock
        self._lines: OrderedDict[str, TaskLine] = OrderedDict()

    async def take(self, task_id: str, callback: Callback) -> Relayed:
        """Relay the callback to its task's workflow. Answers within 2.5 s and never raises."""
        line = self._lines.get(task_id)
        if line is None:
            line = self._lines[task_id] = TaskLine(task_id, self._signals, self._clock)
        self._lines.move_to_end(task_id)
        if len(self._lines) > MAX_LINES:
            self._lines.popitem(last=False)
        return await line.take(callback)

    def has_signalled_like(self, task_id: str, job_id: str, digest: str) -> bool | None:
        """Whether the newest signal of the job says the same but for figures; None where this process sent none."""
        line = self._lines.get(task_id)
        return None if line is None else line.has_signalled_like(job_id, digest)

    def forget(self, task_id: str, job_id: str) -> None:
        """What was signalled of the job is not what its task's row has: its next report is signalled."""
        line = self._lines.get(task_id)
        if line is not None:
            line.forget(job_id)

    async def close(self) -> None:
        """Give waiting ticks a moment to be sent, then stop."""
        senders = {line.sender for line in self._lines.values() if line.sender is not None and not line.sender.done()}
        if not senders:
            return
        _, unfinished = await asyncio.wait(senders, timeout=TAKE_SECONDS)
        for sender in unfinished:
            sender.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
