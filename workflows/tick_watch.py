"""Looks into the task store for ticks before ComfyUI is polled (decision 4).

A job that ticks is not polled: its callbacks reach the store, and the workflow takes its figures over from there. Every
30 minutes, and once before a timeout, ComfyUI is polled all the same.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import FailureError
from temporalio.workflow import ActivityHandle

from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.task_store import Heard, HeardOrder
from comfyui_temporal.contracts.ticks import digest_of
from workflows.outside_call import OutsideCall
from workflows.step_labels import HEARD

LOOKS_BEFORE_A_LOSS: Final = "looks-before-a-loss"
LOOKS_AT_A_LOSS: Final = "looks-at-a-loss"
AS_GOOD_AS_NOW: Final = timedelta(seconds=2)
UNPOLLED_AT_MOST: Final = timedelta(minutes=30)


class TickWatch:
    """What the store has heard of the current job. Off in runs whose policy has no short way."""

    def __init__(self, task_id: str, outside: OutsideCall, state: WatchState) -> None:
        self._task_id = task_id
        self._outside = outside
        self._state = state
        self._look: ActivityHandle[Heard | None] | None = None
        self.polled_at: datetime | None = None
        """When this run last polled ComfyUI, with or without news."""

    def due(self, poll_due: datetime | None) -> datetime | None:
        """When to look: once after each silence of a job that has reported, and once more before each further poll.

        `poll_due`: when ComfyUI is polled for that silence.
        """
        state = self._state
        if not self._is_on() or self._look is not None or state.newest is None or state.last_news_at is None:
            return None
        if state.unknown_since is not None:
            return poll_due if self._looks_before_loss(state.unknown_since) else None
        if self._is_poll_wanted():
            return None
        if self._has_looked_since(state.last_news_at):
            return poll_due if self._looks_before(poll_due) else None
        return state.last_news_at + timedelta(seconds=self._outside.limits.poll_after_seconds)

    def is_looking(self) -> bool:
        return self._look is not None

    def has_update(self) -> bool:
        return self._look is not None and self._look.done()

    def check(self, poll_due: datetime | None) -> None:
        """Look if it is due."""
        due, newest = self.due(poll_due), self._state.newest
        if due is None or workflow.now() < due or self._state.current is None or newest is None:
            return
        self._start(self._state.current, newest)

    def looks_at_loss(self) -> bool:
        """Look once more where a second 404 has come, but not right after a look. Whether its answer is awaited."""
        looked_at, newest = self._state.looked_at, self._state.newest
        is_fresh = looked_at is not None and self._look is None and workflow.now() - looked_at < AS_GOOD_AS_NOW
        if not self._is_on() or self._state.current is None or newest is None or is_fresh:
            return False
        if not workflow.patched(LOOKS_AT_A_LOSS):
            return False
        if self._look is None:
            self._start(self._state.current, newest)
        return True

    def _start(self, job_id: str, newest: JobUpdate) -> None:
        self._state.looked_at = workflow.now()
        order = HeardOrder(
            task_id=self._task_id,
            job_id=job_id,
            digest=digest_of(newest),
            run_number=self._outside.call_for.run_number,
            first_execution_run_id=self._outside.call_for.first_execution_run_id,
            continued_run_id=workflow.info().continued_run_id,
        )
        self._look = self._outside.local(TaskStoreActivities.heard, order, summary=HEARD)

    def stop(self) -> None:
        """Drop a look in flight: it changes nothing."""
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def taken(self) -> JobUpdate | None:
        """The newest update with what was heard since; None where nothing new was heard, or the store is away."""
        look, self._look = self._look, None
        newest = self._state.newest
        if look is None or newest is None:
            return None
        try:
            heard = look.result()
        except FailureError:
            return None
        if heard is None or heard.sequence <= newest.sequence or newest.is_final:
            return None
        state = self._state
        news_at = state.last_news_at = workflow.now() - timedelta(seconds=heard.seconds_ago)
        is_before_404 = False
        if state.unknown_since is not None and workflow.patched(LOOKS_BEFORE_A_LOSS):
            is_before_404 = news_at <= state.unknown_since
            state.unknown_since = state.unknown_since if is_before_404 else None
        if not is_before_404 and workflow.patched("looks-again-once-heard"):
            state.looked_at = None  # the look that brought this news is none after it
        figures = heard.model_dump(include={"sequence", "progress", "next_eta", "queue_position"})
        return newest.model_copy(update=figures)

    def hides_reports(self) -> bool:
        """Whether the newest news came from the store: ComfyUI may have said more than reached this run."""
        state = self._state
        if not self._is_on() or state.reported_at is None or state.last_news_at is None:
            return False
        return state.last_news_at > state.reported_at

    def _is_poll_wanted(self) -> bool:
        """Whether ComfyUI itself has been silent for so long that it is polled, whatever the store has heard."""
        spoke = max((at for at in (self._state.reported_at, self.polled_at) if at is not None), default=None)
        return spoke is not None and workflow.now() - spoke >= UNPOLLED_AT_MOST

    def _is_on(self) -> bool:
        return self._outside.limits.policy.short_way

    def _looks_before(self, poll_due: datetime | None) -> bool:
        """Whether a look that heard nothing is repeated as the poll is due: the job may tick again by then."""
        looked_at = self._state.looked_at
        if looked_at is None or poll_due is None or looked_at >= poll_due:
            return False
        return workflow.patched("looks-again-before-a-poll")

    def _looks_before_loss(self, unknown_since: datetime) -> bool:
        """A job that ticks after a 404 is known, as one that signals is."""
        return not self._has_looked_since(unknown_since) and workflow.patched(LOOKS_BEFORE_A_LOSS)

    def _has_looked_since(self, at: datetime) -> bool:
        return self._state.looked_at is not None and self._state.looked_at > at
