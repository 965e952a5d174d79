"""The times that a task is measured against (contract §1): deadline, cap, queue SLA. All spans in minutes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow

from comfyui_temporal.contracts.continuation import ClockState
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.fields import minutes_from
from comfyui_temporal.contracts.tasks import EventType, TaskStatus
from workflows.failures import TaskFailed
from workflows.task_limits import TaskLimits
from workflows.task_record import TaskRecord

LAST_ANSWER_WITHIN: Final = timedelta(seconds=10)
"""How long a timeout waits for the answer to a last poll."""


def _readable() -> str:
    return ""


def _never() -> bool:
    return False


class JobClock:
    """Deadline = the attempt's start + factor × estimated_time. The whole task is capped from its first start."""

    def __init__(
        self,
        record: TaskRecord,
        state: ClockState,
        limits: TaskLimits,
        *,
        default_eta_minutes: float,
        unreadable: Callable[[], str] = _readable,
        asks_last: Callable[[], bool] = _never,
    ) -> None:
        """`unreadable`: why the job's state cannot be read, empty where it can.

        `asks_last`: polls once more before a timeout where that may bring news; whether its answer is awaited.
        """
        self._record = record
        self._state = state
        self._limits = limits
        self._default_eta_minutes = default_eta_minutes
        self._unreadable = unreadable
        self._asks_last = asks_last

    def carry(self) -> ClockState:
        return self._state

    def estimated(self, minutes: float | None) -> None:
        """ComfyUI's estimate: the latest one counts, the first one fixes the cap."""
        if minutes is None:
            return
        self._state.estimated_time = minutes
        self._record.estimated(minutes)
        if self._state.first_span_minutes is None:
            self._state.first_span_minutes = self._span_minutes()

    def start(self) -> None:
        """An attempt is submitted (an image) or started (a training)."""
        now = workflow.now()
        self._state.attempt_start = now
        self._state.queued_since = now
        if self._state.first_start is None:
            self._state.first_start = now

    def not_started(self) -> None:
        """A training was created, or the next attempt is waited for: no deadline runs before a start."""
        self._state.attempt_start = self._state.queued_since = None

    def deadline(self) -> datetime:
        """When the present attempt is out of time; before a start, as if it started now."""
        start = self._state.attempt_start or workflow.now()
        return min(minutes_from(start, self._span_minutes()), self._cap())

    def is_running(self) -> bool:
        """Whether an attempt has begun."""
        return self._state.attempt_start is not None

    def deadline_is_fixed(self) -> bool:
        """Whether the deadline no longer moves: an attempt has begun, or the task's cap comes first."""
        return self.is_running() or (self._state.first_start is not None and self.deadline() >= self._cap())

    def latest(self) -> datetime | None:
        """When the attempt's time is over, or between two attempts the whole task's. None before the first start."""
        if self.is_running():
            return self.deadline()
        return self._cap() if self._state.first_start is not None else None

    def left_for_retry(self) -> datetime:
        """Until when another attempt may still begin."""
        return self._cap()

    def _span_minutes(self) -> float:
        eta = self._state.estimated_time if self._state.estimated_time is not None else self._default_eta_minutes
        return self._limits.deadline_factor * eta

    def _cap(self) -> datetime:
        first_span = self._state.first_span_minutes or self._span_minutes()
        start = self._state.first_start or workflow.now()
        return minutes_from(start, min(2 * first_span, self._limits.policy.cap_minutes))

    # A concern of the follow loop

    def show_wait(self) -> None:
        self._record.waiting_for("ComfyUI: callback or poll", self.deadline())

    def has_update(self) -> bool:
        return False

    def due(self) -> datetime:
        sla, over = self._sla_at(), self.deadline()
        if workflow.now() >= over:
            over += LAST_ANSWER_WITHIN
        return min(over, sla) if sla else over

    def check(self) -> None:
        """Raise TaskFailed past the deadline; record a missed queue SLA once.

        The code is `timeout`, or `reply_invalid` where the job's state could not be read.
        """
        now = workflow.now()
        if now >= self.deadline() + LAST_ANSWER_WITHIN or (now >= self.deadline() and not self._asks_last()):
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
        span = timedelta(seconds=round((self.deadline() - started).total_seconds()))
        return f"The job did not end within {span} (its deadline); job and credits were given back."
