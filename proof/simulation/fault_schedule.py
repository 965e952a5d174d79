"""What goes wrong, and until when: drawn once for a seed, then consulted at every call, task and callback."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from proof.simulation.timeline import Timeline

GIVES_UP_AFTER: Final = 6.5
"""Seconds after which a caller no longer waits for an answer."""
LATENCIES: Final = (0.0, 0.0, 0.01, 0.05, 0.3, 1.0)
LATE: Final = (7.0, 20.0, 90.0, 400.0, 1_000.0)


class Party(StrEnum):
    CREDITS = "credits"
    COMFYUI = "comfyui"
    STORE = "store"
    OBJECTS = "objects"


class BadAnswer(StrEnum):
    """How an attempt fails although it was answered."""

    UNAVAILABLE = "unavailable"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Attempt:
    """One attempt of a call: when the service acts (None: never), when the caller has an answer, and which."""

    acts_after: float | None
    answered_after: float
    """Seconds until the caller has the answer, or gives up."""
    is_lost: bool = False
    """The caller gets no answer, whether or not the service acted."""
    bad_answer: BadAnswer | None = None


@dataclass
class FaultSchedule:
    """Faults by their probability; none after `quiet_from` (seconds since the epoch)."""

    timeline: Timeline
    rng: random.Random
    quiet_from: float
    call_faults: float = 0.0
    task_losses: float = 0.0
    callback_losses: float = 0.0
    callback_copies: float = 0.0
    slow_tasks: float = 0.0
    outages: dict[Party, list[tuple[float, float]]] = field(default_factory=dict)
    outage_with: tuple[str, float] | None = None
    """A call, and for how many seconds its party is away from the moment it is first sent."""
    route_outage_with: tuple[str, float] | None = None
    """The same of this call's route alone."""
    route_away_until: float | None = None

    @property
    def is_quiet(self) -> bool:
        return self.timeline.now >= self.quiet_from

    def is_away(self, party: Party) -> bool:
        """Whether the party does not answer now."""
        outages = self.outages.get(party, ())
        return not self.is_quiet and any(begin <= self.timeline.now < end for begin, end in outages)

    def attempt(self, party: Party, name: str) -> Attempt:
        """The fate of a call that is sent now."""
        if self.outage_with is not None and self.outage_with[0] == name:
            end = self.timeline.now + self.outage_with[1]
            self.outages[party] = [(self.timeline.now, end)]
            self.quiet_from, self.outage_with = max(self.quiet_from, end), None
        rng, latency = self.rng, self.rng.choice(LATENCIES)
        if self._is_route_away(name):
            return self._during_outage(latency)
        if not self.is_quiet:
            if self.is_away(party):
                return self._during_outage(latency)
            if rng.random() < self.call_faults:
                return self._faulty(latency)
        return Attempt(acts_after=latency, answered_after=latency + rng.choice(LATENCIES))

    def _is_route_away(self, name: str) -> bool:
        if self.route_outage_with is None or self.route_outage_with[0] != name:
            return False
        if self.route_away_until is None:
            self.route_away_until = self.timeline.now + self.route_outage_with[1]
        return self.timeline.now < self.route_away_until

    def _during_outage(self, latency: float) -> Attempt:
        kind = self.rng.randrange(4)
        if kind == 0:  # the request arrives, the answer does not
            return Attempt(acts_after=latency, answered_after=GIVES_UP_AFTER, is_lost=True)
        if kind == 1:
            return Attempt(acts_after=None, answered_after=GIVES_UP_AFTER, is_lost=True)
        return Attempt(acts_after=None, answered_after=latency, bad_answer=BadAnswer.UNAVAILABLE)

    def _faulty(self, latency: float) -> Attempt:
        rng, kind = self.rng, self.rng.randrange(6)
        if kind == 0:
            return Attempt(acts_after=latency, answered_after=GIVES_UP_AFTER, is_lost=True)
        if kind == 1:
            return Attempt(acts_after=None, answered_after=GIVES_UP_AFTER, is_lost=True)
        if kind == 2:
            return Attempt(acts_after=rng.choice(LATE), answered_after=GIVES_UP_AFTER, is_lost=True)
        if kind == 3:
            return Attempt(acts_after=None, answered_after=latency, bad_answer=BadAnswer.UNAVAILABLE)
        if kind == 4:
            return Attempt(acts_after=latency, answered_after=latency + 0.1, bad_answer=BadAnswer.UNREADABLE)
        return Attempt(acts_after=rng.choice((0.3, 3.0, 5.5)), answered_after=6.0)

    def loses_task(self) -> bool:
        """Whether a workflow task's completion never reaches the server."""
        return not self.is_quiet and self.rng.random() < self.task_losses

    def task_delay(self) -> float:
        """Seconds until a worker takes a workflow task: what arrives meanwhile is part of it."""
        if not self.is_quiet and self.rng.random() < self.slow_tasks:
            return self.rng.choice((0.3, 1.0, 4.0, 15.0, 100.0))
        return self.rng.choice((0.0, 0.0, 0.005))

    def callback_delays(self) -> list[float]:
        """Seconds after which each copy of a callback arrives; none: it is lost."""
        rng = self.rng
        if self.is_quiet:
            return [0.0]
        if rng.random() < self.callback_losses:
            return []
        if rng.random() < self.callback_copies:
            return [rng.choice((0.0, 0.0, 0.5, 5.0, 30.0)) for _ in range(rng.choice((1, 2, 3)))]
        return [0.0]
