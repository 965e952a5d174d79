"""Ticks → task store, without the workflow (decision 4).

    take(callback)
      a newer tick of the task waits            → coalesced
      less than a second after the last one,
        and it says the same but for figures    → coalesced; written when the second is over, unless a newer one came
      the row knows what it says                → stored
      the task has ended                        → task_over
      another writer has the row                → as soon as it is free, within a second
      the row does not, or the store is away    → the long way: a signal

One statement is in flight in each process, with one tick of each task at most. So a flood for one task costs the others
nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

import structlog

from comfyui_temporal.contracts.scenes import Callback, scene_of_callback
from comfyui_temporal.contracts.ticks import Tick, TickVerdict
from runtime.trace_context import Context, current_context, in_context, traceparent
from store import StoreFailure, TaskStore, TickAnswer

log = structlog.get_logger(__name__)

MAX_BATCH: Final = 200
MAX_WAITING: Final = 10_000
"""Tasks whose tick waits here. Beyond it ticks take the long way."""
KNOWN_SOON: Final = 0.1
"""Seconds until a row that does not know a signalled report yet is tried again."""
MAX_TRIES: Final = 10
"""How often that, or a row that another writer has, is tried again before the report takes the long way."""


class Ticked(StrEnum):
    STORED = "stored"
    COALESCED = "coalesced"
    TASK_OVER = "task_over"
    LONG_WAY = "long_way"


class LongWay(Protocol):
    """Signals the workflow: `gateway.callback_relay.CallbackRelay`."""

    async def take(self, task_id: str, callback: Callback) -> object: ...

    def has_signalled_like(self, task_id: str, job_id: str, digest: str) -> bool | None:
        """Whether the last signal of the job said the same but for figures; None where there was none."""

    def forget(self, task_id: str, job_id: str) -> None:
        """The job's next report is signalled, whatever was signalled before."""


@dataclass
class Waiting:
    """A tick that is not decided. `answer` is None once its sender was answered."""

    tick: Tick
    callback: Callback
    answer: asyncio.Future[Ticked] | None
    tries: int = 0
    context: Context = field(default_factory=current_context)
    """The trace of the callback's own request."""

    def goes_on_from(self, other: Waiting) -> None:
        """Count its tries too if it said the same: a job that reports often would else never have its last one."""
        if other.tick.digest == self.tick.digest:
            self.tries = max(self.tries, other.tries)

    def resolve(self, ticked: Ticked) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(ticked)
        self.answer = None


class Pause(NamedTuple):
    """Until when a task's next tick waits."""

    ends_at: float
    digest: str
    """What the last one said beside its figures. A report that says something else is not paced."""
    is_known: bool
    """Whether the row knows that. If not, a report that says the same may be no tick."""


class TickWriter:
    """Stores ticks; one in each process."""

    def __init__(self, store: TaskStore, long_way: LongWay, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._long_way = long_way
        self._clock = clock
        self._waiting: dict[str, Waiting] = {}
        self._pauses: dict[str, Pause] = {}
        """Task → when its next tick may be written; forgotten once it is past."""
        self._arrived = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._handed_over: set[asyncio.Task[object]] = set()

    async def take(self, task_id: str, callback: Callback) -> Ticked:
        """Store the callback if it is a tick. Never raises; waits for the store, for a locked row a second."""
        if callback.has_ended():
            return Ticked.LONG_WAY
        tick = Tick.of(task_id, scene_of_callback(callback).update(callback), traceparent())
        if self._has_signalled_like(tick) is False:
            return Ticked.LONG_WAY
        older = self._waiting.get(task_id)
        if older is None and len(self._waiting) >= MAX_WAITING:
            return Ticked.LONG_WAY
        if older is not None:
            if older.tick.job_id != tick.job_id:
                return Ticked.LONG_WAY
            if older.tick.sequence >= tick.sequence:
                return Ticked.COALESCED
            older.resolve(Ticked.COALESCED)
        waiting = self._waiting[task_id] = Waiting(tick, callback, None)
        if older is not None:
            waiting.goes_on_from(older)
        if self._ready_in(waiting) == 0 or not self._is_tick(waiting):
            waiting.answer = asyncio.get_running_loop().create_future()
        self._arrived.set()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        return Ticked.COALESCED if waiting.answer is None else await waiting.answer

    async def close(self) -> None:
        """Write what waits, whatever the pace; what cannot be written is dropped: a poll replaces it."""
        self._pauses.clear()
        self._arrived.set()
        if self._writer is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(2.5):
                    await self._writer
            self._writer.cancel()
        await asyncio.gather(*self._handed_over, return_exceptions=True)

    async def _write_all(self) -> None:
        while self._waiting:
            now = self._clock()
            self._pauses = {task_id: pause for task_id, pause in self._pauses.items() if pause.ends_at > now}
            ready = [task_id for task_id, waiting in self._waiting.items() if self._ready_in(waiting) == 0][:MAX_BATCH]
            if ready:
                await self._write([self._waiting.pop(task_id) for task_id in ready])
            else:
                await self._pause(min(self._ready_in(waiting) for waiting in self._waiting.values()))

    def _ready_in(self, waiting: Waiting) -> float:
        """Seconds until it may be written."""
        pause = self._pauses.get(waiting.tick.task_id)
        if pause is None or not (pause.digest == waiting.tick.digest or self._is_signalled(waiting)):
            return 0.0
        return max(0.0, pause.ends_at - self._clock())

    def _is_tick(self, waiting: Waiting) -> bool:
        """Whether it surely says no more than what the workflow has. If not its sender waits for what is decided."""
        pause = self._pauses.get(waiting.tick.task_id)
        is_known = pause is not None and pause.is_known and pause.digest == waiting.tick.digest
        return is_known or self._is_signalled(waiting)

    def _is_signalled(self, waiting: Waiting) -> bool:
        """Whether a signal of this process says the same: the workflow's write of it is on its way to the row."""
        return bool(self._has_signalled_like(waiting.tick))

    def _has_signalled_like(self, tick: Tick) -> bool | None:
        return self._long_way.has_signalled_like(tick.task_id, tick.job_id, tick.digest)

    async def _pause(self, seconds: float) -> None:
        """Wait until the next tick is ready, or one arrives."""
        self._arrived.clear()
        # Not `asyncio.wait_for`: Python 3.11 loses a cancellation that comes in the same step as the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._arrived.wait()

    async def _write(self, batch: list[Waiting]) -> None:
        try:
            answers = await self._store.write_ticks([waiting.tick for waiting in batch])
        except StoreFailure as error:
            log.warning("ticks_not_stored", ticks=len(batch), reason=str(error))
            answers = {}
        except Exception:
            log.exception("ticks_broke", ticks=len(batch))
            answers = {}
        for waiting in batch:
            self._decide(waiting, answers.get(waiting.tick.task_id))

    def _decide(self, waiting: Waiting, answer: TickAnswer | None) -> None:
        if answer is None:
            self._hand_over(waiting)
        elif answer.verdict is TickVerdict.WRITTEN:
            self._pace(waiting.tick, answer.ready_in, is_known=True)
            waiting.resolve(Ticked.STORED)
        elif answer.verdict is TickVerdict.OUTDATED:
            waiting.resolve(Ticked.COALESCED)
        elif answer.verdict is TickVerdict.ENDED:
            waiting.resolve(Ticked.TASK_OVER)
        elif answer.verdict is TickVerdict.TOO_EARLY:
            waiting.resolve(Ticked.COALESCED)
            self._again(waiting, answer.ready_in, is_known=True)
        elif waiting.tries >= MAX_TRIES:
            if answer.verdict is TickVerdict.NOT_KNOWN:
                # The row decides: the workflow took something else since, or its write of this one is never made.
                self._long_way.forget(waiting.tick.task_id, waiting.tick.job_id)
            self._hand_over(waiting)
        elif answer.verdict is TickVerdict.LOCKED:
            waiting.tries += 1
            self._again(waiting, answer.ready_in, is_known=False)
        elif self._is_signalled(waiting):
            waiting.resolve(Ticked.COALESCED)
            waiting.tries += 1
            self._again(waiting, KNOWN_SOON, is_known=False)
        else:
            self._hand_over(waiting)

    def _again(self, waiting: Waiting, seconds: float, *, is_known: bool) -> None:
        """Keep it for later, unless a newer one of its job came.

        A sender that was answered need not wait: a poll replaces it.
        """
        came = self._waiting.get(waiting.tick.task_id)
        if came is not None and came.tick.job_id != waiting.tick.job_id:
            self._hand_over(waiting)  # sequences of two jobs have no order: neither replaces the other
            return
        is_older = came is not None and came.tick.sequence < waiting.tick.sequence
        newest, other = (waiting, came) if came is None or is_older else (came, waiting)
        if other is not None:
            newest.goes_on_from(other)
            other.resolve(Ticked.COALESCED)
        self._waiting[waiting.tick.task_id] = newest
        self._pace(waiting.tick, seconds, is_known=is_known)

    def _pace(self, tick: Tick, seconds: float, *, is_known: bool) -> None:
        self._pauses[tick.task_id] = Pause(self._clock() + seconds, tick.digest, is_known)

    def _hand_over(self, waiting: Waiting) -> None:
        if waiting.answer is not None:
            waiting.resolve(Ticked.LONG_WAY)
            return
        signalling = asyncio.create_task(self._signal(waiting))
        self._handed_over.add(signalling)
        signalling.add_done_callback(self._handed_over.discard)

    async def _signal(self, waiting: Waiting) -> object:
        with in_context(waiting.context):
            return await self._long_way.take(waiting.tick.task_id, waiting.callback)
