"""An image job as a workflow: queued → taken by a server → graph runs → results stored → delivered."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.workflow import ActivityCancellationType

from bridge.calls import (
    CLEAR_UP,
    FETCH_CONTROLS,
    FETCH_MODELS,
    JOB_WORKFLOW,
    LEAST_MINUTES,
    MANIFEST_MEMO,
    MOVE_UPDATE,
    RESOLUTION_MEMO,
    SECONDS_MEMO,
    SERVER_MEMO,
    SIGN_RESULTS,
)
from bridge.orders import (
    ControlFile,
    ControlsOrder,
    GraphRun,
    ImageJob,
    JobView,
    ModelsOrder,
    ServerTaken,
    StoredResult,
)
from bridge.run_flow import STORE_RETRY, RunFlow, instant, minutes
from comfyui_temporal.contracts.comfyui import JobStatus
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.tasks import TaskStatus

IMAGES_WITHIN: Final = timedelta(minutes=15)
LARGE_FILES_WITHIN: Final = timedelta(hours=1)
FETCH_TRY: Final = timedelta(minutes=30)
FETCH_SILENCE: Final = timedelta(minutes=3)
"""A model's host may lead on three times, and each may take a minute to answer."""


@workflow.defn(name=JOB_WORKFLOW)
class ComfyUIJobWorkflow(RunFlow):
    """One image job (contract §2)."""

    @workflow.init
    def __init__(self, job: ImageJob) -> None:
        self._job = job
        self._submitted = workflow.now()
        self._run_began: datetime | None = None
        wait = timedelta(seconds=max(0.0, job.estimated_time * 60 - job.graph.expected_seconds))
        fields: dict[str, Any] = {
            "job_id": job.job_id,
            "job_status": JobStatus.QUEUED.value,
            "stage_progress": 0.0,
            "next_eta": instant(self._submitted + wait),
            "estimated_time": job.estimated_time,
            "gpu_slots": job.gpu_slots,
            "queue_position": job.queue_position,
            "result_urls": [],
            "error_details": None,
            "actual_cost": None,
        }
        self._open(job.job_id, job.request, job.graph, fields, is_for_some=job.is_for_some)

    @workflow.run
    async def run(self, job: ImageJob) -> JobView:
        """The job's last state."""
        self._change("queued")
        await self._finish(self._deliver_results())
        self._remember_cut_run()
        if job.request.controls or job.graph.files:
            await self._after_the_end(self._clean_up())
        await self._after_the_end(self._placement.clean_up(is_last=True))
        await self._after_the_end(self._publishing.all_published())
        return self.view()

    @workflow.update(name=MOVE_UPDATE)
    def move(self, position: int) -> JobView:
        """Set about how many jobs are ahead. A poll shows it; it is not published."""
        shown = self._fields["queue_position"]
        if shown is not None and 0 <= position < shown:
            self._fields["queue_position"] = position
            self._publishing.number()
        return self.view()

    @property
    def _is_over(self) -> bool:
        return self._fields["error_details"] is not None or self._fields["job_status"] == JobStatus.DELIVERY

    def _task_status(self) -> TaskStatus:
        by_stage = {JobStatus.QUEUED: TaskStatus.QUEUED, JobStatus.PROCESSING: TaskStatus.RUNNING}
        return self._ended_status() or by_stage.get(JobStatus(self._stage()), TaskStatus.COMPLETED)

    def _stage(self) -> str:
        return str(self._fields["job_status"])

    def _end_fields(self) -> dict[str, Any]:
        return {"queue_position": None}

    def _expected_minutes(self, left_of_run: timedelta) -> float:
        return minutes(workflow.now() + left_of_run - self._submitted, at_least=LEAST_MINUTES)

    async def _deliver_results(self) -> None:
        controls = await self._fetch_controls()
        await self._fetch_models()
        outcome, stored = await self._placement.run_graph(
            lambda taken: self._graph_run(taken, controls),
            on_end=self._run_ended,
            is_wanted=lambda: not self._is_over,
        )
        urls = await self._sign(stored)
        if not self._is_over:
            self._deliver(urls, outcome.seconds)

    async def _fetch_controls(self) -> list[ControlFile]:
        request, files = self._job.request, self._job.graph.files
        if not request.controls and not files:
            return []
        order = ControlsOrder(
            job_id=self._job.job_id, tenant_id=request.tenant_id, controls=request.controls, files=files
        )
        within = LARGE_FILES_WITHIN if files else IMAGES_WITHIN
        fetched: list[ControlFile] = await self._fetch(
            FETCH_CONTROLS, order, within=within, summary="fetch control images", result=list[ControlFile]
        )
        return fetched

    async def _fetch_models(self) -> None:
        loras = self._job.graph.loras
        if any(lora.address for lora in loras):
            order = ModelsOrder(job_id=self._job.job_id, loras=loras)
            await self._fetch(FETCH_MODELS, order, within=LARGE_FILES_WITHIN, summary="fetch models")

    async def _fetch(
        self, activity: str, order: OwnModel, *, within: timedelta, summary: str, result: type | None = None
    ) -> Any:
        """A cancelled fetch writes nothing once this has ended: what it wrote is deleted afterwards."""
        ends_first = workflow.patched("fetch-ends-before-clean-up")
        cancelled = ActivityCancellationType
        return await workflow.execute_activity(
            activity,
            order,
            result_type=result,
            start_to_close_timeout=min(within, FETCH_TRY),
            schedule_to_close_timeout=within,
            heartbeat_timeout=FETCH_SILENCE,
            cancellation_type=cancelled.WAIT_CANCELLATION_COMPLETED if ends_first else cancelled.TRY_CANCEL,
            retry_policy=STORE_RETRY,
            priority=self._priority,
            summary=summary,
        )

    def _graph_run(self, taken: ServerTaken, controls: list[ControlFile]) -> GraphRun:
        """The run for the taken server. The job is `processing` from here on."""
        if not self._is_over:
            self._run_began = workflow.now()
            now, span = workflow.now(), timedelta(seconds=self._job.graph.expected_seconds)
            self._fields |= {
                "job_status": JobStatus.PROCESSING.value,
                "stage_progress": float(self._placement.percent),
                "next_eta": instant(now + span),
                "estimated_time": self._expected_minutes(span),
                "queue_position": None,
            }
            self._change("processing")
        workflow.upsert_memo({SERVER_MEMO: taken.server})
        request = self._job.request
        return GraphRun(
            job_id=self._job.job_id,
            tenant_id=request.tenant_id,
            task_id=request.task_id,
            run=self._placement.run,
            prompt_id=self._placement.prompt_id(),
            graph=self._job.graph,
            controls=controls,
            callback_url=request.callback_url,
            sequence_base=self._publishing.run_begins(),
            first_percent=self._placement.percent,
            tick_fields={**self._fields, "task_id": request.task_id},
        )

    async def _sign(self, stored: list[StoredResult]) -> list[str]:
        urls: list[str] = await workflow.execute_activity(
            SIGN_RESULTS,
            stored,
            result_type=list[str],
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=STORE_RETRY,
            priority=self._priority,
            summary="sign result addresses",
        )
        return urls

    def _deliver(self, urls: list[str], seconds: float) -> None:
        self._fields |= {
            "job_status": JobStatus.DELIVERY.value,
            "stage_progress": 100.0,
            "next_eta": None,
            "estimated_time": minutes(workflow.now() - self._submitted),
            "queue_position": None,
            "result_urls": urls,
            "actual_cost": self._job.estimated_cost,
        }
        self._remember(seconds)
        self._change("delivery")

    def _remember(self, seconds: float) -> None:
        """Keep how long the run took, for the estimates of later jobs."""
        workflow.upsert_memo(
            {
                SECONDS_MEMO: seconds,
                RESOLUTION_MEMO: self._job.request.resolution.value,
                MANIFEST_MEMO: self._job.manifest_seconds,
            }
        )

    def _remember_cut_run(self) -> None:
        """A run that was cut is a measure too, if it would have taken longer than the manifest says.

        Otherwise a task that runs out of time on a slow server does so again and again.
        """
        if self._run_began is None or not self._is_cancelled or not workflow.patched("learn-from-cut-runs"):
            return
        seconds = (max(self._run_ends, workflow.now()) - self._run_began).total_seconds()
        if seconds > self._job.manifest_seconds > 0:
            self._remember(seconds)

    async def _clean_up(self) -> None:
        await workflow.execute_activity(
            CLEAR_UP,
            self._job.job_id,
            start_to_close_timeout=timedelta(seconds=60),
            retry_policy=STORE_RETRY,
            summary="delete control images",
        )
