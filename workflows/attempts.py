"""A job, and the next one when it may be retried (contract §1): three more, under the same hold, each a new job."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from temporalio import workflow

from contracts.calls import JobCall, Post
from contracts.carried import AskedJob, JobNews
from contracts.comfyui import JobAccepted, JobRequest, TrainingAccepted, TrainingDraft
from contracts.errors import Answer, ErrorDetails, ExceptionCode, FailureCode, Refusal
from contracts.tasks import EventType
from workflows.alarm import Alarm
from workflows.failures import TaskFailed
from workflows.job_clock import JobClock
from workflows.job_routes import JobRoutes
from workflows.outside_call import OutsideCall
from workflows.stop import Stop
from workflows.task_record import TaskRecord


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
        self.retry_after_seconds: list[float] = []
        self.opening_minutes = 15.0

    def carry(self) -> list[AskedJob]:
        return self.asked

    @property
    def number(self) -> int:
        return len(self.asked)

    async def submit(self, request: JobRequest | TrainingDraft) -> JobAccepted | TrainingAccepted:
        """Row 1: ask for the next job. Raises TaskFailed or TaskStopped."""
        self._outside.may_begin()
        n = self.number + 1
        job = AskedJob(attempt=n, key=self._outside.key("submit", n), request=request, asked_at=workflow.now())
        self.asked.append(job)
        self._record.attempted(n)
        answer: Answer[Any] = await self._outside.opening(
            self._routes.submit, self._post(job), summary=self._routes.submit_summary, minutes=self.opening_minutes
        )
        if answer.reply is None:
            job.is_refused()
            raise TaskFailed.by_refusal(_refusal_of(answer))
        accepted: JobAccepted | TrainingAccepted = answer.reply
        job.is_known_as(_id_of(accepted))
        self._record.state.job_id = job.job_id
        self._record.state.gpu_slots = accepted.gpu_slots
        self._clock.estimated(accepted.estimated_time)
        return accepted

    async def another_after(self, end: JobNews) -> None:
        """Decide on a job that ended without delivery: return when the next one may be asked for.

        Raises TaskFailed where it may not be retried or no attempt is left; TaskStopped.
        """
        details = end.error or ErrorDetails()
        self._record.state.error = details
        if not details.may_be_retried():
            raise TaskFailed.by_job(details)
        if self.number > len(self.retry_after_seconds):
            raise TaskFailed.by_job(details)
        await self._cancel(self.asked[-1])
        await self._wait_for_retry(details, self.retry_after_seconds[self.number - 1])
        self._record.state.error = None

    async def _wait_for_retry(self, details: ErrorDetails, seconds: float) -> None:
        again_at = workflow.now() + timedelta(seconds=seconds)
        self._record.tell(
            f"retry:{self.number}",
            EventType.RUNNING,
            error=details,
            message=f"Attempt {self.number} ended with {details.code}; the next follows in {seconds:g} s.",
        )
        while workflow.now() < again_at:
            await self._alarm.until(
                lambda: self._stop.requested, min(again_at, self._clock.left_for_retry()), "4 retry: next attempt"
            )
            self._stop.obey()
            if workflow.now() >= self._clock.left_for_retry():
                raise TaskFailed(FailureCode.TIMEOUT, "No time is left for another attempt.", details)

    # The undo

    async def cancel_all(self, _reason: str) -> None:
        """Cancel every job that may run, also one whose answer was lost."""
        open_jobs = [job for job in self.asked if not job.cancelled and not job.refused]
        cancelling = [asyncio.create_task(self._cancel(job)) for job in open_jobs]
        if cancelling:
            await workflow.wait(cancelling)
        for task in cancelling:
            task.result()

    async def _cancel(self, job: AskedJob) -> None:
        if job.job_id is None:
            await self._learn(job)
        if job.job_id is None:
            return
        call = JobCall(call_for=self._outside.call_for, job_id=job.job_id, key=self._outside.key("cancel", job.attempt))
        answer = await self._outside.until_answered(self._routes.cancel, call, summary="5 cancel job")
        job.cancelled = True
        if answer is not None and answer.not_offered:
            self._record.tell_exception(
                f"cancel_job:{job.attempt}",
                ExceptionCode.ROUTE_NOT_OFFERED,
                f"Job {job.job_id} could not be cancelled: the server has no such route; it runs out.",
                job_id=job.job_id,
            )
        elif answer is not None and answer.refusal is not None and answer.refusal.code is not FailureCode.LOST:
            self._unfinished(job, answer.refusal)

    async def _learn(self, job: AskedJob) -> None:
        """Repeat key and body to learn the id of a job whose answer was lost."""
        answer: Answer[Any] | None = await self._outside.until_answered(
            self._routes.submit, self._post(job), summary="5 cancel job: learn its id"
        )
        if answer is not None and answer.reply is not None:
            job.is_known_as(_id_of(answer.reply))
            return
        job.is_refused()
        if answer is not None and answer.refusal is not None and answer.refusal.message == "unreadable":
            self._unfinished(job, answer.refusal)

    def _unfinished(self, job: AskedJob, refusal: Refusal) -> None:
        self._record.tell_exception(
            f"undo_job:{job.attempt}",
            ExceptionCode.UNDO_UNFINISHED,
            f"The job of attempt {job.attempt} could not be cancelled; it runs out. {refusal.sentence}",
            job_id=job.job_id,
        )

    def _post(self, job: AskedJob) -> Post[Any]:
        assert job.request is not None
        kind = JobRequest if isinstance(job.request, JobRequest) else TrainingDraft
        return Post[kind](call_for=self._outside.call_for, key=job.key, body=job.request)  # type: ignore[valid-type]


def _id_of(accepted: JobAccepted | TrainingAccepted) -> str:
    return accepted.job_id if isinstance(accepted, JobAccepted) else accepted.training_id


def _refusal_of(answer: Answer[Any]) -> Refusal:
    return answer.refusal or Refusal(
        code=FailureCode.COMFYUI_UNAVAILABLE,
        message="not_offered",
        http_status=404,
        sentence="The server at the ComfyUI address does not offer contract §2's routes; check the address.",
    )
