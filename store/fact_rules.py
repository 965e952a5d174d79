"""Which facts become events, and with which number (contract §6): a pure function, so that it can be proved."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TakenReport
from comfyui_temporal.contracts.tasks import TaskStatus


@dataclass
class WrittenSoFar:
    """What is known of a task's earlier facts, read while the row is locked."""

    last_seq: int
    has_ended: bool
    job_sequences: dict[str, int] = field(default_factory=dict)
    """Job → the newest sequence written."""
    attempt: int = 1
    stage: str | None = None
    progress: float = 0.0
    """The progress in the row for the current attempt and stage, in percent."""
    published: dict[tuple[int, str | None], float] = field(default_factory=dict)
    """Attempt and stage → the highest published progress. Set where a stage may be gone through again."""

    def take(self, facts: Iterable[Fact], known_keys: Collection[str]) -> list[tuple[int, Fact]]:
        """The facts to write with their `seq`, in order; known, outdated and late facts are left out."""
        known = set(known_keys)
        taken: list[tuple[int, Fact]] = []
        for fact in facts:
            if self.has_ended or fact.key in known or self._is_outdated(fact):
                continue
            known.add(fact.key)
            self.last_seq += 1
            if fact.job_id is not None and fact.sequence is not None:
                newest = self.job_sequences.get(fact.job_id, fact.sequence)
                self.job_sequences[fact.job_id] = max(newest, fact.sequence)
            self.has_ended = fact.is_end
            progress = self.reached(fact.attempt, fact.stage, fact.progress or 0.0)
            is_back = fact.progress is not None and progress > fact.progress
            taken.append((self.last_seq, fact.model_copy(update={"progress": progress}) if is_back else fact))
        return taken

    def balance(self, taken: list[tuple[int, Fact]], *, published_points: int, charged: int | None, life: int) -> None:
        """Before the end put an event that makes the task's points add up to what was charged.

        An earlier life may have published points that the ending run, reset to before them, does not know. `charged`
        None: it is unknown what the sum should be. `taken` ends with the end.
        """
        if charged is None:
            return
        seq, end = taken[-1]
        moved = published_points + sum(fact.credits_delta or 0 for _, fact in taken)
        missing = -charged - moved
        if missing == 0:
            return
        what = "came back that were held" if missing > 0 else "were charged"
        event = Fact(
            key=f"balanced:{life}",
            event=EventType.CREDITS,
            ts=end.ts,
            attempt=end.attempt,
            status=TaskStatus.RUNNING,
            credits_delta=missing,
            message=f"{abs(missing)} points {what} before the task's run was reset.",
        )
        taken[-1:] = [(seq, event), (seq + 1, end)]
        self.last_seq += 1

    def are_newer(self, facts: Iterable[Fact]) -> bool:
        """Whether every fact is newer than all that was written of its job, so that no key needs a lookup."""
        return all(
            fact.job_id is not None
            and fact.sequence is not None
            and fact.sequence > self.job_sequences.get(fact.job_id, fact.sequence - 1)
            and fact.key == f"{fact.job_id}:{fact.sequence}"
            for fact in facts
        )

    def reached(self, attempt: int, stage: str | None, progress: float) -> float:
        """The progress to publish: never less than was published of this attempt and stage.

        A reset run may end before it reaches again what it has published.
        """
        if (attempt, stage) == (self.attempt, self.stage):
            progress = max(progress, self.progress)
        progress = max(progress, self.published.get((attempt, stage), progress))
        self.attempt, self.stage, self.progress = attempt, stage, progress
        return progress

    def has_newer_figures(self, taken: TakenReport | None) -> bool:
        """Whether figures of the job were written that are newer than the workflow's."""
        return taken is not None and self.job_sequences.get(taken.job_id, taken.sequence) > taken.sequence

    def _is_outdated(self, fact: Fact) -> bool:
        if fact.job_id is None or fact.sequence is None or fact.is_change:
            return False
        return fact.sequence < self.job_sequences.get(fact.job_id, fact.sequence)
