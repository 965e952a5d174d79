"""Finds tasks whose row is open although their run has ended, and reads what such runs left behind.

Each row is read by itself. If its run cannot be read, that is recorded for `doctor` and tried again in the next pass.
It delays no other row (pitfall 42).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import structlog
from pydantic import ValidationError
from temporalio import activity
from temporalio.client import Client, WorkflowHandle, WorkflowHistoryEventFilterType
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities import metrics
from activities.earlier_runs import EarlierRuns
from activities.orphans import HistoryReader, NotReadHere, add_from_row, orphans_by_row
from activities.running_call import uninterrupted
from comfyui_temporal.contracts.errors import FailureCode, sentences_of
from comfyui_temporal.contracts.give_back import EarlierJobs, GiveBackOrder, Orphans
from comfyui_temporal.contracts.reconcile import ClosedRun, OpenTasksLook, OpenTasksSeen
from comfyui_temporal.contracts.requests import not_known
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.encryption_keys import EncryptionError
from comfyui_temporal.runs import RunSeen, RunStatus, describe_run, is_namespace_missing
from store import StoreFailure, StoreUnavailable, TaskStore, UnseenTask

VANISHED: Final = "vanished"
PAGE_SIZE: Final = 100
LOOKS_AT_ONCE: Final = 10
RPC_TIMEOUT: Final = timedelta(seconds=5)
ROW_SECONDS: Final = 8.0
PAGE_SECONDS: Final = 40.0
"""Limit for a whole page of rows. Below the activity's time, so a slow page still returns what it read."""

log = structlog.get_logger(__name__)


class RunUnreadable(Exception):
    """It cannot be decided whether a row's run has ended. The text is a sentence for operators."""


def _reason(error: Exception) -> str:
    if isinstance(error, RunUnreadable | NotReadHere | EncryptionError):
        return str(error)
    if isinstance(error, ValidationError):
        return f"Its row cannot be read: {'; '.join(sentences_of(error))}."
    if isinstance(error, TimeoutError):
        return "Temporal did not return the state of its run in time."
    if isinstance(error, RPCError):
        return f"Temporal does not return the state of its run: {error.status.name}: {error.message}"
    return f"The state of its run cannot be read ({type(error).__name__})."


@dataclass
class Looks:
    """The rows that were read, and those whose run has ended."""

    closed: list[ClosedRun] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    unseen: list[UnseenTask] = field(default_factory=list)


class ClosedRunActivities:
    """Reads runs that have ended. Each call heartbeats, so another worker soon repeats a killed call."""

    def __init__(self, client: Client, store: TaskStore) -> None:
        self._client = client
        self._store = store

    @activity.defn(name="left_behind")
    async def orphans(self, order: GiveBackOrder) -> Orphans:
        """What the task's last run left behind. Raises ApplicationError.

        `input_invalid`, not retried: the task does not exist. `task_conflict`, not retried: its run is open.
        `internal`, retried: row, run or history cannot be read now, or not by this worker; `doctor` shows the task.
        """
        earlier = EarlierRuns(self._client)
        return await uninterrupted(self._orphans_or_recorded(order, earlier), earlier.progress)

    @activity.defn
    async def closed_among_open(self, look: OpenTasksLook) -> OpenTasksSeen:
        """The rows of one page of open tasks whose run has ended. Raises ApplicationError `internal`, retried."""
        return await uninterrupted(self._closed_among_open(look))

    @activity.defn
    async def still_closed(self, found: list[ClosedRun]) -> list[ClosedRun]:
        """Those whose row is still open and whose run has still ended. Raises as `closed_among_open`."""
        return await uninterrupted(self._still_closed(found))

    async def _orphans_or_recorded(self, order: GiveBackOrder, earlier: EarlierRuns) -> Orphans:
        looks = Looks()
        try:
            orphans = await self._orphans(order, earlier)
        except ApplicationError:
            raise
        except Exception as error:
            looks.unseen.append(UnseenTask(task_id=order.task_id, reason=_reason(error)))
            await self._record(looks)
            raise ApplicationError(
                f"What task {order.task_id} left cannot be read: {_reason(error)}", type=FailureCode.INTERNAL.value
            ) from None
        looks.seen.append(order.task_id)
        await self._record(looks)
        return orphans

    async def _orphans(self, order: GiveBackOrder, earlier: EarlierRuns) -> Orphans:
        row = await self._row(order.task_id)
        if row is None:
            raise ApplicationError(
                f"The task store has no task {order.task_id}.", type=FailureCode.INPUT_INVALID, non_retryable=True
            )
        run = await self._own_run(row)
        if run is None:
            await self._claim(row)
            return orphans_by_row(row, VANISHED)
        if not run.status.is_over:
            raise ApplicationError(
                f"Task {order.task_id} is still open, its run is {run.status}: cancel it; it then gives everything "
                "back itself.",
                type=FailureCode.TASK_CONFLICT,
                non_retryable=True,
            )
        await self._claim(row)
        return await self._by_history(row, run.status.value, self._handle(row, run.run_id), earlier)

    async def _claim(self, row: TaskRow) -> None:
        """Claim the row: from now on no run of the task starts anything. Raises ApplicationError if a run was reset."""
        if row.ended_at is not None:
            return
        by = activity.info().workflow_run_id or ""
        if not await self._store.claim_give_back(row.task_id, by=by, found_run=row.run_id):
            raise ApplicationError(
                f"Task {row.task_id} was reset, or has ended, while it was read: nothing is given back.",
                type=FailureCode.TASK_CONFLICT,
                non_retryable=True,
            )

    @activity.defn(name="told_points")
    async def published_points(self, order: GiveBackOrder) -> int:
        """The sum of the points in the task's events. Raises ApplicationError `internal`, retried."""
        try:
            return await uninterrupted(self._store.published_points(order.task_id))
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None

    async def _closed_among_open(self, look: OpenTasksLook) -> OpenTasksSeen:
        try:
            page = await self._store.open_tasks(
                quiet_for=timedelta(seconds=look.quiet_seconds), cursor=look.cursor, limit=PAGE_SIZE
            )
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None
        looks = await self._look_at(page.tasks)
        for row in page.unreadable:
            looks.unseen.append(UnseenTask(task_id=row.task_id, reason=f"Its row cannot be read: {row.reason}."))
        await self._record(looks)
        if page.cursor is None:
            metrics.note_look()
        return OpenTasksSeen(closed=looks.closed, cursor=page.cursor, unseen=len(looks.unseen))

    async def _still_closed(self, found: list[ClosedRun]) -> list[ClosedRun]:
        rows: list[TaskRow] = []
        unreadable: list[UnseenTask] = []
        for closed in found:
            try:
                row = await self._row(closed.task_id)
            except ValidationError as error:
                unreadable.append(UnseenTask(task_id=closed.task_id, reason=_reason(error)))
                continue
            if row is not None and row.ended_at is None:
                rows.append(row)
        looks = await self._look_at(rows)
        looks.unseen += unreadable
        await self._record(looks)
        return [closed for closed in looks.closed if closed in found]

    async def _row(self, task_id: str) -> TaskRow | None:
        try:
            return await self._store.task(task_id)
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None

    async def _look_at(self, rows: Sequence[TaskRow]) -> Looks:
        """Read the runs in parallel. A failure affects its own row only. Raises RPCError without a namespace."""
        looks, side_by_side = Looks(), asyncio.Semaphore(LOOKS_AT_ONCE)
        until = asyncio.get_running_loop().time() + PAGE_SECONDS

        async def look(row: TaskRow) -> None:
            async with side_by_side:
                left = until - asyncio.get_running_loop().time()
                try:
                    closed = await asyncio.wait_for(self._closed_run_of(row), max(0.0, min(ROW_SECONDS, left)))
                except Exception as error:
                    if isinstance(error, RPCError) and is_namespace_missing(error):
                        raise
                    looks.unseen.append(UnseenTask(task_id=row.task_id, reason=_reason(error)))
                    return
            looks.seen.append(row.task_id)
            looks.closed += [closed] if closed else []

        await asyncio.gather(*(look(row) for row in rows))
        return looks

    async def _closed_run_of(self, row: TaskRow) -> ClosedRun | None:
        """How the task's run ended; None if it is open. Raises RunUnreadable, ValidationError, RPCError."""
        run = await self._own_run(row)
        if run is None:
            return ClosedRun(task_id=row.task_id, workflow_id=row.workflow_id, how=VANISHED)
        if run.status is RunStatus.UNKNOWN:
            raise RunUnreadable(f"Its run has a status that is not known here ({run.info.status}); it counts as open.")
        if run.status is RunStatus.PAUSED:
            raise RunUnreadable(
                "Its run is paused: meanwhile it renews no hold, and no deadline ends it "
                f"(temporal workflow unpause --workflow-id {row.workflow_id})."
            )
        if not run.status.is_over:
            return None
        return ClosedRun(task_id=row.task_id, workflow_id=row.workflow_id, run_id=run.run_id, how=run.status.value)

    async def _record(self, looks: Looks) -> None:
        """Count, log and store the rows that could not be read. An unavailable store is logged and ignored."""
        for task in looks.unseen:
            log.warning("task_not_looked_at", task_id=task.task_id, reason=task.reason)
        if looks.unseen:
            metrics.count_rows_not_looked_at(len(looks.unseen))
        try:
            await self._store.note_looks(unseen_tasks=looks.unseen, seen=looks.seen)
        except StoreFailure as failure:
            log.warning("looks_not_noted", reason=str(failure))

    async def _own_run(self, row: TaskRow) -> RunSeen | None:
        """The last run of the chain that claimed the task; None if Temporal does not know it.

        This is not always the newest run under its id: a second start under that id ends with `task_exists`.
        """
        newest = await self._described(row, None)
        if newest is None or newest.first_run_id == row.first_execution_run_id:
            return newest
        # Of a run that was reset only the row knows the successor.
        run = await self._described(row, row.run_id) if row.run_id is not None else None
        run = run or await self._described(row, row.first_execution_run_id)
        while run is not None and run.status is RunStatus.CONTINUED_AS_NEW:
            run = await self._described(row, await self._continued_as(row, run.run_id))
        return run

    async def _described(self, row: TaskRow, run_id: str | None) -> RunSeen | None:
        try:
            return await describe_run(self._client, row.workflow_id, run_id, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND or is_namespace_missing(error):
                raise
            return None

    async def _continued_as(self, row: TaskRow, run_id: str) -> str:
        last = WorkflowHistoryEventFilterType.CLOSE_EVENT
        async for event in self._handle(row, run_id).fetch_history_events(event_filter_type=last):
            return event.workflow_execution_continued_as_new_event_attributes.new_execution_run_id
        raise RunUnreadable(f"Its run {run_id} was continued as new and has no last event.")

    def _handle(self, row: TaskRow, run_id: str | None) -> WorkflowHandle[Any, Any]:
        return self._client.get_workflow_handle(row.workflow_id, run_id=run_id)

    async def _by_history(
        self, row: TaskRow, how: str, last_run: WorkflowHandle[Any, Any], earlier: EarlierRuns
    ) -> Orphans:
        replaced = await self._store.earlier_runs(row.task_id) if row.lives else []
        if row.run_id not in (None, last_run.run_id):  # the last run did nothing before it ended
            replaced.insert(0, row.run_id)
        orphans = Orphans(row=row, how=how)
        has_earlier_runs = bool(row.lives or replaced)
        reader = HistoryReader(orphans, self._client.data_converter, has_earlier_runs=has_earlier_runs)
        async for event in last_run.fetch_history_events():
            await reader.take(event)
        orphans = reader.orphans
        if replaced:
            self._add_earlier(orphans, await earlier.unanswered_jobs(row, replaced))
        add_from_row(orphans)  # last: the keys that it gives to the row's jobs are not those of their requests
        return orphans

    @staticmethod
    def _add_earlier(orphans: Orphans, earlier: EarlierJobs) -> None:
        """Add what no row names: jobs of earlier lives whose answers were lost, their charges, and their price."""
        for reason in earlier.unread:
            log.warning("earlier_run_not_read", task_id=orphans.row.task_id, reason=reason)
        orphans.jobs += not_known(earlier.jobs, orphans.jobs)
        # Where the run charged as well, its own charges are looked for, whose numbers go on from the earlier ones.
        orphans.charges_before = 0 if orphans.charges else earlier.charges
        orphans.price_before = earlier.price if orphans.cost is None and not orphans.charges else None
