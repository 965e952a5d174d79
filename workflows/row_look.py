"""Reads the task's row before the task ends: what did earlier runs do that this one does not know (contract §4)?"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.requests import not_left_out, older_than_kept
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.task_store import LookOrder, RowSeen, TaskRow
from workflows.failures import TaskFailed
from workflows.outside_call import ATTEMPT_TIMEOUT, OutsideCall
from workflows.step_labels import wait_in

NEWEST_FORGOTTEN: Final = "only-the-newest-forgotten-holds"
LOOK_WITHIN: Final = timedelta(seconds=15)
"""A store that does not answer for this long counts as away: the ledger alone decides."""
END_WITHIN: Final = timedelta(minutes=10)
LOOK_AGAIN_AFTER: Final = timedelta(seconds=1)
"""Doubled with each look, up to `LOOK_AGAIN_AT_MOST`."""
LOOK_AGAIN_AT_MOST: Final = timedelta(seconds=30)


class RowLook:
    """Reads the row, and passes what it finds to `outside.earlier`."""

    def __init__(self, outside: OutsideCall) -> None:
        self._outside = outside
        self.row: TaskRow | None = None
        self.told_points: int | None = None
        """The sum of points in the task's events at the last look; None where the row was not seen."""
        self._in_flight_until: datetime | None = None

    @property
    def life(self) -> EarlierLife:
        return self._outside.earlier.life

    async def once(self) -> bool:
        """Read the row once. Returns whether the store answered; if not, an earlier life counts as possible."""
        try:
            seen = await self._outside.read_store(
                TaskStoreActivities.look, self.order(), summary=self._outside.labels.read_row, within=LOOK_WITHIN
            )
        except FailureError:
            self._outside.earlier.add(EarlierLife(is_store_away=True))
            self.told_points = None
            return False
        self._take(seen)
        return True

    async def once_back(self) -> None:
        """Read the row once the store answers, without a limit."""
        summary = f"{self._outside.labels.read_row}: once the store is back"
        self._take(await self._outside.visible(TaskStoreActivities.look, self.order(), summary=summary))

    def order(self) -> LookOrder:
        """Which task, and which of its runs."""
        return LookOrder(
            task_id=self._outside.call_for.task_id,
            first_execution_run_id=workflow.info().first_execution_run_id,
            run_number=self._outside.call_for.run_number,
        )

    def _take(self, seen: RowSeen) -> None:
        self._outside.earlier.add(seen.life)
        self.row, self.told_points = seen.row, seen.told_points
        if seen.life_seconds is not None and not seen.life.has_ended:
            self._in_flight_until = workflow.now() + ATTEMPT_TIMEOUT - timedelta(seconds=seen.life_seconds)

    async def once_all_has_landed(self) -> None:
        """Read again once the calls that the earlier life had in flight have ended, which takes 10 s at most."""
        until, self._in_flight_until = self._in_flight_until, None
        if until is not None and workflow.now() < until:
            await workflow.sleep(
                until - workflow.now(),
                summary=wait_in(self._outside.labels.read_row, "calls that were in flight at the reset"),
            )
            await self.once()

    async def ended(self) -> TaskRow | None:
        """The row once it has ended. None where it does not within 10 minutes: its give-back may have died."""
        until, wait = workflow.now() + END_WITHIN, LOOK_AGAIN_AFTER
        while self.row is None or self.row.ended_at is None:
            if self.life.is_superseded or workflow.now() >= until:
                return None
            await workflow.sleep(wait, summary=wait_in(self._outside.labels.read_row, "its end"))
            wait = min(2 * wait, LOOK_AGAIN_AT_MOST)
            await self.once()
        return self.row

    def failure(self) -> TaskFailed:
        """The failure of a run that may begin nothing more and whose row has not ended."""
        if self.life.is_superseded:
            return TaskFailed(FailureCode.TASK_EXISTS, "Another run acts for the task; this one began nothing more.")
        return TaskFailed(FailureCode.INTERNAL, "The task's run was reset while the task was being given back.")

    # What the row holds and this run does not know

    def forgotten_jobs(self, known: set[str]) -> list[str]:
        return [] if self.row is None else [job_id for job_id in self.row.job_ids if job_id not in known]

    def forgotten_holds(self, known: set[str], *, left_out: int = 0) -> list[str]:
        """The newest ones, oldest first. `left_out`: how many ended holds this run counts without keeping them."""
        in_order = [] if self.row is None else not_left_out(self.row.hold_ids, known, left_out)
        forgotten = [hold_id for hold_id in in_order if hold_id not in known]
        # Older ones have long ended, and a long ledger leaves them out: that they have cannot be seen there.
        if len(forgotten) > MAX_KEPT_HOLDS and workflow.patched(NEWEST_FORGOTTEN):
            return forgotten[-MAX_KEPT_HOLDS:]
        return forgotten

    def older_holds(self, known: set[str], *, left_out: int) -> list[str]:
        """The newest of those that are older than what this run keeps, and that it has not counted; oldest first."""
        return [] if self.row is None else older_than_kept(self.row.hold_ids, known, left_out)[-MAX_KEPT_HOLDS:]


class RowRead(RowLook):
    """The row of a task whose run is over: it was read already and is not read again."""

    def __init__(self, outside: OutsideCall, row: TaskRow) -> None:
        super().__init__(outside)
        self.row = row
        outside.earlier.add(EarlierLife(lives=row.lives))

    async def once(self) -> bool:
        return True
