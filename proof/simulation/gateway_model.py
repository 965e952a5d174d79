"""The gateway as a second writer (decision 4): ticks go to the store, everything else is a signal.

Its statement may be late. It may be killed before the statement, or after it and before it answers: then the sender
repeats the callback. A tick that it answered and keeps until its second comes is lost with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from comfyui_temporal.contracts.scenes import Callback, scene_of_callback
from comfyui_temporal.contracts.ticks import Tick, TickVerdict
from proof.simulation.fault_schedule import FaultSchedule, Party
from proof.simulation.store_model import StoreModel
from proof.simulation.timeline import Timeline

SECOND: Final = 1.0
REPEATED_AFTER: Final = 3.0
"""Seconds until the sender repeats a callback whose gateway was killed."""
KILLED: Final = 0.05
KILLED_BEFORE: Final = 0.3
ANSWERED: Final = 0.5
"""How likely a gateway of a seed with losses is killed before its statement, and has answered the tick by then."""
LOSING: Final = 0.25
"""The share of the seeds with troubles that have such losses."""
MAX_TRIES: Final = 8


class GatewayModel:
    """Takes callbacks; `signal` takes the long way."""

    def __init__(
        self,
        timeline: Timeline,
        rng: random.Random,
        losses: random.Random | None,
        faults: FaultSchedule,
        store: StoreModel,
        *,
        is_on: bool,
    ) -> None:
        """`rng` is its own: without the short way a seed's schedule is what it was before there was one.

        `losses` is for what was added later.
        """
        self._timeline = timeline
        self._rng = rng
        self._losses = losses or random.Random(0)  # noqa: S311
        self._is_losing = losses is not None and losses.random() < LOSING
        self._faults = faults
        self._store = store
        self.is_on = is_on
        self.stored = 0
        self.lost = 0

    def take(self, callback: Callback, signal: Callable[[], None], tries: int = 0) -> None:
        """One delivery of a callback."""
        if not self.is_on or callback.has_ended():
            signal()
            return
        tick = Tick.of(str(callback.task_id), scene_of_callback(callback).update(callback))
        again = lambda seconds: self._after(seconds, lambda: self.take(callback, signal, tries + 1))  # noqa: E731
        if self._faults.is_away(Party.STORE):
            signal()
            return
        self._after(self._rng.choice((0.0, 0.0, 0.01, 0.3)), lambda: self._write(tick, signal, again, tries))

    def _write(self, tick: Tick, signal: Callable[[], None], again: Callable[[float], None], tries: int) -> None:
        if self._is_killed_before():
            is_answered = self._store.verdict_of(tick) in (TickVerdict.WRITTEN, TickVerdict.TOO_EARLY)
            if is_answered and self._losses.random() < ANSWERED:
                self.lost += 1
            else:
                again(REPEATED_AFTER)
            return
        verdict = self._store.tick(tick)
        self.stored += verdict is TickVerdict.WRITTEN
        if not self._faults.is_quiet and self._rng.random() < KILLED:
            again(REPEATED_AFTER)
        elif verdict is TickVerdict.NOT_KNOWN:
            signal()
        elif verdict is TickVerdict.TOO_EARLY and tries < MAX_TRIES:
            again(SECOND)

    def _is_killed_before(self) -> bool:
        return self._is_losing and not self._faults.is_quiet and self._losses.random() < KILLED_BEFORE

    def _after(self, seconds: float, act: Callable[[], Any]) -> None:
        self._timeline.after(seconds, act)
