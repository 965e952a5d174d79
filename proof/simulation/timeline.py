"""Virtual time: what happens next. The same seed gives the same order, even of simultaneous events."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

START: Final = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


class Scheduled:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        self.act = None


class Timeline:
    """Everything that is going to happen, by its time (seconds since the epoch)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: list[tuple[float, float, Scheduled]] = []
        self.now = START
        self.steps = 0

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)

    def at(self, when: float, act: Callable[[], None]) -> Scheduled:
        """Do `act` at `when`, or now if that is past. The seed decides the order of what happens at the same time."""
        scheduled = Scheduled(act)
        heapq.heappush(self._waiting, (max(when, self.now), self._rng.random(), scheduled))
        return scheduled

    def after(self, seconds: float, act: Callable[[], None]) -> Scheduled:
        return self.at(self.now + seconds, act)

    def step(self) -> bool:
        """Let the next thing happen; whether there was any."""
        while self._waiting:
            when, _, scheduled = heapq.heappop(self._waiting)
            if scheduled.act is not None:
                self.now = when
                self.steps += 1
                scheduled.act()
                return True
        return False
