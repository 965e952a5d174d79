"""Virtual time: what happens next. The same seed gives the same order, also of what happens at the same instant."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

BEGINNING: Final = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


class Happening:
    """Something that will happen, unless it is called off."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def call_off(self) -> None:
        self.act = None


class Agenda:
    """Everything that is to happen, by its instant (seconds since the epoch)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: list[tuple[float, float, Happening]] = []
        self.now = BEGINNING
        self.steps = 0

    def instant(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)

    def at(self, when: float, act: Callable[[], None]) -> Happening:
        """Do `act` at `when`, or now if that is past. What shares an instant comes in an order of the seed's."""
        happening = Happening(act)
        heapq.heappush(self._waiting, (max(when, self.now), self._rng.random(), happening))
        return happening

    def after(self, seconds: float, act: Callable[[], None]) -> Happening:
        return self.at(self.now + seconds, act)

    def step(self) -> bool:
        """Let the next thing happen; whether there was any."""
        while self._waiting:
            when, _, happening = heapq.heappop(self._waiting)
            if happening.act is not None:
                self.now = when
                self.steps += 1
                happening.act()
                return True
        return False
