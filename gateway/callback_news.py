"""What a signal is worth, and how many a task may get (decision 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from comfyui_temporal.contracts.scenes import Callback, scene_of_callback

BURST: Final = 25
PER_SECOND: Final = 2.0
"""Signals that a task may get: a burst, then this many a second, so that a flood cannot blow up its history."""
KEPT_FOR_FINALS: Final = 5
"""The part of a burst that only callbacks of ended jobs may use."""


def news_of(callback: Callback) -> tuple[Any, ...]:
    """Two callbacks of a job with the same news tell the workflow the same."""
    percent = None if callback.stage_progress is None else int(callback.stage_progress)
    return (percent, *(getattr(callback, name) for name in scene_of_callback(callback).signalled_fields))


@dataclass
class Told:
    """What the workflow was told of a job."""

    sequence: int
    """The newest that was signalled, or that held no news beyond it."""
    news: tuple[Any, ...]
    is_final: bool

    def covers(self, callback: Callback) -> bool:
        """Whether the workflow would learn nothing from it."""
        if callback.has_ended() and not self.is_final:
            return False
        return callback.sequence < self.sequence or news_of(callback) == self.news


class Pace:
    """A bucket of signals, filled at `PER_SECOND` up to `BURST`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = float(BURST)
        self._at = clock()

    def ready_in(self, *, is_final: bool) -> float:
        """Seconds until the next signal may go; 0: now."""
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._at) * PER_SECOND)
        self._at = now
        needed = 1 if is_final else 1 + KEPT_FOR_FINALS
        return max(0.0, (needed - self._left) / PER_SECOND)

    def spend(self) -> None:
        self._left -= 1

    def refund(self) -> None:
        self._left += 1
