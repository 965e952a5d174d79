"""Runs that are over while their task's row is open: which they are, and what they left."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Final

from temporalio import activity
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowHistoryEventFilterType,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.left_behind import HistoryReading, left_by_row
from activities.running_call import to_its_end
from contracts.errors import FailureCode
from contracts.give_back import GiveBackOrder, LeftBehind
from contracts.reconcile import ClosedRun, OpenTasksLook, OpenTasksSeen
from contracts.task_store import TaskRow
from store import StoreUnavailable, TaskStore

VANISHED: Final = "vanished"
PAGE_SIZE: Final = 100
LOOKS_AT_ONCE: Final = 10
RPC_TIMEOUT: Final = timedelta(seconds=5)


def is_namespace_missing(error: RPCError) -> bool:
    """NOT_FOUND of the namespace, not of a run: we are set up wrong, and no run has vanished."""
    return any("NamespaceNotFound" in detail.type_url for detail in error.grpc_status.details)


def _first_run_id(run: WorkflowExecutionDescription) -> str:
    return run.raw_description.workflow_execution_info.first_run_id


def _how(run: WorkflowExecutionDescription) -> str:
    return run.status.name.lower() if run.status else VANISHED


class ClosedRunActivities:
    """Looks at runs that are over. Each heartbeats: a killed worker's look is another's within seconds."""

    def __init__(self, client: Client, store: TaskStore) -> None:
        self._client = client
        self._store = store

    @activity.defn
    async def left_behind(self, order: GiveBackOrder) -> LeftBehind:
        """What the task's last run left. Raises ApplicationError.

        `input_invalid`, not retried: there is no such task. `task_conflict`, not retried: its run is open.
        """
        return await to_its_end(self._left_behind(order))

    @activity.defn
    async def closed_among_open(self, look: OpenTasksLook) -> OpenTasksSeen:
        """Of one page of open rows, those whose run is over. Raises ApplicationError `internal`, retried."""
        return await to_its_end(self._closed_among_open(look))

    @activity.defn
    async def still_closed(self, found: list[ClosedRun]) -> list[ClosedRun]:
        """Those whose row is open still, and whose run is over as it was. Raises as `closed_among_open`."""
        return await to_its_end(self._still_closed(found))

    async def _left_behind(self, order: GiveBackOrder) -> LeftBehind:
        row = await self._row(order.task_id)
        if row is None:
            raise ApplicationError(
                f"The task store has no task {order.task_id}.", type=FailureCode.INPUT_INVALID, non_retryable=True
            )
        run = await self._own_run(row)
        if run is None:
            return left_by_row(row, VANISHED)
        if run.status is WorkflowExecutionStatus.RUNNING:
            raise ApplicationError(
                f"Task {order.task_id} still runs: cancel it, it gives everything back itself.",
                type=FailureCode.TASK_CONFLICT,
                non_retryable=True,
            )
        return await self._by_history(row, _how(run), self._handle(row, run.run_id))

    async def _closed_among_open(self, look: OpenTasksLook) -> OpenTasksSeen:
        try:
            page = await self._store.open_tasks(
                quiet_for=timedelta(seconds=look.quiet_seconds), cursor=look.cursor, limit=PAGE_SIZE
            )
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None
        return OpenTasksSeen(closed=await self._closed_of(page.tasks), cursor=page.cursor)

    async def _still_closed(self, found: list[ClosedRun]) -> list[ClosedRun]:
        rows = [row for closed in found if (row := await self._row(closed.task_id)) and row.ended_at is None]
        return [closed for closed in await self._closed_of(rows) if closed in found]

    async def _row(self, task_id: str) -> TaskRow | None:
        try:
            return await self._store.task(task_id)
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None

    async def _closed_of(self, rows: list[TaskRow]) -> list[ClosedRun]:
        side_by_side = asyncio.Semaphore(LOOKS_AT_ONCE)

        async def look(row: TaskRow) -> ClosedRun | None:
            async with side_by_side:
                run = await self._own_run(row)
            if run is None:
                return ClosedRun(task_id=row.task_id, workflow_id=row.workflow_id, how=VANISHED)
            if run.status is WorkflowExecutionStatus.RUNNING:
                return None
            return ClosedRun(task_id=row.task_id, workflow_id=row.workflow_id, run_id=run.run_id, how=_how(run))

        found = await asyncio.gather(*(look(row) for row in rows))
        return [closed for closed in found if closed is not None]

    async def _own_run(self, row: TaskRow) -> WorkflowExecutionDescription | None:
        """The last run of the chain that claimed the task; None where Temporal knows none.

        Not simply the newest under its id: a second start under it ends `task_exists` and has begun nothing.
        """
        newest = await self._described(row, None)
        if newest is None or _first_run_id(newest) == row.first_execution_run_id:
            return newest
        run = await self._described(row, row.first_execution_run_id)
        while run is not None and run.status is WorkflowExecutionStatus.CONTINUED_AS_NEW:
            run = await self._described(row, await self._continued_as(row, run.run_id))
        return run

    async def _described(self, row: TaskRow, run_id: str | None) -> WorkflowExecutionDescription | None:
        try:
            return await self._handle(row, run_id).describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND or is_namespace_missing(error):
                raise
            return None

    async def _continued_as(self, row: TaskRow, run_id: str) -> str:
        last = WorkflowHistoryEventFilterType.CLOSE_EVENT
        async for event in self._handle(row, run_id).fetch_history_events(event_filter_type=last):
            return event.workflow_execution_continued_as_new_event_attributes.new_execution_run_id
        raise AssertionError(f"run {run_id} was continued as new and has no last event")

    def _handle(self, row: TaskRow, run_id: str | None) -> WorkflowHandle[Any, Any]:
        return self._client.get_workflow_handle(row.workflow_id, run_id=run_id)

    async def _by_history(self, row: TaskRow, how: str, last_run: WorkflowHandle[Any, Any]) -> LeftBehind:
        reading = HistoryReading(LeftBehind(row=row, how=how), self._client.data_converter)
        async for event in last_run.fetch_history_events():
            await reading.take(event)
        return reading.left
