"""Which facts become events, and under which number (contract §6): a pure function, so that it can be proved."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from contracts.task_store import Fact


@dataclass
class WrittenSoFar:
    """What is known of a task's earlier facts, read under the lock on its row."""

    last_seq: int
    has_ended: bool
    job_sequences: dict[str, int] = field(default_factory=dict)
    """Job → the newest sequence written."""

    def take(self, facts: Iterable[Fact], known_keys: Collection[str]) -> list[tuple[int, Fact]]:
        """The facts to write with their `seq`, in order; what is known, outdated or after the end is left out."""
        known = set(known_keys)
        taken: list[tuple[int, Fact]] = []
        for fact in facts:
            if self.has_ended or fact.key in known or self._is_outdated(fact):
                continue
            known.add(fact.key)
            self.last_seq += 1
            if fact.job_id is not None and fact.sequence is not None:
                self.job_sequences[fact.job_id] = fact.sequence
            self.has_ended = fact.is_end
            taken.append((self.last_seq, fact))
        return taken

    def _is_outdated(self, fact: Fact) -> bool:
        if fact.job_id is None or fact.sequence is None:
            return False
        return fact.sequence < self.job_sequences.get(fact.job_id, fact.sequence)
