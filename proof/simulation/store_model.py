"""The task store, exactly by contract §4 (earlier lives) and §6: claims, lives, facts that become events."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import (
    ClaimOutcome,
    Fact,
    Heard,
    HeardOrder,
    LookOrder,
    RowSeen,
    TaskClaim,
    TaskException,
    TaskRow,
    TaskState,
    TaskWrite,
)
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.ticks import Tick, TickVerdict
from proof.simulation.timeline import Timeline

OTHER_RUN: Final = "another-run"


class StoreRefused(Exception):
    """Another run holds the id: no retry can help."""


@dataclass(frozen=True)
class Caller:
    """The attempt that makes the call. `began_at`: of the attempt; `scheduled_at`: of its activity."""

    run_id: str
    began_at: float
    scheduled_at: float


class StoreModel:
    """One task's row, events and exception records; `events` in the order of their `seq`."""

    def __init__(self, timeline: Timeline, policy: Policy, held_by: str | None = None) -> None:
        self._timeline = timeline
        self._policy = policy
        self.held_by = held_by
        self.state: TaskState | None = None
        self.events: list[Fact] = []
        self.exceptions: dict[str, TaskException] = {}
        self.lives = 0
        self.hold_ids: list[str] = []
        self.job_ids: list[str] = []
        self._claim: TaskClaim | None = None
        self._run_id: str | None = None
        self._run_number = 0
        self._earlier_runs: set[str] = set()
        self._life_began_at: float | None = None
        self._version = 0
        self._keys: set[str] = set()
        self._sequences: dict[str, int] = {}
        self._reached: dict[tuple[int, str | None], float] = {}
        self._is_of_another_run = False
        """Whether what is written comes from a run that does not act, or not yet."""
        self._ticked_at: float | None = None
        self.ticks: list[Tick] = []
        """Every tick that was written, in order."""
        self._writes: list[tuple[TaskWrite, Caller]] = []
        self.on_event: Callable[[Fact], None] = lambda _fact: None
        self.is_current: Callable[[str], bool] = lambda _run_id: False
        """Whether Temporal names a run as the task's current one."""

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and self.events[-1].is_end

    # What activities request

    def claim(self, claim: TaskClaim, caller: Caller) -> ClaimOutcome:
        if self.held_by is None:
            self.held_by = claim.first_execution_run_id
            self._claim = claim
            self._run_id = caller.run_id
            self.state = TaskState(version=0, status=TaskStatus.QUEUED)
            self._append(
                Fact(key="accepted", event=EventType.ACCEPTED, ts=claim.at, attempt=1, status=TaskStatus.QUEUED)
            )
        is_own = self.held_by == claim.first_execution_run_id
        life = self.register(caller.run_id, 0, claim.first_execution_run_id) if is_own else EarlierLife()
        return ClaimOutcome(claimed=is_own, policy=self._policy, earlier_life=life if life.is_possible else None)

    def write(self, write: TaskWrite, caller: Caller) -> None:
        """Raises StoreRefused."""
        if write.first_execution_run_id != self.held_by or self.state is None:
            raise StoreRefused("another run holds the id")
        is_displaced = self._is_displaced(caller.run_id)
        if caller.run_id in self._earlier_runs and not is_displaced:
            return
        self._writes.append((write, caller))
        if (
            write.run_number >= self._run_number or is_displaced
        ):  # calls in flight while a run continues as new are no reset
            self._take_over(caller.run_id, write.run_number)
        self._is_of_another_run = caller.run_id != self._run_id
        had_ended = self.has_ended
        write = self._with_newest_figures(write)
        for fact in write.facts:
            if not self.has_ended and fact.key not in self._keys and not self._is_outdated(fact):
                if fact.is_end and self.lives:
                    self._balance(fact, write.state.credits.charged)
                self._append(fact)
        if not had_ended and (write.state.version > self._version or self.has_ended):
            if _report(write.state) != _report(self.state):
                self._ticked_at = None
            self.state, self._version = write.state, write.state.version
            self._list_ids(write.state)
        for exception in write.exceptions:
            self.exceptions.setdefault(exception.key, exception)

    def verdict_of(self, tick: Tick) -> TickVerdict:
        """Contract §2: a tick changes only figures of the job that the workflow last took a report of."""
        state = self.state
        if state is None:
            return TickVerdict.NOT_KNOWN
        is_current = state.taken is not None and state.taken.job_id == tick.job_id
        newest = self._sequences.get(tick.job_id, -1)
        if is_current and state.taken is not None:
            newest = max(newest, state.taken.sequence)
        if self.has_ended:
            return TickVerdict.ENDED
        if tick.sequence <= newest:
            return TickVerdict.OUTDATED
        if not is_current or state.taken is None or state.taken.digest != tick.digest:
            return TickVerdict.NOT_KNOWN
        if self._ticked_at is not None and self._timeline.now < self._ticked_at + 1:
            return TickVerdict.TOO_EARLY
        return TickVerdict.WRITTEN

    def tick(self, tick: Tick) -> TickVerdict:
        """Write it if it is one now."""
        verdict, state = self.verdict_of(tick), self.state
        if verdict is not TickVerdict.WRITTEN or state is None:
            return verdict
        self._ticked_at = self._timeline.now
        self.ticks.append(tick)
        figures = {
            "progress": max(state.progress, tick.progress or 0.0),
            "next_eta": tick.next_eta,
            "queue_position": tick.queue_position,
        }
        self.state = state.model_copy(update=figures)
        self._append(
            Fact(
                key=f"{tick.job_id}:{tick.sequence}",
                event=EventType.RUNNING,
                ts=datetime.fromtimestamp(self._timeline.now, UTC),
                attempt=max(state.attempts, 1),
                status=state.status,
                stage=state.stage,
                job_id=tick.job_id,
                sequence=tick.sequence,
                **figures,
            )
        )
        return verdict

    def heard(self, order: HeardOrder, caller: Caller) -> Heard | None:
        state = self.state
        is_next = order.run_number > self._run_number
        goes_on = is_next and order.continued_run_id is not None and order.continued_run_id == self._run_id
        if (
            (caller.run_id != self._run_id and not goes_on)
            or state is None
            or state.taken is None
            or state.taken.job_id != order.job_id
            or order.digest not in (None, state.taken.digest)
            or self._ticked_at is None
        ):
            return None
        self._take_over(caller.run_id, order.run_number)
        if caller.run_id != self._run_id:
            return None
        figures = state.model_dump(include={"progress", "next_eta", "queue_position"})
        sequence = self._sequences.get(order.job_id, 0)
        return Heard(sequence=sequence, seconds_ago=self._timeline.now - self._ticked_at, **figures)

    def _with_newest_figures(self, write: TaskWrite) -> TaskWrite:
        """ETA and queue position of a later tick stay, in the same attempt and stage."""
        taken, row = write.state.taken, self.state
        if taken is None or row is None or self._sequences.get(taken.job_id, taken.sequence) <= taken.sequence:
            return write
        here = (row.attempts, row.stage)
        newest = {"next_eta": row.next_eta, "queue_position": row.queue_position}
        facts = [
            fact.model_copy(update=newest) if (fact.attempt, fact.stage) == here and not fact.is_end else fact
            for fact in write.facts
        ]
        is_here = (write.state.attempts, write.state.stage) == here and not any(fact.is_end for fact in facts)
        update = {**newest, "progress": max(row.progress, write.state.progress)}
        state = write.state.model_copy(update=update) if is_here else write.state
        return write.model_copy(update={"facts": facts, "state": state})

    def look(self, order: LookOrder, caller: Caller) -> RowSeen:
        life = self.register(caller.run_id, order.run_number, order.first_execution_run_id)
        began = self._life_began_at
        seconds = self._timeline.now - began if began is not None else None
        points = sum(event.credits_delta or 0 for event in self.events)
        return RowSeen(life=life, row=self._row(), life_seconds=seconds, told_points=points)

    # Lives

    def register(self, run_id: str, run_number: int, first_run_id: str | None) -> EarlierLife:
        """Make the run the one that acts, unless it was superseded; what the row knows beyond it."""
        if self.state is None:
            return EarlierLife(is_row_missing=True)
        is_anothers = first_run_id not in (None, self.held_by)
        if not is_anothers:
            self._take_over(run_id, run_number)
        return EarlierLife(
            lives=self.lives, has_ended=self.has_ended, is_superseded=is_anothers or run_id in self._earlier_runs
        )

    def _is_displaced(self, run_id: str) -> bool:
        """Whether a late call of a run that was reset away took the task from the current run."""
        return run_id in self._earlier_runs and self.is_current(run_id)

    def _take_over(self, run_id: str, run_number: int) -> None:
        is_displaced = self._is_displaced(run_id)
        if self.has_ended or run_id == self._run_id or (run_id in self._earlier_runs and not is_displaced):
            return
        self._earlier_runs.discard(run_id)
        if self._run_id is not None:
            self._earlier_runs.add(self._run_id)
            if is_displaced or run_number <= self._run_number:
                self.lives += 1
                self._life_began_at, self._version, self._ticked_at = self._timeline.now, 0, None
                self.state = self.state and self.state.model_copy(update={"taken": None})
        self._run_id, self._run_number = run_id, run_number

    def record_id(self, made: str, ids: list[str]) -> bool:
        """Keep the id of a hold or job; whether it was known."""
        if self.state is None or made in ids:
            return self.state is not None
        ids.append(made)
        return False

    def _list_ids(self, state: TaskState) -> None:
        for made in state.credits.pre_deduct_ids:
            self.record_id(made, self.hold_ids)
        if state.job_id is not None:
            self.record_id(state.job_id, self.job_ids)

    def _row(self) -> TaskRow | None:
        if self.state is None or self._claim is None:
            return None
        claimed = self._claim.model_dump(exclude={"at"})
        now = datetime.fromtimestamp(self._timeline.now, UTC)
        return TaskRow(
            **self.state.model_dump(),
            **claimed,
            created_at=self._claim.at,
            updated_at=now,
            ended_at=self.events[-1].ts if self.has_ended else None,
            last_seq=len(self.events),
            run_id=self._run_id,
            lives=self.lives,
            hold_ids=self.hold_ids,
            job_ids=self.job_ids,
        )

    # Who else writes

    def write_again(self, rng: random.Random) -> None:
        """A second writer: an earlier write comes once more, from a worker that was cut off."""
        if self._writes:
            self.write(*rng.choice(self._writes))

    def _balance(self, end: Fact, charged: int | None) -> None:
        """Before the end of a task that was reset its points are made to add up to what was charged."""
        moved = sum(event.credits_delta or 0 for event in self.events)
        if charged is not None and moved != -charged:
            self._append(
                Fact(
                    key=f"balanced:{self.lives}",
                    event=EventType.CREDITS,
                    ts=end.ts,
                    attempt=end.attempt,
                    status=TaskStatus.RUNNING,
                    credits_delta=-charged - moved,
                )
            )

    def _is_outdated(self, fact: Fact) -> bool:
        if fact.job_id is None or fact.sequence is None or fact.is_change:
            return False
        return fact.sequence < self._sequences.get(fact.job_id, fact.sequence)

    def _append(self, fact: Fact) -> None:
        self._keys.add(fact.key)
        is_late = fact.job_id is not None and (fact.sequence or 0) < self._sequences.get(fact.job_id, 0)
        if fact.job_id is not None and fact.sequence is not None:
            self._sequences[fact.job_id] = max(fact.sequence, self._sequences.get(fact.job_id, fact.sequence))
        progress = self._progress_before(fact, is_late=is_late)
        if (fact.progress or 0.0) < progress:
            fact = fact.model_copy(update={"progress": progress})
        at = (fact.attempt, fact.stage)
        self._reached[at] = max(self._reached.get(at, 0.0), fact.progress or 0.0)
        self.events.append(fact)
        self.on_event(fact)

    def _progress_before(self, fact: Fact, *, is_late: bool) -> float:
        """The progress that was published of this attempt and stage: by the last event, by any where it may be old."""
        at = (fact.attempt, fact.stage)
        if self.lives or is_late or fact.is_change or self._is_of_another_run:
            return self._reached.get(at, 0.0)
        last = self.events[-1] if self.events else fact
        return (last.progress or 0.0) if (last.attempt, last.stage) == at else 0.0


def _report(state: TaskState | None) -> tuple[str, str] | None:
    """Which reports are like what the workflow took: those of its job that say the same."""
    return (state.taken.job_id, state.taken.digest) if state and state.taken else None
