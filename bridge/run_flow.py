"""What an image job and a training have in common as workflows: their state on the wire, its callbacks, the cancel.

A cancel is obeyed at any time before the end and answered at once; what it still has to stop on a server is stopped
afterwards.
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

from bridge.calls import CANCEL_UPDATE, VIEW_QUERY
from bridge.orders import JobView
from bridge.placement import CANCELLED, Placement, RunRefused
from bridge.publishing import Publishing
from comfyui_temporal.contracts.comfyui import JobRequest, TrainingRequest
from comfyui_temporal.contracts.errors import JOB_CODES, ErrorDetails, FailureCode
from comfyui_temporal.contracts.tasks import PRIORITY_KEYS, TaskStatus

STORE_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
_STATUS: Final = SearchAttributeKey.for_keyword("TaskStatus")
_STAGE: Final = SearchAttributeKey.for_keyword("TaskStage")


class RunFlow:
    """State and messages of one run. A subclass opens it in its `@workflow.init` and says what its fields mean."""

    def _open(self, run_id: str, request: JobRequest | TrainingRequest, pool: str, fields: dict[str, Any]) -> None:
        self._request = request
        self._priority = Priority(priority_key=PRIORITY_KEYS[request.priority], fairness_key=request.tenant_id)
        self._publishing = Publishing(run_id, request.callback_url, self._priority)
        self._placement = Placement(run_id, pool, self._priority)
        self._is_cancelled = False
        self._fields = fields
        self._progress_span = (0.0, 100.0)

    # What a subclass says

    @property
    @abstractmethod
    def _is_over(self) -> bool:
        """Whether the run has ended, however."""

    @abstractmethod
    def _task_status(self) -> TaskStatus:
        """What the search attribute `TaskStatus` says."""

    @abstractmethod
    def _stage(self) -> str:
        """What the search attribute `TaskStage` says."""

    @abstractmethod
    def _end_fields(self) -> dict[str, Any]:
        """What else a failure or a cancel changes."""

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
        self._end_cancelled()
        return self.view()

    # The run

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work until it ends or is cancelled; its run on a server is over afterwards."""
        doing = asyncio.ensure_future(self._named(work))
        try:
            await workflow.wait_condition(lambda: doing.done() or self._is_cancelled)
        except asyncio.CancelledError:
            # A cancel by Temporal's own means is the run's cancel.
            self._end_cancelled()
        if not doing.done():
            doing.cancel()
        await self._settled(doing)

    async def _all_published(self) -> None:
        try:
            await self._publishing.all_published()
        except asyncio.CancelledError:
            workflow.logger.info("cancelled while callbacks were out; the run is over all the same")

    async def _named(self, work: Coroutine[Any, Any, None]) -> None:
        """Every failure of the work becomes how the run ends."""
        try:
            await work
        except RunRefused as refused:
            self._failed(refused.details)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self._failed(details_of(error))

    async def _settled(self, doing: asyncio.Future[None]) -> None:
        while not doing.done():
            try:
                await asyncio.shield(doing)
            except asyncio.CancelledError:
                # Ours or a second one: what is to be stopped on a server is stopped first.
                continue
            except FailureError:
                break
        error = None if doing.cancelled() else doing.exception()
        if error is not None and not self._is_over:
            raise error

    def _end_cancelled(self) -> None:
        if not self._is_over:
            self._is_cancelled = True
            self._failed(CANCELLED)

    def _failed(self, details: ErrorDetails) -> None:
        if self._is_over:
            return
        self._fields |= {
            "error_details": details.model_dump(mode="json", exclude_none=True),
            "next_eta": None,
            **self._end_fields(),
        }
        self._change(details.code)

    def _run_ended(self) -> None:
        """A run on a server is over: nothing less than its last tick is shown from here."""
        if self._is_over:
            self._publishing.tick_base = None
            return
        low, high = self._progress_span
        reached = low + (high - low) * self._placement.percent / 100
        self._fields["stage_progress"] = max(round(reached, 2), self._fields["stage_progress"])
        self._publishing.run_ended()

    def _change(self, what: str, **more: Any) -> None:
        """Tell the state as it is now; `more` only in the callback."""
        self._publishing.publish({**self._fields, "task_id": self._request.task_id, **more}, what)
        status = self._task_status()
        workflow.upsert_search_attributes([_STATUS.value_set(status.value), _STAGE.value_set(self._stage())])
        server = f" on {self._placement.server}" if self._placement.server else ""
        workflow.set_current_details(f"**{what}**{server}, run {self._placement.run}")

    def _ended_status(self) -> TaskStatus | None:
        """Failed or cancelled, or None."""
        error = self._fields["error_details"]
        if error is None:
            return None
        return TaskStatus.CANCELLED if error["code"] == FailureCode.CANCELLED else TaskStatus.FAILED


def instant(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def minutes(span: timedelta, *, at_least: float = 0.0001) -> float:
    return max(round(span.total_seconds() / 60, 4), at_least)


def details_of(error: ActivityError) -> ErrorDetails:
    """An activity that failed for good: its code where it is one of contract §1's, else `internal`."""
    cause = error.cause
    if isinstance(cause, ApplicationError):
        known = cause.type in set(JOB_CODES)
        code = cause.type if known and cause.type else FailureCode.INTERNAL.value
        return ErrorDetails(code=code, message=cause.message, retryable=not known)
    return ErrorDetails(code=FailureCode.INTERNAL.value, message=f"{cause or error}", retryable=True)
