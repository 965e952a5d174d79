"""One job followed: any payload taken in, newest wins, early ones kept, polled when it is silent (contract §2)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError
from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception
from temporalio.workflow import ActivityHandle

from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.comfyui import JobState, TrainingState
from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.size_budget import MAX_READ_BYTES, MAX_SIGNAL_BYTES, SMALL_SIGNAL_BYTES
from comfyui_temporal.contracts.tasks import TaskStatus
from workflows.failures import TaskFailed, failure_from
from workflows.inbox import Inbox
from workflows.job_routes import JobRoutes
from workflows.outside_call import RETRY_SILENCE_ONLY, UNREADABLE_FOR, OutsideCall
from workflows.task_record import TaskRecord

LOST_AFTER: Final = timedelta(seconds=10)


class JobWatch:
    """The newest word on the task's current job, and the inbox that signals fill.

    A message may come before the call that made its job has answered: it waits in the inbox until the id is known.
    """

    def __init__(
        self, task_id: str, routes: JobRoutes, outside: OutsideCall, record: TaskRecord, carried: WatchState
    ) -> None:
        self._task_id = task_id
        self._routes = routes
        self._outside = outside
        self._record = record
        self.state = carried
        self._inbox = Inbox(carried)
        self.poll_after_seconds = 30.0
        self.poll_at_most_seconds = 120.0
        self._poll: ActivityHandle[Answer[JobState]] | ActivityHandle[Answer[TrainingState]] | None = None
        self._told: list[Callable[[JobUpdate], None]] = []
        self._read_bytes = 0

    def carry(self) -> WatchState:
        return self.state

    def on_news(self, told: Callable[[JobUpdate], None]) -> None:
        """Have `told` called with every message that is applied, in order."""
        self._told.append(told)

    # Intake: a signal handler stores, the flow decides

    def take(self, payload: bytes | None) -> None:
        """Any payload at all (pitfall 2): what cannot be a message of this task is counted, never raised."""
        news = self._read(payload)
        if news is None:
            self.state.callbacks_refused += 1
            return
        self._inbox.put(news)

    def _read(self, payload: bytes | None) -> JobUpdate | None:
        if payload is None or not self._may_read(len(payload)):
            return None
        try:
            value = read_json(payload, max_bytes=MAX_SIGNAL_BYTES)
            if not isinstance(value, dict) or value.get("task_id") not in (None, "", self._task_id):
                return None
            return self._routes.news_of(value)
        except (UnreadableJson, ValidationError):
            return None

    def _may_read(self, size: int) -> bool:
        """Whether there is time for it: a run has a budget for large ones, and a poll covers for what is left out."""
        if size <= SMALL_SIGNAL_BYTES:
            return True
        self._read_bytes += size
        return self._read_bytes <= MAX_READ_BYTES or not workflow.patched("callbacks-read-by-budget")

    # The current job

    def follow(self, job_id: str, *, first: JobUpdate | None = None) -> None:
        """From now on `job_id` is the job that counts; an earlier one's messages are counted, never applied."""
        if self.state.current is not None and self.state.current != job_id:
            self.state.earlier.append(self.state.current)
        self.state.current = job_id
        self.state.newest = None
        self.state.last_news_at = workflow.now()
        self.state.silence_seconds = 0.0
        self.state.unknown_since = self.state.unreadable_since = None
        self.state.unreadable = ""
        self.stop_polling()
        if first is not None:
            self._apply(first)

    def started(self) -> None:
        """A training was started: its silence counts from here."""
        self.state.last_news_at = workflow.now()

    def has_update(self) -> bool:
        """Whether `read` has something to do."""
        if self.state.current is None:
            return False
        return bool(self.state.inbox) or (self._poll is not None and self._poll.done())

    def has_delivery(self) -> bool:
        """Whether the current job has delivered, by what was read or waits in the inbox."""
        told = [*self.state.inbox, *([self.state.newest] if self.state.newest else [])]
        return any(news.succeeded and news.job_id == self.state.current for news in told)

    def read(self) -> None:
        """Apply the inbox, then a poll's answer: newest wins."""
        for news in self._inbox.take_all():
            if news.job_id == self.state.current:
                self._apply(news)
            else:
                self.state.callbacks_refused += 1
        if self._poll is not None and self._poll.done():
            self._take_poll()

    @property
    def newest(self) -> JobUpdate | None:
        return self.state.newest

    def _apply(self, news: JobUpdate) -> None:
        newest = self.state.newest
        if newest is not None and (news.sequence <= newest.sequence or newest.is_final):
            return
        is_new_stage = newest is None or (news.stage, news.status) != (newest.stage, newest.status)
        self.state.newest = news
        self.state.last_news_at = workflow.now()
        self.state.silence_seconds = 0.0
        self.state.unknown_since = self.state.unreadable_since = None
        self.state.unreadable = ""
        self._record.apply(news, attempt_changed=newest is None)
        for told in self._told:
            told(news)
        self._record.publish_progress(news, is_new_stage=is_new_stage or news.is_final)

    # Polling covers for callbacks that stay out

    def due(self) -> datetime | None:
        if self._poll is not None or self.state.last_news_at is None:
            return None
        if self.state.unknown_since is not None:
            return self.state.unknown_since + LOST_AFTER
        silence = self.state.silence_seconds or self.poll_after_seconds
        since = self.state.last_news_at
        expected = self.state.newest.next_eta if self.state.newest else None
        if expected is not None:
            until_expected = (expected - since).total_seconds()
            silence = min(max(silence, until_expected), max(silence, self.poll_at_most_seconds))
        return since + timedelta(seconds=silence)

    def check(self) -> None:
        """Ask ComfyUI where it has been silent for too long."""
        due = self.due()
        if due is not None and workflow.now() >= due and self.state.current is not None:
            call = JobCall(call_for=self._outside.call_for, job_id=self.state.current)
            self._poll = self._outside.visible(self._routes.get, call, summary="4 poll", retry=RETRY_SILENCE_ONLY)

    def is_polling(self) -> bool:
        return self._poll is not None

    def stop_polling(self) -> None:
        """A poll changes nothing and may be dropped at any time."""
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
            self._apply(self._routes.news_of_state(answer.reply))
        elif answer.refusal is not None and answer.refusal.code is FailureCode.LOST:
            self._unknown()

    def _silent_again(self) -> None:
        longer = 2 * (self.state.silence_seconds or self.poll_after_seconds)
        self.state.silence_seconds = min(longer, max(self.poll_at_most_seconds, self.poll_after_seconds))
        self.state.last_news_at = workflow.now()

    def _unreadable(self, failure: TaskFailed) -> None:
        """An answer that stays unreadable for 15 minutes is the job's end (contract §4); until then it is asked again.

        A deadline that passes before says so too: see `JobClock`.
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
            self._lose(ErrorDetails(code=FailureCode.LOST, message="ComfyUI no longer knows the job.", retryable=True))

    def _lose(self, details: ErrorDetails) -> None:
        assert self.state.current is not None
        newest = self.state.newest
        self.state.newest = (
            newest.model_copy(update={"error": details, "succeeded": False})
            if newest is not None
            else JobUpdate(job_id=self.state.current, sequence=0, status=TaskStatus.QUEUED, error=details)
        )
