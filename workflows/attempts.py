"""A job, and the next one when it may be retried (contract §1): three more, under the same hold, each a new job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Protocol

from temporalio import workflow

from comfyui_temporal.contracts.calls import JobCall, Post
from comfyui_temporal.contracts.comfyui import JobAccepted, JobRequest, TrainingAccepted, TrainingDraft
from comfyui_temporal.contracts.continuation import AskedJob, JobUpdate
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, ExceptionCode, FailureCode, Refusal
from comfyui_temporal.contracts.tasks import EventType
from workflows.alarm import Alarm
from workflows.earlier_life import is_key_of_earlier_life
from workflows.failures import TaskFailed
from workflows.job_clock import JobClock
from workflows.job_routes import JobRoutes
from workflows.outside_call import OutsideCall
from workflows.stop import Stop
from workflows.task_record import TaskRecord


class LongRun(Protocol):
    """A run that continues as new when its history has become long."""

    def is_long(self) -> bool: ...

    async def continue_as_new_if_long(self) -> bool: ...


class Attempts:
    """Every job that was asked for. Each is noted before its call, so that the undo can learn of it."""

    def __init__(
        self,
        routes: JobRoutes,
        outside: OutsideCall,
        record: TaskRecord,
        clock: JobClock,
        stop: Stop,
        alarm: Alarm,
        carried: list[AskedJob],
    ) -> None:
        self._routes = routes
        self._outside = outside
        self._record = record
        self._clock = clock
        self._stop = stop
        self._alarm = alarm
        self.asked: list[AskedJob] = carried
        for job in carried:
            job.lighten()
        self.retry_at: datetime | None = None
        """When the next attempt may begin, while it is waited for."""
        self.long_run: LongRun | None = None
        self._cancelling: dict[int, asyncio.Task[None]] = {}
        self.retry_after_seconds: list[float] = []
        self.setup_minutes = 15.0

    def carry(self) -> list[AskedJob]:
        return self.asked

    @property
    def number(self) -> int:
        """How many attempts there were."""
        return sum(not job.is_key_taken for job in self.asked)

    @property
    def key_number(self) -> int:
        """`n` in the keys of the present attempt's calls."""
        return len(self.asked)

    async def submit(self, request: JobRequest | TrainingDraft) -> JobAccepted | TrainingAccepted:
        """Row 1: ask for the next job. Raises TaskFailed or TaskStopped."""
        while True:
            self._outside.may_begin()
            n = len(self.asked) + 1
            job = AskedJob(attempt=n, key=self._outside.key("submit", n), request=request, asked_at=workflow.now())
            self.asked.append(job)
            self._record.attempted(self.number)
            answer: Answer[Any] = await self._outside.setup(
                self._routes.submit, self._post(job), summary=self._routes.submit_summary, minutes=self.setup_minutes
            )
            if not is_key_of_earlier_life(answer, self._outside.earlier):
                break
            job.is_key_taken = True  # by an earlier life: its job is cancelled when the task ends
            job.is_refused()
        if answer.reply is None:
            job.is_refused()
            raise TaskFailed.by_refusal(_refusal_of(answer))
        accepted: JobAccepted | TrainingAccepted = answer.reply
        job.is_known_as(_id_of(accepted))
        self._record.state.job_id = job.job_id
        self._record.state.gpu_slots = accepted.gpu_slots
        self._clock.estimated(accepted.estimated_time)
        return accepted

    async def wait_to_retry(self, end: JobUpdate) -> None:
        """Decide on a job that ended without delivery: return when the next one may be asked for.

        Raises TaskFailed where it may not be retried or no attempt is left; TaskStopped.
        """
        details = end.error or ErrorDetails()
        self._record.state.error = details
        if not details.may_be_retried():
            raise TaskFailed.by_job(details)
        if self.number > len(self.retry_after_seconds):
            raise TaskFailed.by_job(details)
        seconds = self.retry_after_seconds[self.number - 1]
        if workflow.patched("old-job-cancelled-beside-the-next"):
            self._clock.not_started()
            self._cancel_beside(self.asked[-1])
            await self._pause(details, seconds)
        else:
            await self._cancel(self.asked[-1])
            await self._wait_for_retry(details, seconds)
        self._record.state.error = None

    async def _pause(self, details: ErrorDetails, seconds: float) -> None:
        """Wait until the next attempt may begin: its time has come, and the hold covers it.

        A run may continue as new meanwhile; `retry_at` goes with it.
        """
        if self.retry_at is None:
            self.retry_at = workflow.now() + timedelta(seconds=seconds)
            self._publish_retry(details, seconds)
        waiting, again_at = self._outside.waiting, self.retry_at
        await workflow.wait_condition(lambda: True)  # until the old job's cancel was asked for
        while True:
            waiting.raise_if_interrupted()
            latest = self._clock.left_for_retry()
            if workflow.now() >= latest:
                raise TaskFailed(FailureCode.TIMEOUT, "No time is left for another attempt.", details)
            if workflow.now() >= again_at and waiting.is_covered():
                break
            if self.long_run is not None and await self.long_run.continue_as_new_if_long():
                continue
            at = min(again_at, latest) if workflow.now() < again_at else latest
            await waiting.until(self._pause_over(again_at), at=at, summary="4 retry: next attempt")
        self.retry_at = None

    def _pause_over(self, again_at: datetime) -> Callable[[], bool]:
        """When the pause is to be looked at before its time: the hold covers the next attempt, or the run became long.

        A run that is long already and could not continue as new is not looked at again for that.
        """
        long_run = self.long_run
        was_long = long_run is None or long_run.is_long()

        def is_over() -> bool:
            is_long = not was_long and long_run is not None and long_run.is_long()
            return is_long or (workflow.now() >= again_at and self._outside.waiting.is_covered())

        return is_over

    def _publish_retry(self, details: ErrorDetails, seconds: float) -> None:
        self._record.publish(
            f"retry:{self.number}",
            EventType.RUNNING,
            error=details,
            message=f"Attempt {self.number} ended with {details.code}; the next follows in {seconds:g} s.",
        )

    async def _wait_for_retry(self, details: ErrorDetails, seconds: float) -> None:
        """As runs of 0.1.0 wait, which the hold outlives or not."""
        again_at = workflow.now() + timedelta(seconds=seconds)
        self._publish_retry(details, seconds)
        while workflow.now() < again_at:
            await self._alarm.until(
                lambda: self._stop.requested, min(again_at, self._clock.left_for_retry()), "4 retry: next attempt"
            )
            self._stop.raise_if_requested()
            if workflow.now() >= self._clock.left_for_retry():
                raise TaskFailed(FailureCode.TIMEOUT, "No time is left for another attempt.", details)

    # Jobs that ended without delivery: cancelled beside the flow

    def _cancel_beside(self, job: AskedJob) -> None:
        running = self._cancelling.get(job.attempt)
        if not (job.cancelled or job.refused) and (running is None or running.done()):
            self._cancelling[job.attempt] = asyncio.create_task(self._cancel(job))

    def resume(self) -> None:
        """Go on with the cancels that were put down."""
        for job in self.asked if self.retry_at is not None else self.asked[:-1]:
            self._cancel_beside(job)

    async def all_old_cancelled(self) -> None:
        """Wait until no job but the last one can be running: a task does not end before."""
        for job in self.asked[:-1]:
            if job.attempt in self._cancelling:
                await self._finally_cancelled(job)

    async def _finally_cancelled(self, job: AskedJob) -> None:
        """Wait for the cancel in flight; make the call where there is none, or it was put down."""
        running = self._cancelling.get(job.attempt)
        if running is not None:
            await workflow.wait([running])
            running.result()
        if not (job.cancelled or job.refused):
            await self._cancel(job)

    # The undo

    async def cancel_all(self, _reason: str) -> None:
        """Cancel every job that may run, also one whose answer was lost."""
        open_jobs = [job for job in self.asked if not job.cancelled and not job.refused]
        cancelling = [asyncio.create_task(self._finally_cancelled(job)) for job in open_jobs]
        if cancelling:
            await workflow.wait(cancelling)
        for task in cancelling:
            task.result()

    async def _cancel(self, job: AskedJob) -> None:
        if job.job_id is None:
            await self._learn(job)
        if job.job_id is None:
            return
        answer: Answer[Any] | None = None
        for n in (job.attempt, f"{job.attempt}:{self._outside.earlier.life.lives}"):
            call = JobCall(call_for=self._outside.call_for, job_id=job.job_id, key=self._outside.key("cancel", n))
            answer = await self._outside.in_background(self._routes.cancel, call, summary="5 cancel job")
            if answer is None or not is_key_of_earlier_life(answer, self._outside.earlier):
                break
        if answer is None:
            return
        job.cancelled = True
        if answer.not_offered:
            self._record.record_exception(
                f"cancel_job:{job.attempt}",
                ExceptionCode.ROUTE_NOT_OFFERED,
                f"Job {job.job_id} could not be cancelled: the server has no such route; it runs out.",
                job_id=job.job_id,
            )
        elif answer.refusal is not None and answer.refusal.code is not FailureCode.LOST:
            self._unfinished(job, answer.refusal)

    async def _learn(self, job: AskedJob) -> None:
        """Repeat key and body to learn the id of a job whose answer was lost."""
        answer: Answer[Any] | None = await self._outside.until_answered(
            self._routes.submit, self._post(job, is_undo=True), summary="5 cancel job: learn its id"
        )
        if answer is not None and answer.reply is not None:
            job.is_known_as(_id_of(answer.reply))
            return
        job.is_refused()
        if answer is not None and answer.refusal is not None and answer.refusal.message == "unreadable":
            self._unfinished(job, answer.refusal)

    def _unfinished(self, job: AskedJob, refusal: Refusal) -> None:
        self._record.record_exception(
            f"undo_job:{job.attempt}",
            ExceptionCode.UNDO_UNFINISHED,
            f"The job of attempt {job.attempt} could not be cancelled; it runs out. {refusal.sentence}",
            job_id=job.job_id,
        )

    def _post(self, job: AskedJob, *, is_undo: bool = False) -> Post[Any]:
        assert job.request is not None
        kind = JobRequest if isinstance(job.request, JobRequest) else TrainingDraft
        call_for = self._outside.call_for
        return Post[kind](call_for=call_for, key=job.key, body=job.request, is_undo=is_undo)  # type: ignore[valid-type]


def _id_of(accepted: JobAccepted | TrainingAccepted) -> str:
    return accepted.job_id if isinstance(accepted, JobAccepted) else accepted.training_id


def _refusal_of(answer: Answer[Any]) -> Refusal:
    return answer.refusal or Refusal(
        code=FailureCode.COMFYUI_UNAVAILABLE,
        message="not_offered",
        http_status=404,
        sentence="The server at the ComfyUI address does not offer contract §2's routes; check the address.",
    )
