"""The times that a task is measured against (contract §1): deadline, cap, queue SLA. All spans in minutes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow

from comfyui_temporal.contracts.continuation import ClockState
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.fields import minutes_from
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import TaskStatus
from workflows.failures import TaskFailed
from workflows.task_limits import TaskLimits
from workflows.task_record import TaskRecord

LONGEST_SPAN: Final = "cap-of-the-longest-span"
LAST_ANSWER_WITHIN: Final = timedelta(seconds=10)
"""How long a timeout waits for the answer to a last poll."""


def _readable() -> str:
    return ""


def _never(_over: datetime) -> bool:
    return False


def _not_yet() -> datetime | None:
    return None


class JobClock:
    """Deadline = the time since when the job is at work + factor × estimated_time.

    The whole task is capped from its first start. Waiting in the queue counts for neither: it is limited by the
    policy's cap alone. While a job is queued, a deadline is as if the work began now.
    """

    def __init__(
        self,
        record: TaskRecord,
        state: ClockState,
        limits: TaskLimits,
        *,
        default_eta_minutes: float,
        unreadable: Callable[[], str] = _readable,
        asks_last: Callable[[datetime], bool] = _never,
        begun_at: Callable[[], datetime | None] = _not_yet,
    ) -> None:
        """`unreadable`: why the job's state cannot be read, empty where it can. `begun_at`: when it began its work.

        `asks_last`: polls once more, past the deadline, where that may bring news; whether its answer is awaited.
        """
        self._begun_at = begun_at
        self._record = record
        self._state = state
        self._limits = limits
        self._default_eta_minutes = default_eta_minutes
        self._unreadable = unreadable
        self._asks_last = asks_last

    def carry(self) -> ClockState:
        return self._state

    def estimated(self, minutes: float | None) -> None:
        """ComfyUI's estimate: the latest one counts for the deadline, the longest one for the cap."""
        if minutes is None:
            return
        self._state.estimated_time = minutes
        self._record.estimated(minutes)
        if self._state.first_span_minutes is None:
            self._state.first_span_minutes = self._span_minutes()
        if self._span_minutes() > self._longest_span_minutes() and workflow.patched(LONGEST_SPAN):
            self._state.longest_span_minutes = self._span_minutes()

    def start(self) -> datetime:
        """An attempt is submitted (an image) or started (a training): now."""
        now = workflow.now()
        self._state.queued_seconds += self._queued().total_seconds()
        self._state.counts_from_processing = self._limits.policy.counts_from_processing
        self._state.attempt_start = now
        self._state.queued_since = now
        if self._state.first_start is None:
            self._state.first_start = now
        return now

    def not_started(self) -> None:
        """A training was created, or the next attempt is waited for: no deadline runs before a start."""
        self._state.queued_seconds += self._queued().total_seconds()
        self._state.attempt_start = self._state.queued_since = None

    def deadline(self) -> datetime:
        """When the present attempt is out of time; before a start, as if it started now."""
        start = self._state.attempt_start
        begun = workflow.now() if start is None else start + self._queued()
        return min(minutes_from(begun, self._span_minutes()), self._cap())

    def _is_queued(self) -> bool:
        """Whether the present job's work has not begun, in a run that counts from there."""
        start, begun = self._state.attempt_start, self._begun_at()
        return self._state.counts_from_processing and start is not None and (begun is None or begun < start)

    def _queued(self) -> timedelta:
        """How long the present job has waited for its work to begin."""
        start, begun = self._state.attempt_start, self._begun_at()
        if start is None or not self._state.counts_from_processing:
            return timedelta(0)
        return (workflow.now() if begun is None or begun < start else begun) - start

    def _ends_at(self) -> datetime:
        """When the task ends for lack of time, if nothing changes."""
        start = self._state.attempt_start
        if start is not None and self._is_queued():
            return minutes_from(start, self._limits.policy.cap_minutes)
        return self.deadline()

    def is_running(self) -> bool:
        """Whether an attempt has begun."""
        return self._state.attempt_start is not None

    def deadline_is_fixed(self) -> bool:
        """Whether the deadline no longer moves: an attempt has begun, or the task's cap comes first."""
        if self._is_queued():
            return False
        return self.is_running() or (self._state.first_start is not None and self.deadline() >= self._cap())

    def latest(self) -> datetime | None:
        """When the attempt's time is over, or between two attempts the whole task's. None before the first start."""
        if self.is_running():
            return self._ends_at()
        return self._cap() if self._state.first_start is not None else None

    def left_for_retry(self) -> datetime:
        """Until when another attempt may still begin."""
        return self._cap()

    def _span_minutes(self) -> float:
        eta = self._state.estimated_time if self._state.estimated_time is not None else self._default_eta_minutes
        return self._limits.deadline_factor * eta

    def _longest_span_minutes(self) -> float:
        """The longest span so far; in a run that an earlier release began, perhaps the first one."""
        return self._state.longest_span_minutes or self._state.first_span_minutes or self._span_minutes()

    def _cap(self) -> datetime:
        queued = timedelta(seconds=self._state.queued_seconds) + self._queued()
        start = workflow.now() if self._state.first_start is None else self._state.first_start + queued
        return minutes_from(start, min(2 * self._longest_span_minutes(), self._limits.policy.cap_minutes))

    # A concern of the follow loop

    def show_wait(self) -> None:
        self._record.waiting_for("ComfyUI: callback or poll", self._ends_at())

    def has_update(self) -> bool:
        return False

    def due(self) -> datetime:
        sla, over = self._sla_at(), self._ends_at()
        if workflow.now() >= over:
            over += LAST_ANSWER_WITHIN
        return min(over, sla) if sla else over

    def check(self) -> None:
        """Raise TaskFailed past the deadline; record a missed queue SLA once.

        The code is `timeout`, or `reply_invalid` where the job's state could not be read.
        """
        now = workflow.now()
        over = self._ends_at()
        if now >= over + LAST_ANSWER_WITHIN or (now >= over and not self._asks_last(over)):
            unreadable = self._unreadable()
            if unreadable:
                raise TaskFailed(FailureCode.REPLY_INVALID, f"{self._timeout_sentence()} {unreadable}")
            raise TaskFailed(FailureCode.TIMEOUT, self._timeout_sentence())
        sla = self._sla_at()
        if sla is not None and now >= sla:
            self._miss_sla()

    def _sla_at(self) -> datetime | None:
        if self._state.sla_told or self._state.queued_since is None:
            return None
        if self._record.state.status is not TaskStatus.QUEUED:
            return None
        return minutes_from(self._state.queued_since, self._limits.policy.queue_sla_minutes)

    def _miss_sla(self) -> None:
        self._state.sla_told = True
        minutes = f"{self._limits.policy.queue_sla_minutes:g}"
        message = f"Still queued after {minutes} minutes, longer than promised; the task goes on."
        self._record.record_exception("queue_sla", ExceptionCode.QUEUE_SLA_MISSED, message)
        self._record.publish("queue_sla", EventType.RUNNING, message=message)

    def _timeout_sentence(self) -> str:
        started = self._state.attempt_start or workflow.now()
        if self._is_queued():
            hours = f"{self._limits.policy.cap_minutes / 60:g}"
            return f"The job waited in the queue for {hours} hours; job and credits were given back."
        span = timedelta(seconds=round((self.deadline() - started - self._queued()).total_seconds()))
        return f"The job did not end within {span} (its deadline); job and credits were given back."
