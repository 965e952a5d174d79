"""Jobs that runs of a task requested before it was reset, and whose answers they never had, read from their histories.

The task's row holds the ids of all other jobs (activities/lives.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.orphans import HistoryReader, NotReadHere
from activities.running_call import uninterrupted
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.give_back import EarlierJobs, Orphans
from comfyui_temporal.contracts.requests import RequestedJob, RequestOutcome
from comfyui_temporal.contracts.task_store import LookOrder, TaskRow
from comfyui_temporal.runs import is_namespace_missing
from store import StoreUnavailable, TaskStore

MOST_JOBS: Final = 8
"""With their bodies they must fit into one result (contracts/size_budget.py)."""


async def unanswered_jobs(client: Client, row: TaskRow, run_ids: Sequence[str]) -> EarlierJobs:
    """What these runs requested of ComfyUI without an answer, or with one that was not noted in the row.

    A key that was refused to a run says nothing of the job that another run made under it. A run that Temporal has
    deleted is left out.

    Raises RPCError where Temporal does not answer.
    """
    found = EarlierJobs()
    by_key: dict[str, RequestedJob] = {}
    for run_id in run_ids:
        try:
            jobs = await _jobs_of(client, row, run_id)
        except NotReadHere as problem:
            found.unread.append(str(problem))
            continue
        for job in (each for each in jobs if not each.is_key_taken):
            if job.key not in by_key or job.outcome is not RequestOutcome.UNKNOWN:
                by_key[job.key] = job
    in_row = {*row.job_ids, row.job_id}
    unanswered = [
        job
        for job in by_key.values()
        if job.outcome is RequestOutcome.UNKNOWN or (job.outcome is RequestOutcome.MADE and job.job_id not in in_row)
    ]
    found.jobs = unanswered[:MOST_JOBS]
    found.unread += [f"The job requested under {job.key} was not looked for." for job in unanswered[MOST_JOBS:]]
    return found


async def _jobs_of(client: Client, row: TaskRow, run_id: str) -> list[RequestedJob]:
    """Raises NotReadHere, RPCError."""
    reader = HistoryReader(Orphans(row=row, how="reset"), client.data_converter)
    try:
        async for event in client.get_workflow_handle(row.workflow_id, run_id=run_id).fetch_history_events():
            await reader.take(event)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND or is_namespace_missing(error):
            raise
        return []
    return reader.orphans.jobs


class EarlierRunActivities:
    """Reads the runs of a task that a reset has replaced."""

    def __init__(self, client: Client, store: TaskStore) -> None:
        self._client = client
        self._store = store

    @activity.defn
    async def unanswered_jobs(self, order: LookOrder) -> EarlierJobs:
        """Jobs of the calling task's earlier runs. Raises ApplicationError `internal`, retried."""
        return await uninterrupted(self._unanswered_jobs(order))

    async def _unanswered_jobs(self, order: LookOrder) -> EarlierJobs:
        try:
            row = await self._store.task(order.task_id)
            run_ids = await self._store.earlier_runs(order.task_id)
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None
        others = [run_id for run_id in run_ids if run_id != activity.info().workflow_run_id]
        if row is None or not others:
            return EarlierJobs()
        try:
            return await unanswered_jobs(self._client, row, others)
        except RPCError as error:
            raise ApplicationError(
                f"Temporal does not return the earlier runs of {row.workflow_id}: {error.status.name}.",
                type=FailureCode.INTERNAL.value,
            ) from None
