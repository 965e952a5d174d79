"""Watches one job: takes any payload, keeps the newest update, polls after silence (contract §2)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError
from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception
from temporalio.workflow import ActivityHandle

from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.scenes import State
from comfyui_temporal.contracts.size_budget import MAX_READ_BYTES, MAX_SIGNAL_BYTES, SMALL_SIGNAL_BYTES
from comfyui_temporal.contracts.tasks import TaskStatus
from workflows.failures import TaskFailed, failure_from
from workflows.inbox import Inbox
from workflows.job_routes import JobRoutes
from workflows.outside_call import RETRY_SILENCE_ONLY, UNREADABLE_FOR, OutsideCall
from workflows.step_labels import POLL
from workflows.task_record import TaskRecord
from workflows.tick_watch import TickWatch

LOST_AFTER: Final = timedelta(seconds=10)
KNOWN_AGAIN: Final = "a-job-that-is-known-again-is-not-half-lost"
LOSS_CONFIRMED_SOON: Final = "loss-confirmed-at-once-where-a-look-was-dropped"
UNKNOWN_TWICE: Final = ErrorDetails(code=FailureCode.LOST, message="ComfyUI no longer knows the job.", retryable=True)
MAX_BEGUN: Final = 4
"""The current job, one whose id is not known yet, and strangers."""


class JobWatch:
    """The newest update of the task's current job, and the inbox that signals fill.

    A message may arrive before the call that made its job has answered: it stays in the inbox until the id is known.
    """

    def __init__(
        self,
        task_id: str,
        routes: JobRoutes,
        outside: OutsideCall,
        record: TaskRecord,
        state: WatchState,
        on_update: Callable[[JobUpdate], None],
    ) -> None:
        """`on_update` is called with every message that is applied, in order."""
        self._task_id = task_id
        self._routes = routes
        self._outside = outside
        self._record = record
        self._limits = outside.limits
        self.state = state
        self._on_update = on_update
        self._inbox = Inbox(state)
        self._ticks = TickWatch(task_id, outside, state)
        self._poll: ActivityHandle[Answer[State]] | None = None
        self._read_bytes = 0
        self._is_loss_open = False
        """Whether a look into the store decides if the job is lost: ComfyUI has answered 404 twice."""

    def carry(self) -> WatchState:
        return self.state

    # Intake: a signal handler stores, the flow decides

    def take(self, payload: bytes | None) -> None:
        """Take any payload (pitfall 2). One that is no message of this task is counted; nothing is raised."""
        update = self._read(payload)
        if update is None:
            self.refuse()
            return
        self._see_begun(update)
        self._inbox.put(update)

    def refuse(self) -> None:
        """Count a signal that cannot be read."""
        self.state.callbacks_refused += 1

    def _read(self, payload: bytes | None) -> JobUpdate | None:
        if payload is None or not self._may_read(len(payload)):
            return None
        try:
            value = read_json(payload, max_bytes=MAX_SIGNAL_BYTES)
            if not isinstance(value, dict) or value.get("task_id") not in (None, "", self._task_id):
                return None
            return self._routes.update_from(value)
        except (UnreadableJson, ValidationError):
            return None

    def _may_read(self, size: int) -> bool:
        """Whether to read a payload of this size: a run has a budget for large ones, and a poll replaces the rest."""
        if size <= SMALL_SIGNAL_BYTES:
            return True
        self._read_bytes += size
        return self._read_bytes <= MAX_READ_BYTES or not workflow.patched("callbacks-read-by-budget")

    # The current job

    def follow(self, job_id: str, *, since: datetime | None = None, first: JobUpdate | None = None) -> None:
        """Make `job_id` the current job. Messages of an earlier one are counted, never applied.

        `since`: when its attempt started, where it has.
        """
        if self.state.current is not None and self.state.current != job_id:
            self.state.earlier.append(self.state.current)
        self.state.current = job_id
        self.state.newest = None
        self.state.last_news_at = workflow.now()
        self.state.silence_seconds = 0.0
        self.state.unknown_since = self.state.unreadable_since = None
        self.state.unreadable = ""
        self.state.reported_at = self.state.looked_at = None
        self._count_from(since)
        self.stop_polling()
        if first is not None:
            self._apply(first)

    def started(self, since: datetime) -> None:
        """A training was started: its silence is measured from now, its work from `since` at the earliest."""
        self.state.last_news_at = workflow.now()
        self._count_from(since)

    def _count_from(self, since: datetime | None) -> None:
        """Work that was seen before its attempt started counts from there: else it counts as queued for good.

        A server without a start route works from the beginning on. A run that was reset gets the callbacks of a job
        before it requests that job.
        """
        begun = self.begun_at()
        if begun is None or since is None or begun >= since:
            return
        if self.state.current is not None and workflow.patched("work-seen-before-its-start-counts-from-there"):
            self.state.begun[self.state.current] = since

    def has_update(self) -> bool:
        """Whether `read` has something to do."""
        if self.state.current is None:
            return False
        is_polled = self._poll is not None and self._poll.done()
        return bool(self.state.inbox) or is_polled or self._ticks.has_update()

    def begun_at(self) -> datetime | None:
        """When the current job was first seen at work, or failed before that: by a message read, or in the inbox."""
        return self.state.begun.get(self.state.current or "")

    def _see_begun(self, update: JobUpdate) -> None:
        begun = self.state.begun
        is_known = update.job_id in begun or update.job_id in self.state.earlier
        if is_known or (update.status is TaskStatus.QUEUED and not self._failed_in_queue(update)):
            return
        begun[update.job_id] = workflow.now()
        if len(begun) > MAX_BEGUN:
            del begun[next(job_id for job_id in begun if job_id not in (self.state.current, update.job_id))]

    @staticmethod
    def _failed_in_queue(update: JobUpdate) -> bool:
        """A job that failed waits no longer: from then on the task's time counts."""
        return update.error is not None and workflow.patched("failed-in-queue-waits-no-longer")

    def has_delivery(self) -> bool:
        """Whether the current job has delivered, by a message that was read or is in the inbox."""
        updates = [*self.state.inbox, *([self.state.newest] if self.state.newest else [])]
        return any(update.succeeded and update.job_id == self.state.current for update in updates)

    def read(self) -> None:
        """Apply the inbox, then what the store or a poll answered. An older message changes nothing."""
        for update in self._inbox.take_all():
            if update.job_id == self.state.current:
                self._apply(update)
            else:
                self.state.callbacks_refused += 1
        if self._ticks.has_update():
            self._take_ticks()
        if self._poll is not None and self._poll.done():
            self._take_poll()

    def unreadable(self) -> str:
        """Why the job's state cannot be read; empty where it can."""
        return self.state.unreadable

    @property
    def newest(self) -> JobUpdate | None:
        return self.state.newest

    def _apply(self, update: JobUpdate) -> None:
        newest = self.state.newest
        if newest is not None and (update.sequence <= newest.sequence or newest.is_final):
            return
        self._see_begun(update)
        is_new_stage = newest is None or (update.stage, update.status) != (newest.stage, newest.status)
        self.state.newest = update
        self.state.last_news_at = self.state.reported_at = workflow.now()
        self.state.silence_seconds = 0.0
        self.state.unknown_since = self.state.unreadable_since = None
        self.state.unreadable = ""
        self._record.apply(update, attempt_changed=newest is None)
        self._on_update(update)
        self._record.publish_progress(update, is_new_stage=is_new_stage or update.is_final)

    def _take_ticks(self) -> None:
        """Take over the figures of ticks: they are published already."""
        heard = self._ticks.taken()
        is_loss_open, self._is_loss_open = self._is_loss_open, False
        if heard is not None:
            self._apply_heard(heard)
        if is_loss_open and self.state.unknown_since is not None:
            self._lose(UNKNOWN_TWICE)

    def _apply_heard(self, heard: JobUpdate) -> None:
        self.state.newest = heard
        self.state.silence_seconds = 0.0
        self.state.unreadable_since, self.state.unreadable = None, ""
        self._record.heard(heard, at=self.state.last_news_at or workflow.now())

    # Polling replaces callbacks that do not arrive

    def due(self) -> datetime | None:
        """When to look into the store, or to poll; None while an answer is awaited."""
        if self._ticks.is_looking() or self._poll is not None:
            return None
        poll_due = self._poll_due()
        dues = [due for due in (self._ticks.due(poll_due), poll_due) if due is not None]
        return min(dues, default=None)

    def _poll_due(self) -> datetime | None:
        if self._poll is not None or self.state.last_news_at is None:
            return None
        confirms_loss_at = self._confirms_loss_at()
        if confirms_loss_at is not None:
            return confirms_loss_at
        silence = self.state.silence_seconds or self._limits.poll_after_seconds
        since = self.state.last_news_at
        expected = self.state.newest.next_eta if self.state.newest else None
        if expected is not None:
            until_expected = (expected - since).total_seconds()
            silence = min(max(silence, until_expected), max(silence, self._limits.policy.poll_at_most_seconds))
        return since + timedelta(seconds=silence)

    def _confirms_loss_at(self) -> datetime | None:
        """When to ask again after a 404. After that poll, whatever it brings, the pauses are as usual."""
        if self.state.unknown_since is None or self.state.last_news_at is None:
            return None
        again = self.state.unknown_since + LOST_AFTER
        return again if self.state.last_news_at < again or not workflow.patched(KNOWN_AGAIN) else None

    def check(self) -> None:
        """Ask ComfyUI where it has been silent for too long, and the store has heard nothing either."""
        due = self._poll_due()
        if self._poll is None:
            self._ticks.check(due)
        if due is not None and workflow.now() >= due and not self._ticks.is_looking():
            self._ask()

    def _ask(self) -> None:
        if self.state.current is not None:
            call = JobCall(call_for=self._outside.call_for, job_id=self.state.current)
            self._poll = self._outside.visible(self._routes.get, call, summary=POLL, retry=RETRY_SILENCE_ONLY)

    def asks_before_timeout(self, over: datetime) -> bool:
        """Poll once after `over` where the last news came from the store alone. Whether the answer is awaited."""
        if not self._ticks.hides_reports():
            return False
        if self._poll is None:
            if self._ticks.polled_at is not None and self._ticks.polled_at >= over:
                return False
            self._ask()
        return True

    def is_polling(self) -> bool:
        return self._poll is not None

    def stop_polling(self) -> None:
        """A poll or a look changes nothing and may be dropped at any time."""
        self._ticks.stop()
        if self._is_loss_open and workflow.patched(LOSS_CONFIRMED_SOON):
            self.state.last_news_at = self.state.unknown_since  # else the next poll waits as long as after any other
        self._is_loss_open = False
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None

    def _take_poll(self) -> None:
        poll, self._poll = self._poll, None
        assert poll is not None
        try:
            answer = poll.result()
        except FailureError as error:
            if is_cancelled_exception(error):
                return
            self._silent_again()
            self._unreadable(failure_from(error, FailureCode.COMFYUI_UNAVAILABLE))
            return
        self.state.unreadable, self.state.unreadable_since = "", None
        self._silent_again()
        if answer.reply is not None:
            if self.state.unknown_since is not None and workflow.patched(KNOWN_AGAIN):
                self.state.unknown_since = None
            self._apply(self._routes.update_from_state(answer.reply))
        elif answer.refusal is not None and answer.refusal.code is FailureCode.LOST:
            self._unknown()

    def _silent_again(self) -> None:
        longer = 2 * (self.state.silence_seconds or self._limits.poll_after_seconds)
        self.state.silence_seconds = min(
            longer, max(self._limits.policy.poll_at_most_seconds, self._limits.poll_after_seconds)
        )
        self.state.last_news_at = workflow.now()
        if workflow.patched("polls-without-news-count"):
            self._ticks.polled_at = workflow.now()

    def _unreadable(self, failure: TaskFailed) -> None:
        """End the job once its state was unreadable for 15 minutes (contract §4); until then the poll is repeated.

        A deadline that passes before that ends the task with the same code: see `JobClock`.
        """
        if failure.code is not FailureCode.REPLY_INVALID:
            return
        now = workflow.now()
        self.state.unreadable, self.state.unreadable_since = str(failure), self.state.unreadable_since or now
        if now >= self.state.unreadable_since + UNREADABLE_FOR:
            self._lose(ErrorDetails(code=FailureCode.REPLY_INVALID, message=str(failure)))

    def _unknown(self) -> None:
        """404 twice, 10 s apart: the server has lost the job (contract §1)."""
        now = workflow.now()
        if self.state.unknown_since is None:
            self.state.unknown_since = now
        elif now >= self.state.unknown_since + LOST_AFTER:
            self._is_loss_open = self._ticks.looks_at_loss()
            if not self._is_loss_open:
                self._lose(UNKNOWN_TWICE)

    def _lose(self, details: ErrorDetails) -> None:
        assert self.state.current is not None
        newest = self.state.newest
        self.state.newest = (
            newest.model_copy(update={"error": details, "succeeded": False})
            if newest is not None
            else JobUpdate(job_id=self.state.current, sequence=0, status=TaskStatus.QUEUED, error=details)
        )
