"""What a GPU worker publishes of a run while it is on the server: whole percents, and that it takes longer.

Percents go straight to the task, as ticks. A longer run goes through the job's workflow (`RunningJobs`), so that a poll
shows it as well; the workflow then gives out new numbers, and the ticks after it count from there.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import (
    Client,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.service import RPCError

from bridge.callbacks import TICK_SECONDS, CallbackSender
from bridge.calls import ESTIMATE_UPDATE, workflow_of
from bridge.orders import Callback, GraphRun, JobView, RunEstimate
from bridge.prompt_run import PromptRun
from bridge.run_pace import RunPace
from comfyui_temporal.runs import RunStatus

TICK_EVERY_SECONDS: Final = 1.0
PACE_SECONDS: Final = 1.0
WAIT_TOLD_SECONDS: Final = 30.0
"""A run that has not begun by then gets a longer estimate; again each time the wait has doubled."""
RPC_TIMEOUT: Final = timedelta(seconds=5)

log = structlog.get_logger(__name__)


class RunningJobs:
    """The workflows of the jobs that run on this server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def revise(self, job_id: str, estimate: RunEstimate) -> JobView | None:
        """Tell the job how long its run still takes. Returns its state, or None if it does not answer now."""
        handle = self._client.get_workflow_handle(workflow_of(job_id))
        try:
            view: JobView = await handle.execute_update(
                ESTIMATE_UPDATE, estimate, result_type=JobView, rpc_timeout=RPC_TIMEOUT
            )
            return view
        except (RPCError, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            log.info("estimate_not_told", job_id=job_id, reason=type(error).__name__)
            return None

    async def is_closed(self, workflow_id: str, run_id: str) -> bool:
        """Whether this run of a workflow is known to be closed: it was terminated, or reset."""
        execution = WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
        request = DescribeWorkflowExecutionRequest(namespace=self._client.namespace, execution=execution)
        try:
            found = await self._client.workflow_service.describe_workflow_execution(request, timeout=RPC_TIMEOUT)
        except RPCError as error:
            log.info("job_not_described", workflow_id=workflow_id, reason=error.status.name.lower())
            return False
        return RunStatus.of(found.workflow_execution_info.status).is_over


class Ticks:
    """Publishes one run's percents, best effort: one request at a time, at most one a second."""

    def __init__(self, run: GraphRun, sender: CallbackSender | None, jobs: RunningJobs | None) -> None:
        self._run = run
        self._sender = sender
        self._jobs = jobs
        self._pace = RunPace(run.graph.expected_seconds)
        self._newest = 0
        self._task: asyncio.Task[None] | None = None

    def reached(self, percent: int) -> None:
        self._newest = percent
        if self._sender is not None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._publish(self._sender))

    @asynccontextmanager
    async def following(self, prompt: PromptRun, *, is_repeated: bool) -> AsyncIterator[None]:
        """Watch the pace of the run while the body runs. `is_repeated`: an earlier attempt may have told a new pace."""
        watching = asyncio.create_task(self._watch(prompt, is_repeated=is_repeated))
        try:
            yield
        finally:
            watching.cancel()
            publishing = [watching] if self._task is None else [watching, self._task]
            if self._task is not None:
                self._task.cancel()
            await asyncio.gather(*publishing, return_exceptions=True)

    async def _watch(self, prompt: PromptRun, *, is_repeated: bool) -> None:
        """Before it runs its files are sent, or another client's prompt is in front: that time counts for its task.

        It may well take as long again.
        """
        is_due = is_repeated
        began, tell_at = time.monotonic(), WAIT_TOLD_SECONDS
        while True:
            ran, percent = prompt.ran_seconds, prompt.percent
            waited = 0.0 if ran else time.monotonic() - began
            if waited >= tell_at:
                is_due, tell_at = True, 2 * tell_at
            if ran and self._pace.revised(ran, percent, is_heard=prompt.is_heard) is not None:
                is_due = True
            if is_due:
                is_due = not await self._tell(waited + max(0.0, self._pace.expected_seconds - ran), percent)
            await asyncio.sleep(PACE_SECONDS)

    async def _tell(self, left_seconds: float, percent: int) -> bool:
        """Returns whether the job knows it now."""
        if self._jobs is None:
            return True
        view = await self._jobs.revise(self._run.job_id, RunEstimate(left_seconds=left_seconds, percent=percent))
        if view is None or view.tick_base is None:
            return view is not None
        fields = {**view.fields, "task_id": view.task_id}
        self._run = self._run.model_copy(update={"sequence_base": view.tick_base, "tick_fields": fields})
        return True

    async def _publish(self, sender: CallbackSender) -> None:
        published = 0
        while self._newest > published:
            published = self._newest
            await sender.send(tick(self._run, published), seconds=TICK_SECONDS)
            await asyncio.sleep(TICK_EVERY_SECONDS)


def tick(run: GraphRun, percent: int) -> Callback:
    """A tick's callback. The same percent of the same numbers always has the same sequence and fields."""
    sequence = run.sequence_base + percent
    body = {
        **run.tick_fields,
        "stage_progress": scaled(percent, run.progress_from, run.progress_to),
        "sequence": sequence,
        "occurred_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    return Callback(url=run.callback_url, webhook_id=f"msg_{run.job_id}_{sequence}", body=json.dumps(body))


def scaled(percent: float, low: float, high: float) -> float:
    """A run's own percent, scaled to the part of the stage that the run covers."""
    return round(low + (high - low) * percent / 100, 2)
