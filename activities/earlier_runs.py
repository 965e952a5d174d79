"""What the histories of a task's runs before a reset show and its row does not.

Jobs that they requested, and whose answers they never had; the row holds the ids of all others (activities/lives.py).
Charges that they sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

from pydantic import ValidationError
from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.orphans import HistoryReader, NotReadHere
from activities.running_call import uninterrupted
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.give_back import EarlierJobs, EarlierRunsRead, Orphans
from comfyui_temporal.contracts.requests import RequestedJob, RequestOutcome, not_known
from comfyui_temporal.contracts.size_budget import PAYLOAD_BYTES, json_bytes
from comfyui_temporal.contracts.task_store import LookOrder, TaskRow
from comfyui_temporal.runs import is_namespace_missing
from store import StoreUnavailable, TaskStore

MOST_BYTES: Final = PAYLOAD_BYTES // 2
"""Of unanswered jobs with their bodies: they must fit into one heartbeat, and into a give-back's input."""


class EarlierRuns:
    """Reads runs of a task one by one. The next attempt of the calling activity goes on where this one has stopped."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._read = _read_before(activity.info().heartbeat_details)
        self._unread: list[str] = []
        """Runs that this worker cannot read. A newer one may: it tries them again in its own attempt."""

    def progress(self) -> tuple[EarlierRunsRead, ...]:
        """Details of a heartbeat."""
        return (self._read,) if self._read.run_ids else ()

    async def unanswered_jobs(self, row: TaskRow, run_ids: Sequence[str]) -> EarlierJobs:
        """What these runs requested of ComfyUI without an answer, or with one that was not noted in the row; their
        charges and price.

        `run_ids`: newest first. A run that Temporal has deleted is left out.

        Raises RPCError where Temporal does not answer, ApplicationError `internal`, retried, where the attempt is over.
        """
        for run_id in run_ids:
            if run_id in self._read.run_ids:
                continue
            if activity.is_cancelled():  # by its limit, or a worker that stops
                raise ApplicationError("The next attempt reads the other runs.", type=FailureCode.INTERNAL.value)
            await self._read_run(row, run_id)
        found, in_row = self._read.found, {*row.job_ids, row.job_id}
        made = [job for job in self._read.made if job.outcome is RequestOutcome.MADE and job.job_id not in in_row]
        return found.model_copy(update={"jobs": [*made, *found.jobs], "unread": [*self._unread, *found.unread]})

    async def _read_run(self, row: TaskRow, run_id: str) -> None:
        read, found = self._read, self._read.found
        try:
            left = await _left_by(self._client, row, run_id)
        except NotReadHere as problem:
            self._unread.append(str(problem))
            return
        read.run_ids.append(run_id)
        found.charges = max(found.charges, left.charges_sent)
        found.price = left.cost if found.price is None else found.price
        known = {job.job_id for job in read.made}
        read.made += [job for job in left.jobs if job.job_id and job.job_id not in known]
        unanswered = [job for job in left.jobs if job.outcome is RequestOutcome.UNKNOWN]
        jobs = not_known([*found.jobs, *not_known(unanswered, found.jobs)], read.made)
        found.jobs = _that_fit(jobs)
        left_out = [f"The job requested under {job.key} was not looked for." for job in jobs[len(found.jobs) :]]
        found.unread += [sentence for sentence in dict.fromkeys(left_out) if sentence not in found.unread]


def _that_fit(jobs: Sequence[RequestedJob]) -> list[RequestedJob]:
    """The first of them, as many as have room."""
    sizes = accumulate(map(json_bytes, jobs))
    return [job for job, size in zip(jobs, sizes, strict=True) if size <= MOST_BYTES]


def _read_before(details: Sequence[Any]) -> EarlierRunsRead:
    try:
        return EarlierRunsRead.model_validate(details[0]) if details else EarlierRunsRead()
    except ValidationError:
        return EarlierRunsRead()


async def _left_by(client: Client, row: TaskRow, run_id: str) -> Orphans:
    """Raises NotReadHere, RPCError."""
    reader = HistoryReader(Orphans(row=row, how="reset"), client.data_converter)
    try:
        async for event in client.get_workflow_handle(row.workflow_id, run_id=run_id).fetch_history_events():
            await reader.take(event)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND or is_namespace_missing(error):
            raise
        return Orphans(row=row, how="deleted")
    return reader.orphans


class EarlierRunActivities:
    """Reads the runs of a task that a reset has replaced."""

    def __init__(self, client: Client, store: TaskStore) -> None:
        self._client = client
        self._store = store

    @activity.defn
    async def unanswered_jobs(self, order: LookOrder) -> EarlierJobs:
        """Of the calling task's earlier runs. Raises ApplicationError `internal`, retried."""
        runs = EarlierRuns(self._client)
        return await uninterrupted(self._unanswered_jobs(order, runs), runs.progress)

    async def _unanswered_jobs(self, order: LookOrder, runs: EarlierRuns) -> EarlierJobs:
        try:
            row = await self._store.task(order.task_id)
            run_ids = await self._store.earlier_runs(order.task_id)
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None
        others = [run_id for run_id in run_ids if run_id != activity.info().workflow_run_id]
        if row is None or not others:
            return EarlierJobs()
        try:
            return await runs.unanswered_jobs(row, others)
        except RPCError as error:
            raise ApplicationError(
                f"Temporal does not return the earlier runs of {row.workflow_id}: {error.status.name}.",
                type=FailureCode.INTERNAL.value,
            ) from None
