"""How long a run takes in all, revised upwards while it is on its server.

A run is never called late for being slower than expected. Once most of the expected time is over, the expectation
grows: by how fast the run comes forward, or, where that cannot be seen, by as much again as has passed.
"""

from __future__ import annotations

from typing import Final

LATE_SHARE: Final = 0.8
"""Once this share of the expected time is over, a run without visible progress is expected to take longer."""
MARGIN: Final = 1.1
"""Above the projection. So a run is revised a few times, not each second."""
SEEN_PERCENTS: Final = 5
"""A projection needs so many percents after the first that was seen: loading a model is no measure of the rest."""
UNSEEN_RUNS: Final = 10.0
UNSEEN_SECONDS: Final = 900.0
"""A run whose messages do not arrive is not expected to take longer than both of these allow."""


class RunPace:
    """One run. `expected_seconds`: what was expected before it began."""

    def __init__(self, expected_seconds: float) -> None:
        self.expected_seconds = expected_seconds
        self._most_unseen = max(UNSEEN_SECONDS, UNSEEN_RUNS * expected_seconds)
        self._first: tuple[float, int] | None = None

    def revised(self, ran_seconds: float, percent: int, *, is_heard: bool) -> float | None:
        """The seconds that the run is expected to take in all, or None if nothing changes."""
        if self._first is None and percent > 0:
            self._first = (ran_seconds, percent)
        expected = self._expected(ran_seconds, percent, is_heard=is_heard)
        if expected <= self.expected_seconds:
            return None
        self.expected_seconds = expected
        return expected

    def _expected(self, ran_seconds: float, percent: int, *, is_heard: bool) -> float:
        projected = self._projected(ran_seconds, percent)
        if projected:
            return projected * MARGIN if projected > self.expected_seconds else self.expected_seconds
        if ran_seconds < LATE_SHARE * self.expected_seconds:
            return self.expected_seconds
        longer = 2 * ran_seconds
        return longer if is_heard else min(longer, max(self._most_unseen, self.expected_seconds))

    def _projected(self, ran_seconds: float, percent: int) -> float:
        """By the speed since the first percent that was seen; 0 if too little was seen."""
        if self._first is None or percent - self._first[1] < SEEN_PERCENTS:
            return 0.0
        began, first = self._first
        return ran_seconds + (100 - percent) * (ran_seconds - began) / (percent - first)
