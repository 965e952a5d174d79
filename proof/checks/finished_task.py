"""The evidence on one task that has ended, and the names of the rules and the exemptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from temporalio.api.history.v1 import HistoryEvent

from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.task_store import Fact, TaskState
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulators.admin_wire import EntrySeen, HoldSeen, RunSeen
from proof.simulators.credits_profile import CreditsProfile


class Rule(StrEnum):
    """What is wrong, as tables show it: all of these must be 0."""

    NOT_ENDED = "tasks not ended"
    WRONG_END = "tasks that ended otherwise than they may"
    DOUBLE_CHARGE = "double charges"
    MISCHARGE = "charges that differ from what the task reports"
    MISREPORTED = "credits that contradict themselves"
    LEAKED_HOLD = "leaked holds"
    UNPAID_RESULT = "results handed out unpaid"
    ORPHAN_JOB = "orphan jobs"
    BROKEN_EVENTS = "event histories with a gap or a wrong end"
    LOST_EVENT = "lost events"
    REPEATED_EVENT = "repeated events"
    FAILED_WORKFLOW_TASK = "failed workflow tasks"
    BROKEN_HISTORY = "histories that do not explain themselves or do not replay"
    LEFT_SNAPSHOT = "dataset copies left behind"


@dataclass(frozen=True)
class Finding:
    """One rule that does not hold, and in which way."""

    rule: Rule
    text: str

    def __str__(self) -> str:
        return self.text


class Exempt(StrEnum):
    """What a kind of run cannot know, or a fault made impossible."""

    HOLD_EXPIRES = "hold_expires"
    """A hold whose id could not be learned, or that could not be cancelled, ends by its expiry."""
    JOB_RUNS_OUT = "job_runs_out"
    """A job whose id could not be learned, or that could not be cancelled, runs to its end."""
    POINTS_IN_EVENTS = "points_in_events"
    """The events' points do not add up: the service answered that it does not have a hold."""
    BUG = "bug"
    """Workflow tasks were made to fail."""
    CHARGE_HIDDEN = "charge_hidden"
    """The ledger lags by more than the ten minutes for which it is searched: an earlier life's charge stays unseen."""
    CHARGED_TWICE = "charged_twice"
    """A service without keys, whose ledger showed an unanswered charge only after those ten minutes: it was sent again,
    and is reported once."""
    RESET = "reset"
    """The run may have been reset, which the server records as a failed workflow task."""
    PRICE = "price"
    """Another caller resolved a hold, or someone spoke in a service's place, so its state is not what the task knew."""
    NO_ROW = "no_row"
    """The run may have been terminated before it claimed its id."""
    SNAPSHOT = "snapshot"
    """Object storage is not read, or the run was terminated between its last event and the deletion."""
    RESULT = "result"
    """The run's own result is not read."""
    STREAM = "stream"
    """No client followed the task's live stream."""
    HISTORY = "history"
    """Temporal's histories are not judged."""


@dataclass(frozen=True)
class Charges:
    """What the ledger shows of a task: `taken` points in all, by how many commits and how many charges."""

    taken: int = 0
    commits: int = 0
    charges: int = 0

    @classmethod
    def by(cls, entries: Iterable[EntrySeen]) -> Charges:
        entries = list(entries)
        return cls(
            taken=-sum(entry.change + entry.frozen_change for entry in entries),
            commits=sum(entry.kind == "commit" for entry in entries),
            charges=sum(entry.kind == "charge" for entry in entries),
        )


@dataclass(frozen=True, kw_only=True)
class FinishedTask:
    """One task. Evidence that is None was not collected: judging without it needs the exemption of that name."""

    task_id: str
    profile: CreditsProfile
    row: TaskState | None
    """What the task store has; None where there is no row."""
    has_ended: bool = True
    last_seq: int | None = None
    """The newest event's number by the row; None where rows have none."""
    events: Sequence[TaskEvent | Fact]
    records: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """The exception records, as code and details."""
    holds: Sequence[HoldSeen] = ()
    charges: Charges = Charges()
    jobs: Sequence[RunSeen] = ()
    prices: PriceTable = field(default_factory=PriceTable)
    """The worker's table."""
    result: Mapping[str, Any] | None = None
    """The run's own result as JSON; empty for a run that ended Canceled."""
    streamed: Sequence[TaskEvent | int] | None = None
    """What a client of the live stream received: events, or their numbers alone."""
    histories: Sequence[Sequence[HistoryEvent]] | None = None
    """Of each run of the task, and of each run that gave it back."""
    snapshot_files: Sequence[str] | None = None
    """What object storage still holds of the dataset's temporary copy."""

    @property
    def is_completed(self) -> bool:
        return self.row is not None and self.row.status is TaskStatus.COMPLETED

    @property
    def codes(self) -> set[str]:
        return {code for code, _ in self.records}


@dataclass(frozen=True)
class Expected:
    """What a plan expects of a task; None: nothing."""

    ends: frozenset[TaskStatus] | None = None
    jobs: int | None = None
    is_delivered: bool = False
    """Where it completes: it was charged once, more than 0 points, and something was handed out."""


NOTHING_EXPECTED: Final = Expected()


@dataclass
class Findings:
    """Collects what does not hold."""

    found: list[Finding] = field(default_factory=list)

    def must(self, holds: bool, rule: Rule, text: str) -> None:
        if not holds:
            self.found.append(Finding(rule, text))
