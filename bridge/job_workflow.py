"""An image job as a workflow: queued → a server takes it → its graph runs → results are stored → delivered.

Every state is told by a callback of its own (telling.py); a cancel is obeyed at any time before delivery, and answered
at once: what it still has to stop on a server is stopped afterwards.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy, SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

from bridge.calls import (
    CANCEL_UPDATE,
    CLEAR_UP,
    FETCH_CONTROLS,
    JOB_WORKFLOW,
    RESOLUTION_MEMO,
    SECONDS_MEMO,
    SERVER_MEMO,
    SIGN_RESULTS,
    VIEW_QUERY,
)
from bridge.orders import (
    ControlFile,
    ControlsOrder,
    GraphRun,
    ImageJob,
    JobView,
    ServerTaken,
    StoredResult,
)
from bridge.placing import CANCELLED, Placing, RunRefused
from bridge.telling import Telling
from contracts.comfyui import JobStatus
from contracts.errors import JOB_CODES, ErrorDetails, FailureCode
from contracts.tasks import PRIORITY_KEYS, TaskStatus

_STATUS: Final = SearchAttributeKey.for_keyword("TaskStatus")
_STAGE: Final = SearchAttributeKey.for_keyword("TaskStage")
_STORE_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))


@workflow.defn(name=JOB_WORKFLOW)
class ComfyUIJobWorkflow:
    """One image job (contract §2)."""

    @workflow.init
    def __init__(self, job: ImageJob) -> None:
        self._job = job
        priority = Priority(priority_key=PRIORITY_KEYS[job.priority], fairness_key=job.request.tenant_id)
        self._priority = priority
        self._telling = Telling(job.job_id, job.request.callback_url, priority)
        self._placing = Placing(job.job_id, job.graph.pool, priority)
        self._submitted = workflow.now()
        self._is_cancelled = False
        self._fields: dict[str, Any] = {
            "job_id": job.job_id,
            "job_status": JobStatus.QUEUED.value,
            "stage_progress": 0.0,
            "next_eta": None,
            "estimated_time": job.estimated_time,
            "gpu_slots": job.gpu_slots,
            "queue_position": job.queue_position,
            "result_urls": [],
            "error_details": None,
            "actual_cost": None,
        }

    @workflow.run
    async def run(self, job: ImageJob) -> JobView:
        """The job's last state."""
        self._change("queued")
        work = asyncio.ensure_future(self._delivered())
        try:
            await workflow.wait_condition(lambda: work.done() or self._is_cancelled)
        except asyncio.CancelledError:
            # A cancel by Temporal's own means is the job's cancel.
            self._end_cancelled()
        if not work.done():
            work.cancel()
        await self._settled(work)
        try:
            await self._told()
        except asyncio.CancelledError:
            workflow.logger.info("cancelled while callbacks were out; the job is over all the same")
        return self.view()

    @workflow.query(name=VIEW_QUERY)
    def view(self) -> JobView:
        return JobView(
            tenant_id=self._job.request.tenant_id,
            task_id=self._job.request.task_id,
            fields=self._fields,
            sequence=self._telling.sequence,
            tick_base=self._telling.tick_base,
        )

    @workflow.update(name=CANCEL_UPDATE)
    def cancel(self) -> JobView:
        """End the job as cancelled, unless it is over. Idempotent."""
        self._end_cancelled()
        return self.view()

    @property
    def _is_over(self) -> bool:
        return self._fields["error_details"] is not None or self._fields["job_status"] == JobStatus.DELIVERY

    def _end_cancelled(self) -> None:
        if not self._is_over:
            self._is_cancelled = True
            self._failed(CANCELLED)

    async def _settled(self, work: asyncio.Future[None]) -> None:
        """Until the work has ended, its run on a server stopped; a second cancel changes nothing."""
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                continue
            except FailureError:
                break
        error = None if work.cancelled() else work.exception()
        if error is not None and not self._is_over:
            raise error

    async def _delivered(self) -> None:
        try:
            controls = await self._controls()
            outcome, stored = await self._placing.ran(
                lambda taken: self._graph_run(taken, controls),
                ended=self._telling.run_ended,
                is_wanted=lambda: not self._is_over,
            )
            urls = await self._signed(stored)
        except RunRefused as refused:
            self._failed(refused.details)
            return
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self._failed(_details_of(error))
            return
        if not self._is_over:
            self._deliver(urls, outcome.seconds)

    async def _controls(self) -> list[ControlFile]:
        request = self._job.request
        if not request.controls:
            return []
        fetched: list[ControlFile] = await workflow.execute_activity(
            FETCH_CONTROLS,
            ControlsOrder(job_id=self._job.job_id, tenant_id=request.tenant_id, controls=request.controls),
            result_type=list[ControlFile],
            start_to_close_timeout=timedelta(minutes=2),
            schedule_to_close_timeout=timedelta(minutes=15),
            retry_policy=_STORE_RETRY,
            priority=self._priority,
            summary="fetch control images",
        )
        return fetched

    def _graph_run(self, taken: ServerTaken, controls: list[ControlFile]) -> GraphRun:
        """What the taken server runs; from here the job is being processed."""
        if not self._is_over:
            now = workflow.now()
            span = timedelta(seconds=self._job.graph.expected_seconds)
            self._fields["job_status"] = JobStatus.PROCESSING.value
            self._fields["stage_progress"] = float(self._placing.percent)
            self._fields["next_eta"] = _instant(now + span)
            self._fields["estimated_time"] = _minutes(now + span - self._submitted)
            self._fields["queue_position"] = None
            self._change("processing")
        workflow.upsert_memo({SERVER_MEMO: taken.server})
        request = self._job.request
        return GraphRun(
            job_id=self._job.job_id,
            tenant_id=request.tenant_id,
            task_id=request.task_id,
            run=self._placing.run,
            prompt_id=self._placing.prompt_id(),
            graph=self._job.graph,
            controls=controls,
            callback_url=request.callback_url,
            sequence_base=self._telling.run_begins(),
            first_percent=self._placing.percent,
            tick_fields={**self._fields, "task_id": request.task_id},
        )

    async def _signed(self, stored: list[StoredResult]) -> list[str]:
        urls: list[str] = await workflow.execute_activity(
            SIGN_RESULTS,
            stored,
            result_type=list[str],
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=_STORE_RETRY,
            priority=self._priority,
            summary="sign result addresses",
        )
        return urls

    def _deliver(self, urls: list[str], seconds: float) -> None:
        self._fields |= {
            "job_status": JobStatus.DELIVERY.value,
            "stage_progress": 100.0,
            "next_eta": None,
            "estimated_time": _minutes(workflow.now() - self._submitted),
            "queue_position": None,
            "result_urls": urls,
            "actual_cost": self._job.estimated_cost,
        }
        workflow.upsert_memo({SECONDS_MEMO: seconds, RESOLUTION_MEMO: self._job.request.resolution.value})
        self._change("delivery")

    def _failed(self, details: ErrorDetails) -> None:
        if self._is_over:
            return
        self._fields |= {
            "error_details": details.model_dump(mode="json", exclude_none=True),
            "next_eta": None,
            "queue_position": None,
        }
        self._change(details.code)

    def _change(self, what: str) -> None:
        self._telling.tell({**self._fields, "task_id": self._job.request.task_id}, what)
        status = self._task_status()
        workflow.upsert_search_attributes(
            [_STATUS.value_set(status.value), _STAGE.value_set(str(self._fields["job_status"]))]
        )
        server = f" on {self._placing.server}" if self._placing.server else ""
        workflow.set_current_details(f"**{what}**{server}, run {self._placing.run}")

    def _task_status(self) -> TaskStatus:
        error = self._fields["error_details"]
        if error is not None:
            return TaskStatus.CANCELLED if error["code"] == FailureCode.CANCELLED else TaskStatus.FAILED
        by_stage = {JobStatus.QUEUED: TaskStatus.QUEUED, JobStatus.PROCESSING: TaskStatus.RUNNING}
        return by_stage.get(JobStatus(self._fields["job_status"]), TaskStatus.COMPLETED)

    async def _told(self) -> None:
        if self._job.request.controls:
            await workflow.execute_activity(
                CLEAR_UP,
                self._job.job_id,
                start_to_close_timeout=timedelta(seconds=60),
                retry_policy=_STORE_RETRY,
                summary="delete control images",
            )
        await self._telling.all_told()


def _instant(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def _minutes(span: timedelta) -> float:
    return max(round(span.total_seconds() / 60, 4), 0.0001)


def _details_of(error: ActivityError) -> ErrorDetails:
    """An activity that failed for good: its code where it is one of contract §1's, else `internal`."""
    cause = error.cause
    if isinstance(cause, ApplicationError):
        known = cause.type in set(JOB_CODES)
        code = cause.type if known and cause.type else FailureCode.INTERNAL.value
        return ErrorDetails(code=code, message=cause.message, retryable=not known)
    return ErrorDetails(code=FailureCode.INTERNAL.value, message=f"{cause or error}", retryable=True)
