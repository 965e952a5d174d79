"""The task store, by the letter of contract §6: claims, facts that become numbered events, exception records."""

from __future__ import annotations

import random
from collections.abc import Callable

from contracts.policy import Policy
from contracts.task_store import ClaimOutcome, Fact, TaskClaim, TaskException, TaskState, TaskWrite
from contracts.tasks import EventType, TaskStatus


class StoreRefused(Exception):
    """What no repeat can mend: another run holds the id."""


class StoreModel:
    """One task's row, events and exception records; `events` in the order of their `seq`."""

    def __init__(self, policy: Policy, held_by: str | None = None) -> None:
        self._policy = policy
        self.held_by = held_by
        self.state: TaskState | None = None
        self.events: list[Fact] = []
        self.exceptions: dict[str, TaskException] = {}
        self._keys: set[str] = set()
        self._sequences: dict[str, int] = {}
        self._writes: list[TaskWrite] = []
        self.on_event: Callable[[Fact], None] = lambda _fact: None

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and self.events[-1].is_end

    def claim(self, claim: TaskClaim) -> ClaimOutcome:
        if self.held_by is None:
            self.held_by = claim.first_execution_run_id
            self.state = TaskState(version=0, status=TaskStatus.QUEUED)
            self._append(
                Fact(key="accepted", event=EventType.ACCEPTED, ts=claim.at, attempt=1, status=TaskStatus.QUEUED)
            )
        return ClaimOutcome(claimed=self.held_by == claim.first_execution_run_id, policy=self._policy)

    def write(self, write: TaskWrite) -> None:
        """Raises StoreRefused."""
        if write.first_execution_run_id != self.held_by or self.state is None:
            raise StoreRefused("another run holds the id")
        self._writes.append(write)
        had_ended = self.has_ended
        for fact in write.facts:
            if not self.has_ended and fact.key not in self._keys and not self._is_outdated(fact):
                self._append(fact)
        if not had_ended and (write.state.version > self.state.version or self.has_ended):
            self.state = write.state
        for exception in write.exceptions:
            self.exceptions.setdefault(exception.key, exception)

    def write_again(self, rng: random.Random) -> None:
        """A second writer: an earlier write comes once more, from a worker that was cut off."""
        if self._writes:
            self.write(rng.choice(self._writes))

    def _is_outdated(self, fact: Fact) -> bool:
        if fact.job_id is None or fact.sequence is None:
            return False
        return fact.sequence < self._sequences.get(fact.job_id, fact.sequence)

    def _append(self, fact: Fact) -> None:
        self._keys.add(fact.key)
        if fact.job_id is not None and fact.sequence is not None:
            self._sequences[fact.job_id] = fact.sequence
        last = self.events[-1] if self.events else fact
        if (fact.attempt, fact.stage) == (last.attempt, last.stage) and (fact.progress or 0.0) < (last.progress or 0.0):
            fact = fact.model_copy(update={"progress": last.progress})
        self.events.append(fact)
        self.on_event(fact)
