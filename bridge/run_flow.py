"""What the workflows of image jobs and trainings share: the state on the wire, its callbacks, and the cancel.

A cancel is possible until the end and is answered at once. A prompt that still runs on a server is stopped afterwards.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy, SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

from bridge.calls import CANCEL_UPDATE, ESTIMATE_UPDATE, VIEW_QUERY
from bridge.orders import JobView, RenderedGraph, RunEstimate
from bridge.placement import CANCELLED, Placement, RunRefused
from bridge.publishing import Publishing
from bridge.task_files import shown
from comfyui_temporal.contracts.comfyui import JobRequest, TrainingRequest
from comfyui_temporal.contracts.errors import JOB_CODES, ErrorDetails, FailureCode
from comfyui_temporal.contracts.tasks import PRIORITY_KEYS, TaskStatus

STORE_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
_STATUS: Final = SearchAttributeKey.for_keyword("TaskStatus")
_STAGE: Final = SearchAttributeKey.for_keyword("TaskStage")


class RunFlow:
    """State and messages of one run. A subclass calls `_open` in its `@workflow.init` and defines its own fields."""

    def _open(
        self,
        run_id: str,
        request: JobRequest | TrainingRequest,
        graph: RenderedGraph,
        fields: dict[str, Any],
        *,
        is_for_some: bool,
    ) -> None:
        self._run_id = run_id
        self._request = request
        self._priority = Priority(priority_key=PRIORITY_KEYS[request.priority], fairness_key=request.tenant_id)
        self._publishing = Publishing(run_id, request.callback_url, self._priority)
        self._placement = Placement(
            *(run_id, graph.pool, graph.template_id, self._priority),
            is_for_some=is_for_some,
            on_wait=self._waits_again,
        )
        self._is_cancelled = False
        self._fields = fields
        self._progress_span = (0.0, 100.0)
        self._run_ends = workflow.now()

    # Defined by the subclass

    @property
    @abstractmethod
    def _is_over(self) -> bool:
        """Whether the run has ended, in any way."""

    @abstractmethod
    def _task_status(self) -> TaskStatus:
        """The value of the search attribute `TaskStatus`."""

    @abstractmethod
    def _stage(self) -> str:
        """The value of the search attribute `TaskStage`."""

    @abstractmethod
    def _end_fields(self) -> dict[str, Any]:
        """Fields that a failure or a cancel changes as well."""

    @abstractmethod
    def _expected_minutes(self, left_of_run: timedelta) -> float:
        """`estimated_time`, if the present run on a server still takes this long."""

    # Messages

    @workflow.query(name=VIEW_QUERY)
    def view(self) -> JobView:
        return JobView(
            tenant_id=self._request.tenant_id,
            task_id=self._request.task_id,
            pool=self._placement.pool,
            priority=self._request.priority,
            fields=self._fields,
            sequence=self._publishing.sequence,
            tick_base=self._publishing.tick_base,
            progress_from=self._progress_span[0],
            progress_to=self._progress_span[1],
        )

    @workflow.update(name=CANCEL_UPDATE)
    def cancel(self) -> JobView:
        """End the run as cancelled, unless it is over. Idempotent."""
        self._cancel()
        return self.view()

    @workflow.update(name=ESTIMATE_UPDATE)
    def estimate(self, estimate: RunEstimate) -> JobView:
        """The run on a server takes longer than was expected. A shorter time changes nothing."""
        if self._is_over or self._publishing.tick_base is None:
            return self.view()
        left = timedelta(seconds=estimate.left_seconds)
        self._run_ends = workflow.now() + left
        if self._expected_minutes(left) > self._fields["estimated_time"]:
            low, high = self._progress_span
            reached = round(low + (high - low) * estimate.percent / 100, 2)
            self._fields |= {
                "stage_progress": max(reached, self._fields["stage_progress"]),
                "estimated_time": self._expected_minutes(left),
                "next_eta": instant(workflow.now() + left),
            }
            self._change("takes longer")
            self._publishing.run_begins()
        return self.view()

    # Running

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work until it ends or is cancelled. Afterwards nothing of it runs on a server."""
        working = asyncio.ensure_future(self._with_typed_failures(work))
        try:
            await workflow.wait_condition(lambda: working.done() or self._is_cancelled)
        except asyncio.CancelledError:
            # A cancel through Temporal itself is treated as the run's cancel.
            self._cancel()
        if not working.done():
            working.cancel()
        await self._wait_until_done(working)

    async def _after_the_end(self, step: Coroutine[Any, Any, None]) -> None:
        """Clean up or publish. A cancel through Temporal cuts the step short; the run ends as it did."""
        try:
            await step
        except (asyncio.CancelledError, ActivityError) as error:
            if not is_cancelled_exception(error):
                raise
            workflow.logger.info("cancelled after its end; the run ends as it did")

    async def _with_typed_failures(self, work: Coroutine[Any, Any, None]) -> None:
        """End the run with the failure of the work."""
        try:
            await work
        except RunRefused as refused:
            self._fail(refused.details)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self._fail(details_of(error))

    async def _wait_until_done(self, working: asyncio.Future[None]) -> None:
        while not working.done():
            try:
                await asyncio.shield(working)
            except asyncio.CancelledError:
                # Our own cancel or a second one: first wait until the prompt is stopped on its server.
                continue
            except FailureError:
                break
        error = None if working.cancelled() else working.exception()
        if error is not None and not self._is_over:
            raise error

    def _cancel(self) -> None:
        if not self._is_over:
            self._is_cancelled = True
            self._fail(CANCELLED)

    def _fail(self, details: ErrorDetails) -> None:
        if self._is_over:
            return
        self._fields |= {
            "error_details": shown(details, self._run_id).model_dump(mode="json", exclude_none=True),
            "next_eta": None,
            **self._end_fields(),
        }
        self._change(details.code)

    def _run_ended(self) -> None:
        """A run on a server is over. From here on, progress is at least that of its last tick."""
        if self._is_over:
            self._publishing.tick_base = None
            return
        low, high = self._progress_span
        reached = low + (high - low) * self._placement.percent / 100
        self._fields["stage_progress"] = max(round(reached, 2), self._fields["stage_progress"])
        self._publishing.run_ended()

    def _waits_again(self, waited: timedelta, what: str) -> None:
        """A job that was at work has waited so long for a server or for storage: it may well wait for as long again."""
        if not self._is_over:
            self._fields |= {
                "estimated_time": max(self._expected_minutes(waited), self._fields["estimated_time"]),
                "next_eta": instant(workflow.now() + waited),
            }
            self._change(what)

    def _change(self, what: str, **more: Any) -> None:
        """Publish the present state. `more` is only in the callback."""
        self._publishing.publish({**self._fields, "task_id": self._request.task_id, **more}, what)
        status = self._task_status()
        workflow.upsert_search_attributes([_STATUS.value_set(status.value), _STAGE.value_set(self._stage())])
        server = f" on {self._placement.server}" if self._placement.server else ""
        workflow.set_current_details(f"**{what}**{server}, run {self._placement.run}")

    def _ended_status(self) -> TaskStatus | None:
        """FAILED or CANCELLED; None without an error."""
        error = self._fields["error_details"]
        if error is None:
            return None
        return TaskStatus.CANCELLED if error["code"] == FailureCode.CANCELLED else TaskStatus.FAILED


def instant(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def minutes(span: timedelta, *, at_least: float = 0.0001) -> float:
    return max(round(span.total_seconds() / 60, 4), at_least)


def details_of(error: ActivityError) -> ErrorDetails:
    """The error of an activity that failed for good. Its code if contract §1 has it, otherwise `internal`."""
    cause = error.cause
    if isinstance(cause, ApplicationError):
        known = cause.type in set(JOB_CODES)
        code = cause.type if known and cause.type else FailureCode.INTERNAL.value
        return ErrorDetails(code=code, message=cause.message, retryable=not known)
    return ErrorDetails(code=FailureCode.INTERNAL.value, message=f"{cause or error}", retryable=True)
