"""A task's jobs: the first, and up to three more where a job may be retried (contract §1), all under one hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from temporalio import workflow

from comfyui_temporal.contracts.calls import JobCall, Post
from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.errors import (
    Answer,
    ErrorDetails,
    ExceptionCode,
    FailureCode,
    Refusal,
)
from comfyui_temporal.contracts.requests import JobBody, RequestedJob, RequestOutcome
from comfyui_temporal.contracts.scenes import Accepted
from comfyui_temporal.contracts.task_events import EventType
from workflows.alarm import Alarm
from workflows.earlier_life import are_not_of_earlier_life, is_key_of_earlier_life
from workflows.failures import RowEnded, TaskFailed
from workflows.job_clock import JobClock
from workflows.job_routes import JobRoutes
from workflows.outside_call import OutsideCall
from workflows.step_labels import RETRY
from workflows.stop import Stop
from workflows.task_record import TaskRecord

COVER_AWAITED: Final = "cover-awaited-right-before-a-next-job"


class LongRun(Protocol):
    """A run that continues as new when its history has become long."""

    def is_long(self) -> bool: ...

    def has_waited(self) -> bool: ...

    async def continue_as_new_if_long(self) -> bool: ...


class Attempts:
    """Every job that was requested. Each is recorded before its call, so that the undo knows of it."""

    def __init__(
        self,
        routes: JobRoutes,
        outside: OutsideCall,
        record: TaskRecord,
        clock: JobClock,
        stop: Stop,
        alarm: Alarm,
        asked: list[RequestedJob],
        *,
        retry_at: datetime | None = None,
        long_run: LongRun | None = None,
    ) -> None:
        """`retry_at`: when the next attempt may begin, in a run that continued as new between two attempts."""
        self._routes = routes
        self._outside = outside
        self._record = record
        self._clock = clock
        self._stop = stop
        self._alarm = alarm
        self.asked = asked
        for job in asked:
            job.drop_body()
        self.retry_at = retry_at
        self._long_run = long_run
        self._cancelling: dict[int, asyncio.Task[None]] = {}

    def carry(self) -> list[RequestedJob]:
        return self.asked

    @property
    def number(self) -> int:
        """How many attempts there were, the present one included."""
        return sum(not job.is_key_taken for job in self.asked)

    @property
    def key_number(self) -> int:
        """`n` in the keys of the present attempt's calls."""
        return len(self.asked)

    async def covered(self) -> None:
        """Wait until the hold covers the next job: what was awaited since the pause may have outlasted it.

        The first job has no hold yet. Raises as `InterruptibleWaits.in_time`.
        """
        if not self._outside.waits.is_covered() and workflow.patched(COVER_AWAITED):
            await self._outside.waits.covered()

    async def submit(self, request: JobBody) -> Accepted:
        """Row 1: request the next job. Raises TaskFailed with the refusal's code, and as `OutsideCall.setup`."""
        taken = 0
        while True:
            await self.covered()
            self._outside.may_begin()
            n = len(self.asked) + 1
            job = RequestedJob(attempt=n, key=self._outside.key("submit", n), request=request, asked_at=workflow.now())
            self.asked.append(job)
            self._record.attempted(self.number)
            try:
                answer: Answer[Any] = await self._outside.setup(
                    self._routes.submit, self._post(job), summary=self._outside.labels.submit, again=self.covered
                )
            except RowEnded as end:
                if end.is_unsent and workflow.patched("unsent-job-not-undone"):
                    job.give_up()
                raise
            job.answered(answer)
            if not is_key_of_earlier_life(answer, self._outside.earlier):
                break
            job.is_key_taken = True  # an earlier life used the key: its job is cancelled when the task ends
            taken += 1
            if are_not_of_earlier_life(taken):
                break
        if answer.reply is None:
            raise TaskFailed.by_refusal(_refusal_of(answer))
        accepted: Accepted = answer.reply
        self._record.job_accepted(job.job_id, accepted.gpu_slots)
        self._clock.estimated(accepted.estimated_time)
        return accepted

    async def wait_to_retry(self, end: JobUpdate) -> None:
        """After a job that ended without a delivery: wait until the next one may be requested.

        Raises TaskFailed where it may not be retried or no attempt is left, and as
        `InterruptibleWaits.raise_if_interrupted`.
        """
        details = end.error or ErrorDetails()
        self._record.job_failed(details)
        if not details.may_be_retried():
            raise TaskFailed.by_job(details)
        pauses = self._outside.limits.policy.retry_after_seconds
        if self.number > len(pauses):
            raise TaskFailed.by_job(details)
        seconds = pauses[self.number - 1]
        if workflow.patched("old-job-cancelled-beside-the-next"):
            self._clock.not_started()
            self._cancel_in_background(self.asked[-1])
            await self._pause(details, seconds)
        else:
            await self._cancel(self.asked[-1])
            await self._pause_of_release_0_1(details, seconds)
        self._record.job_failed(None)

    async def _pause(self, details: ErrorDetails, seconds: float) -> None:
        """Wait until the next attempt may begin: the pause is over, and the hold covers it.

        The run may continue as new meanwhile and takes `retry_at` along.
        """
        if self.retry_at is None:
            self.retry_at = workflow.now() + timedelta(seconds=seconds)
            self._publish_retry(details, seconds)
        waits, again_at = self._outside.waits, self.retry_at
        await workflow.wait_condition(lambda: True)  # until the old job's cancel is scheduled
        while True:
            waits.raise_if_interrupted()
            latest = self._clock.left_for_retry()
            if workflow.now() >= latest:
                raise TaskFailed(FailureCode.TIMEOUT, "No time is left for another attempt.", details)
            if workflow.now() >= again_at and waits.is_covered():
                break
            if self._long_run is not None and await self._long_run.continue_as_new_if_long():
                continue
            at = min(again_at, latest) if workflow.now() < again_at else latest
            await waits.until(self._pause_over(again_at), at=at, summary=RETRY)
        self.retry_at = None

    def _pause_over(self, again_at: datetime) -> Callable[[], bool]:
        """What interrupts the pause: the hold covers the next attempt, or the run has become long.

        A run that was long before and could not continue as new is not interrupted for that again, unless it waited for
        a call.
        """
        long_run = self._long_run
        was_long = long_run is None or long_run.is_long()

        def is_over() -> bool:
            is_long = long_run is not None and ((not was_long and long_run.is_long()) or long_run.has_waited())
            return is_long or (workflow.now() >= again_at and self._outside.waits.is_covered())

        return is_over

    def _publish_retry(self, details: ErrorDetails, seconds: float) -> None:
        self._record.publish(
            f"retry:{self.number}",
            EventType.RUNNING,
            error=details,
            message=f"Attempt {self.number} ended with {details.code}; the next follows in {seconds:g} s.",
        )

    async def _pause_of_release_0_1(self, details: ErrorDetails, seconds: float) -> None:
        """The pause of a run of release 0.1.0, which does not keep the hold alive."""
        again_at = workflow.now() + timedelta(seconds=seconds)
        self._publish_retry(details, seconds)
        while workflow.now() < again_at:
            await self._alarm.until(lambda: self._stop.requested, min(again_at, self._clock.left_for_retry()), RETRY)
            self._stop.raise_if_requested()
            if workflow.now() >= self._clock.left_for_retry():
                raise TaskFailed(FailureCode.TIMEOUT, "No time is left for another attempt.", details)

    # Jobs that ended without a delivery: cancelled in the background

    def _cancel_in_background(self, job: RequestedJob) -> None:
        running = self._cancelling.get(job.attempt)
        if job.needs_undo and (running is None or running.done()):
            self._cancelling[job.attempt] = asyncio.create_task(self._cancel(job))

    def resume(self) -> None:
        """Repeat the cancels that were suspended."""
        for job in self.asked if self.retry_at is not None else self.asked[:-1]:
            self._cancel_in_background(job)

    async def all_old_cancelled(self) -> None:
        """Wait until no job but the last one can be running: a task does not end before that."""
        for job in self.asked[:-1]:
            if job.attempt in self._cancelling:
                await self._finally_cancelled(job)

    async def _finally_cancelled(self, job: RequestedJob) -> None:
        """Wait for the cancel in flight; make the call where there is none, or it was suspended."""
        running = self._cancelling.get(job.attempt)
        if running is not None:
            await workflow.wait([running])
            running.result()
        if job.needs_undo:
            await self._cancel(job)

    def of_earlier_lives(self, asked: list[RequestedJob]) -> Attempts:
        """Jobs that earlier runs of the task requested, to be undone like its own."""
        return Attempts(self._routes, self._outside, self._record, self._clock, self._stop, self._alarm, asked)

    # The undo

    async def cancel_all(self, _reason: str) -> None:
        """Cancel every job that may be running, also one whose answer was lost."""
        open_jobs = [job for job in self.asked if job.needs_undo]
        cancelling = [asyncio.create_task(self._finally_cancelled(job)) for job in open_jobs]
        if cancelling:
            await workflow.wait(cancelling)
        for task in cancelling:
            task.result()

    async def _cancel(self, job: RequestedJob) -> None:
        if job.job_id is None:
            await self._learn(job)
        if job.job_id is None:
            return
        answer: Answer[Any] | None = None
        for n in (job.attempt, f"{job.attempt}:{self._outside.earlier.life.lives}"):
            call = JobCall(call_for=self._outside.call_for, job_id=job.job_id, key=self._outside.key("cancel", n))
            answer = await self._outside.in_background(
                self._routes.cancel, call, summary=self._outside.labels.cancel_job
            )
            if answer is None or not is_key_of_earlier_life(answer, self._outside.earlier):
                break
        if answer is None:
            return
        job.cancelled = True  # also where both keys are taken: no further call can end it
        if answer.not_offered:
            self._record.record_exception(
                f"cancel_job:{job.attempt}",
                ExceptionCode.ROUTE_NOT_OFFERED,
                f"Job {job.job_id} could not be cancelled: the server has no such route; it runs out.",
                job_id=job.job_id,
            )
        elif answer.refusal is not None and answer.refusal.code is not FailureCode.LOST:
            self._unfinished(job, answer.refusal)

    async def _learn(self, job: RequestedJob) -> None:
        """Repeat key and body to learn the id of a job whose answer was lost."""
        answer: Answer[Any] | None = await self._outside.until_answered(
            self._routes.submit,
            self._post(job, is_undo=True),
            summary=f"{self._outside.labels.cancel_job}: learn its id",
        )
        if answer is not None:
            job.answered(answer)
        if job.outcome is not RequestOutcome.UNKNOWN:
            return
        job.give_up()
        if answer is not None and answer.refusal is not None:
            self._unfinished(job, answer.refusal)

    def _unfinished(self, job: RequestedJob, refusal: Refusal) -> None:
        self._record.record_exception(
            f"undo_job:{job.attempt}",
            ExceptionCode.UNDO_UNFINISHED,
            f"The job of attempt {job.attempt} could not be cancelled; it runs out. {refusal.sentence}",
            job_id=job.job_id,
        )

    def _post(self, job: RequestedJob, *, is_undo: bool = False) -> Post[Any]:
        assert job.request is not None
        kind = type(job.request)
        call_for = self._outside.call_for
        return Post[kind](call_for=call_for, key=job.key, body=job.request, is_undo=is_undo)  # type: ignore[valid-type]


def _refusal_of(answer: Answer[Any]) -> Refusal:
    return answer.refusal or Refusal(
        code=FailureCode.COMFYUI_UNAVAILABLE,
        message="not_offered",
        http_status=404,
        sentence="The server at COMFYUI_TEMPORAL_COMFYUI_URL has no /comfyui/v1: the operator must check the address.",
    )
