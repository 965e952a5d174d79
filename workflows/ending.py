"""How a task ends: its job and credits are settled or given back, then its end is recorded (the last two rows)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from temporalio import workflow

from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import TaskStatus
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.failures import RowEnded, TaskEnd, TaskFailed
from workflows.forgotten_jobs import ForgottenJobs
from workflows.job_watch import JobWatch
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.settlement import Settlement
from workflows.stop import Stop
from workflows.task_record import TaskRecord
from workflows.undo import Undo

CLEANED_UP_LAST: Final = "cleaned-up-once-forgotten-jobs-are-cancelled"
PRICE_OF_EARLIER_LIVES: Final = "shortfall-by-the-price-of-earlier-lives"
LEFT_CANCELLED: Final = "forgotten-holds-of-a-completed-task-cancelled-once-the-store-is-back"
JOBS_CANCELLED_ONCE_BACK: Final = "forgotten-jobs-cancelled-once-the-store-is-back"


@dataclass(frozen=True)
class Outcome:
    """What a task came to. All three are empty where it was charged for work that can no longer be found."""

    delivery: JobUpdate | None = None
    end: TaskEnd | None = None
    """The failure or cancellation that it ends with; nothing was charged."""
    row: TaskRow | None = None
    """The row of a task that an earlier life has ended. Its outcome counts."""


class TaskEnding:
    """The ends that both kinds of task have in common."""

    def __init__(
        self,
        outside: OutsideCall,
        record: TaskRecord,
        stop: Stop,
        watch: JobWatch,
        hold: CreditHold,
        attempts: Attempts,
        forgotten_jobs: ForgottenJobs,
        row_look: RowLook,
        settlement: Settlement,
        undo: Undo,
        clean_up: Callable[[], Awaitable[None]],
    ) -> None:
        """`clean_up`: what is left to do once job and credits are settled; no credits wait for it."""
        self._outside = outside
        self._record = record
        self._stop = stop
        self._watch = watch
        self._hold = hold
        self._attempts = attempts
        self._forgotten_jobs = forgotten_jobs
        self._row_look = row_look
        self._settlement = settlement
        self._undo = undo
        self._clean_up = clean_up

    # Job and credits

    async def settle(self, delivery: JobUpdate, cost: int) -> Outcome:
        """Charge a delivery. From here nothing is undone and nothing interrupts."""
        self._record.end_decided()
        self._record.waiting_for("credits to be settled", None)
        if cost <= 0 and workflow.patched("row-looked-at-where-nothing-is-charged"):
            await self._row_look.once()  # no commit would report an earlier life
        try:
            await self._settlement.charge(cost)
        except RowEnded as end:
            return await self.give_back(end)
        return Outcome(delivery=delivery)

    async def give_back(self, end: TaskEnd) -> Outcome:
        """Cancel job and hold in parallel: there is no delivery."""
        self._stop.close()
        self._outside.resume()
        self._record.end_decided()
        self._watch.stop_polling()
        self._hold.close()
        self._record.waiting_for("job and credits to be given back", None)
        await self._undo.all(str(end))
        if workflow.patched("row-looked-at-once-given-back"):
            await self._row_look.once()
        if self._outside.earlier.life.must_stop:
            row = await self._row_look.ended()
            if row is not None:
                return Outcome(row=row)
            end = self._row_look.failure()
        price: int | None = None
        if self._outside.earlier.is_possible:
            await self._row_look.once_all_has_landed()
            await self._hold.forgotten.give_back()
            if self._hold.ends.price is None and workflow.patched(PRICE_OF_EARLIER_LIVES):
                self._hold.ends.price = price = await self._forgotten_jobs.price()
                self._hold.forgotten.price_learned()
            await self._hold.forgotten.look_for_charges(await self._forgotten_jobs.charges_sent())
            self._hold.publish_ends_seen()
        self._hold.ends.close()
        if not self._hold.state.charged:
            return Outcome(end=end)
        if price is not None:
            self._settlement.record_rest(price)
        if workflow.patched("charge-of-others-told"):
            self._settlement.settled(None)  # another caller, or an earlier life, has committed a hold
        return Outcome(delivery=await self._delivery_of_any_life())

    async def _delivery_of_any_life(self) -> JobUpdate | None:
        """The delivery that the task was charged for."""
        newest = self._watch.newest
        if newest is not None and newest.succeeded:
            return newest
        return await self._forgotten_jobs.delivery() if self._outside.earlier.is_possible else None

    # The record

    async def publish(self, outcome: Outcome) -> Outcome:
        """Record the end and wait until it is written. Returns the outcome that counts: an earlier life's, if any."""
        if outcome.row is None:
            await self._forgotten_jobs.cancel()
            await self._forgotten_jobs.learn_and_cancel("the task has ended")
            ended = await self._publish_difference()
            if ended is not None:
                outcome = Outcome(row=ended)
        if outcome.row is not None:
            return await self._publish_row(outcome.row)
        if outcome.end is None:
            await self._publish_completed(outcome.delivery)
        else:
            self._publish_end(outcome.end)
        # The request of a training whose answer was lost is repeated with the list of files that lies beside the copy.
        cleans_up_last = self._outside.earlier.life.is_store_away and workflow.patched(CLEANED_UP_LAST)
        await self._all_published(cleans_up=not cleans_up_last)
        row = await self._ended_otherwise()
        await self._cancel_forgotten_jobs()
        if cleans_up_last:
            await self._clean_up()
        await self._give_back_forgotten(is_completed=outcome.end is None)
        return outcome if row is None else await self._publish_row(row)

    async def _cancel_forgotten_jobs(self) -> None:
        """Cancel the jobs that only the row or an earlier run knows, once the store is back: the end did not wait."""
        if not self._outside.earlier.life.is_store_away or not workflow.patched(JOBS_CANCELLED_ONCE_BACK):
            return
        await self._forgotten_jobs.cancel()
        await self._forgotten_jobs.learn_and_cancel("the task has ended")
        await self._all_published()

    async def _give_back_forgotten(self, *, is_completed: bool) -> None:
        """Give back what only the row knew, once the store is back: the ledger may have been late as well."""
        if not self._outside.earlier.life.is_store_away or not self._hold.forgotten.left():
            return
        marker = LEFT_CANCELLED if is_completed else "forgotten-holds-given-back-once-the-store-is-back"
        if not workflow.patched(marker):
            return
        await self._hold.forgotten.give_back_after_end(is_charged=is_completed)
        await self._all_published()

    async def _publish_completed(self, delivery: JobUpdate | None) -> None:
        if delivery is not None:
            self._record.delivered(delivery.result_urls, delivery.output)
        await self._attempts.all_old_cancelled()
        self._record.credits_changed(self._hold.summary())
        self._record.completed()

    def _publish_end(self, end: TaskEnd) -> None:
        self._record.credits_changed(self._hold.summary())
        if isinstance(end, TaskFailed):
            self._record.failed(end)
        else:
            self._record.end(TaskStatus.CANCELLED, EventType.CANCELLED, message=str(end))

    async def _publish_row(self, row: TaskRow) -> Outcome:
        """An earlier life has ended the task: this run reports that outcome."""
        self._record.copy_row(row)
        self._hold.copy_row(row.credits)
        await self._all_published()
        return Outcome(row=row)

    async def _publish_difference(self) -> TaskRow | None:
        """Make the points in the events add up to what was charged, independent of what earlier lives have published.

        Returns the row where another life has meanwhile ended the task: an earlier look may have been copied by a
        reset.
        """
        if not self._outside.earlier.life.is_sure and not self._may_differ_from_row():
            return None
        await self._record.all_written()
        await self._row_look.once()
        row = self._row_look.row
        if self._outside.earlier.life.has_ended and row is not None and row.ended_at is not None:
            return row
        if not self._outside.earlier.life.is_sure:
            return None
        charged, published = self._hold.summary().charged, self._row_look.told_points
        difference = 0 if charged is None or published is None else -charged - published
        if difference:
            self._record.publish(
                f"difference:{self._outside.earlier.life.lives}",
                EventType.CREDITS,
                credits_delta=difference,
                message=f"{abs(difference)} points "
                + ("came back that were held" if difference > 0 else "were charged")
                + " before the task's run was reset.",
            )
        return None

    def _may_differ_from_row(self) -> bool:
        """Whether an earlier life may have ended the task in another way, though no call has reported one.

        What the ledger showed, or did not show, may differ from what that life saw. While the store is away the end is
        published at once, and the row is read afterwards.
        """
        if self._hold.ends.are_unknown and workflow.patched("row-looked-at-where-settlement-is-unknown"):
            return True
        has_read = self._hold.ledger.newest is not None and not self._outside.earlier.life.is_store_away
        return has_read and workflow.patched("row-looked-at-where-the-ledger-decided")

    async def _ended_otherwise(self) -> TaskRow | None:
        """The row, where the store was away before and the row has ended in another way than this run."""
        if not self._outside.earlier.life.is_store_away or not workflow.patched("row-looked-at-when-the-store-is-back"):
            return None
        if not await self._row_look.once() and workflow.patched(JOBS_CANCELLED_ONCE_BACK):
            await self._row_look.once_back()  # it was away again: only the row knows what is left to be cancelled
        row, own = self._row_look.row, self._record.state
        if row is None or row.ended_at is None or row.has_result_of(own):
            return None
        has_same_end = (row.status, row.credits) == (own.status, own.credits)
        if has_same_end and not workflow.patched("row-compared-with-the-whole-result"):
            return None
        return row

    async def _all_published(self, *, cleans_up: bool = True) -> None:
        """Only the end of the run waits for the event writer and for handlers in flight."""
        if cleans_up:
            await self._clean_up()
        await self._record.all_written()
        await workflow.wait_condition(workflow.all_handlers_finished)
