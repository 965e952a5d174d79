"""The task's row, looked at before a task ends: what its runs did that this one may have forgotten (contract §4)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.continuation import not_left_out
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.task_store import LookOrder, TaskRow
from workflows.failures import TaskFailed
from workflows.outside_call import ATTEMPT_TIMEOUT, OutsideCall

LOOK_WITHIN: Final = timedelta(seconds=15)
"""A store that does not answer for so long is away: the ledger alone decides."""
END_WITHIN: Final = timedelta(minutes=10)
LOOK_AGAIN_AFTER: Final = timedelta(seconds=1)
"""Doubled with each look, up to `LOOK_AGAIN_AT_MOST`."""
LOOK_AGAIN_AT_MOST: Final = timedelta(seconds=30)


class RowLook:
    """Looks at the row. What it finds is told to `outside.earlier` too."""

    def __init__(self, outside: OutsideCall) -> None:
        self._outside = outside
        self.row: TaskRow | None = None
        self.told_points: int | None = None
        """What the task's events have told of points, when the row was looked at last; None where it was not seen."""
        self._in_flight_until: datetime | None = None

    @property
    def told(self) -> EarlierLife:
        return self._outside.earlier.life

    async def once(self) -> None:
        """Look once; where the store does not answer, an earlier life counts as possible."""
        order = LookOrder(
            task_id=self._outside.call_for.task_id,
            first_execution_run_id=workflow.info().first_execution_run_id,
            run_number=self._outside.call_for.run_number,
        )
        try:
            seen = await self._outside.read_store(
                TaskStoreActivities.look, order, summary="5 look at the row", within=LOOK_WITHIN
            )
        except FailureError:
            self._outside.earlier.add(EarlierLife(is_store_away=True))
            self.told_points = None
            return
        self._outside.earlier.add(seen.life)
        self.row, self.told_points = seen.row, seen.told_points
        if seen.life_seconds is not None and not seen.life.has_ended:
            self._in_flight_until = workflow.now() + ATTEMPT_TIMEOUT - timedelta(seconds=seen.life_seconds)

    async def once_all_has_landed(self) -> None:
        """Look again once what the earlier life had sent when it was reset has landed, which takes 10 s at most."""
        until, self._in_flight_until = self._in_flight_until, None
        if until is not None and workflow.now() < until:
            await workflow.sleep(until - workflow.now(), summary="5 what was sent before the reset lands")
            await self.once()

    async def ended(self) -> TaskRow | None:
        """The row, once it has ended. None where it did not within 10 minutes: its give-back has died, say."""
        until, wait = workflow.now() + END_WITHIN, LOOK_AGAIN_AFTER
        while self.row is None or self.row.ended_at is None:
            if self.told.is_superseded or workflow.now() >= until:
                return None
            await workflow.sleep(wait, summary="5 wait for the row's end")
            wait = min(2 * wait, LOOK_AGAIN_AT_MOST)
            await self.once()
        return self.row

    def failure(self) -> TaskFailed:
        """How a run ends that may begin nothing more, and whose row has not ended."""
        if self.told.is_superseded:
            return TaskFailed(FailureCode.TASK_EXISTS, "Another run acts for the task; this one began nothing more.")
        return TaskFailed(FailureCode.INTERNAL, "The task's run was reset while the task was being given back.")

    # What the row knows and this run does not

    def forgotten_jobs(self, known: set[str]) -> list[str]:
        return [] if self.row is None else [job_id for job_id in self.row.job_ids if job_id not in known]

    def forgotten_holds(self, known: set[str], *, left_out: int = 0) -> list[str]:
        """`left_out`: how many this run counts only, since they were over."""
        in_order = [] if self.row is None else not_left_out(self.row.hold_ids, known, left_out)
        return [hold_id for hold_id in in_order if hold_id not in known]


class RowRead(RowLook):
    """A row that was read already, of a task whose run is over: it is not looked at again."""

    def __init__(self, outside: OutsideCall, row: TaskRow) -> None:
        super().__init__(outside)
        self.row = row
        outside.earlier.add(EarlierLife(lives=row.lives))

    async def once(self) -> None:
        return
