"""Whether a callback is new for the workflow, and how many signals a task may get (decision 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from comfyui_temporal.contracts.scenes import Callback, scene_of_callback
from comfyui_temporal.contracts.ticks import digest_of

BURST: Final = 25
PER_SECOND: Final = 2.0
"""Signals that a task may get: a burst, then this many each second. The limit protects its history from a flood."""
KEPT_FOR_FINALS: Final = 5
"""The part of a burst that is reserved for callbacks of ended jobs."""


class News(NamedTuple):
    """What matters of a callback to the workflow. Two callbacks of a job with equal news need one signal."""

    percent: int | None
    digest: str
    """The same that the task's row compares: what makes no report a tick there needs no signal here."""


def news_of(callback: Callback) -> News:
    percent = None if callback.stage_progress is None else int(callback.stage_progress)
    return News(percent, digest_of(scene_of_callback(callback).update(callback)))


@dataclass
class Reported:
    """What was reported to the workflow about a job."""

    sequence: int
    """The newest that was signalled, or that had nothing new beyond it."""
    news: News
    is_final: bool

    def covers(self, callback: Callback) -> bool:
        """Whether the callback has nothing new for the workflow."""
        if callback.has_ended() and not self.is_final:
            return False
        return callback.sequence < self.sequence or news_of(callback) == self.news


class Pace:
    """A token bucket of signals, filled at `PER_SECOND` up to `BURST`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = float(BURST)
        self._at = clock()

    def ready_in(self, *, is_final: bool) -> float:
        """Seconds until the next signal may be sent; 0: now."""
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._at) * PER_SECOND)
        self._at = now
        needed = 1 if is_final else 1 + KEPT_FOR_FINALS
        return max(0.0, (needed - self._left) / PER_SECOND)

    def spend(self) -> None:
        self._left -= 1

    def refund(self) -> None:
        self._left += 1
