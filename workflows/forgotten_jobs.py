"""Jobs and trainings that an earlier life of the task requested and this run does not know (contract §4)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from temporalio import workflow

from activities.earlier_runs import EarlierRunActivities
from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.errors import Answer, ExceptionCode, FailureCode
from comfyui_temporal.contracts.give_back import EarlierJobs
from comfyui_temporal.contracts.requests import RequestedJob, not_known
from workflows.attempts import Attempts
from workflows.job_routes import JobRoutes
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.step_labels import POLL
from workflows.task_record import TaskRecord

UNDER_KEYS_SENT: Final = "jobs-of-earlier-lives-cancelled-also-under-keys-sent-again"
READ_WITHIN: Final = timedelta(minutes=1)


class ForgottenJobs:
    """The task's row holds the ids of those that were answered."""

    def __init__(
        self, routes: JobRoutes, outside: OutsideCall, record: TaskRecord, attempts: Attempts, look: RowLook
    ) -> None:
        self._routes = routes
        self._outside = outside
        self._record = record
        self._attempts = attempts
        self._look = look
        self._cancelled: set[str] = set()
        self._has_cancelled_unanswered = False
        self._earlier: EarlierJobs | None = None

    def _own(self) -> set[str]:
        return {job.job_id for job in self._attempts.asked if job.job_id}

    async def cancel(self) -> None:
        """Cancel them, each once. ComfyUI leaves one that is over as it is."""
        for job_id in self._look.forgotten_jobs(self._own() | self._cancelled):
            self._cancelled.add(job_id)
            call = JobCall(
                call_for=self._outside.call_for,
                job_id=job_id,
                key=self._outside.key("cancel", f"forgotten:{job_id}"),
            )
            answer: Answer[Any] | None = await self._outside.until_answered(
                self._routes.cancel, call, summary=self._outside.labels.cancel_job
            )
            if answer is not None and answer.not_offered and workflow.patched("route-not-offered-recorded"):
                self._record.record_exception(
                    f"route_not_offered:{job_id}",
                    ExceptionCode.ROUTE_NOT_OFFERED,
                    f"ComfyUI has no cancel route: job {job_id}, requested before the run was reset, runs to its end.",
                    job_id=job_id,
                )
            if answer is not None and answer.refusal is not None and answer.refusal.code is not FailureCode.LOST:
                self._record.record_exception(
                    f"undo_job:{job_id}",
                    ExceptionCode.UNDO_UNFINISHED,
                    f"Job {job_id}, requested before the run was reset, could not be cancelled; it runs out. "
                    f"{answer.refusal.sentence}",
                    job_id=job_id,
                )

    async def learn_and_cancel(self, reason: str) -> None:
        """Cancel those whose answer the earlier life never had: its history holds their requests, no row their ids."""
        if not self._outside.earlier.life.lives or not workflow.patched("unanswered-jobs-of-earlier-lives-cancelled"):
            return
        if self._has_cancelled_unanswered:
            return
        self._has_cancelled_unanswered = True
        found = await self._learned()
        for number, sentence in enumerate(found.unread):
            self._record.record_exception(f"earlier_run:{number}", ExceptionCode.UNDO_UNFINISHED, sentence)
        await self._attempts.of_earlier_lives(self._not_known(found.jobs)).cancel_all(reason)

    def _not_known(self, found: list[RequestedJob]) -> list[RequestedJob]:
        """Of the jobs that earlier lives requested, those that this run's own say nothing of."""
        own = self._attempts.asked
        keys_sent = {job.key for job in own if not job.is_key_taken}
        left, left_of_keys_sent = not_known(found, own), [job for job in found if job.key not in keys_sent]
        return left if left != left_of_keys_sent and workflow.patched(UNDER_KEYS_SENT) else left_of_keys_sent

    async def charges_sent(self) -> int:
        """How many charges the earlier lives sent: a ledger that lags does not show them yet."""
        if not self._outside.earlier.life.lives or not workflow.patched("charges-of-earlier-lives-looked-for"):
            return 0
        return (await self._learned()).charges

    async def price(self) -> int | None:
        """The price in points that the earlier lives requested for delivered work; None where they requested none."""
        return (await self._learned()).price if self._outside.earlier.life.lives else None

    async def _learned(self) -> EarlierJobs:
        """What the histories of earlier lives show. They are read once."""
        if self._earlier is None:
            summary = f"{self._outside.labels.cancel_job}: find those of runs before the reset"
            self._earlier = await self._outside.visible(
                EarlierRunActivities.unanswered_jobs, self._look.order(), summary=summary, attempt_timeout=READ_WITHIN
            )
        return self._earlier

    async def delivery(self) -> JobUpdate | None:
        """The delivery of any job of the task: the task was charged, so it gets the result."""
        own = self._own()
        for job_id in reversed([*sorted(own), *self._look.forgotten_jobs(own)]):
            call = JobCall(call_for=self._outside.call_for, job_id=job_id)
            answer: Answer[Any] | None = await self._outside.until_answered(self._routes.get, call, summary=POLL)
            update = None if answer is None or answer.reply is None else self._routes.update_from_state(answer.reply)
            if update is not None and update.succeeded:
                return update
        return None
