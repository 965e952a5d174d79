"""The service's own time, which an admin can advance, and work time, which can run faster.

Two readings of one clock (contract seconds in both):

- `now()`: wall time plus what an admin has advanced. Hold expiry, webhook retries and key retention use it.
- `work()`: how much work time has passed; it runs `speed` times as fast as `now()`. Jobs and trainings use it.

Advancing moves both, so a test moves simulated services together with a time-skipping workflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from proof.simulators.state_file import StateFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS clock (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    advanced_seconds REAL NOT NULL,
    anchor_timestamp REAL NOT NULL,
    anchor_work REAL NOT NULL,
    speed REAL NOT NULL
);
"""


class Clock:
    """Kept in the state file: a restart finds jobs as far along as if the process had never stopped."""

    def __init__(self, state: StateFile, *, speed: float) -> None:
        self._state = state
        self._listeners: list[Callable[[], None]] = []
        state.lay_out(_SCHEMA)
        row = state.row("SELECT * FROM clock")
        self._advanced = row["advanced_seconds"] if row else 0.0
        self._anchor = row["anchor_timestamp"] if row else time.time()
        self._anchor_work = row["anchor_work"] if row else 0.0
        self._speed = row["speed"] if row else speed
        self.set_speed(speed)

    @property
    def speed(self) -> float:
        """Work seconds in one second."""
        return self._speed

    def timestamp(self) -> float:
        """`now()` in seconds since the epoch."""
        return time.time() + self._advanced

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.timestamp(), UTC)

    def work(self) -> float:
        """Work seconds so far."""
        return self._anchor_work + (self.timestamp() - self._anchor) * self._speed

    def timestamp_of(self, work: float) -> float:
        """When, at the present speed, work time reaches `work`, in seconds since the epoch."""
        return self._anchor + (work - self._anchor_work) / self._speed

    def datetime_of(self, work: float) -> datetime:
        return datetime.fromtimestamp(self.timestamp_of(work), UTC)

    def advance(self, seconds: float) -> None:
        """Move both readings on: `now()` by `seconds`, `work()` by `speed` times as much."""
        if seconds < 0:
            raise ValueError("a clock is never set back")
        self._advanced += seconds
        self._changed()

    def set_speed(self, speed: float) -> None:
        """Work already done stays done; only what is left goes faster or slower."""
        if speed <= 0:
            raise ValueError("speed must be above 0")
        work, timestamp = self.work(), self.timestamp()
        self._anchor, self._anchor_work, self._speed = timestamp, work, speed
        self._changed()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the clock was advanced, so that sleepers check it again."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        self._state.run(
            "INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?, ?)",
            self._advanced,
            self._anchor,
            self._anchor_work,
            self._speed,
        )
        for listener in self._listeners:
            listener()
