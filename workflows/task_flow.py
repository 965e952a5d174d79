"""What both flows share: their parts, their messages, and how a task ends. The step tables are in the flow files."""

from __future__ import annotations

from abc import abstractmethod
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from comfyui_temporal.contracts.continuation import Continuation, ImageRun, JobUpdate, PriceState, TrainingRun
from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.prices import DEFAULT_ETA_MINUTES
from comfyui_temporal.contracts.task_store import RecordedPrices, TaskRow
from comfyui_temporal.contracts.tasks import (
    CALLBACK_SIGNAL,
    CancelTask,
    CancelTaskOutcome,
    CreditsSummary,
    EventType,
    ImageResult,
    TaskStatus,
    TrainingResult,
)
from workflows.alarm import Alarm
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.failures import RowEnded, TaskEnd, TaskFailed, TaskStopped
from workflows.following import Concern, Following
from workflows.forgotten_jobs import ForgottenJobs
from workflows.guards import any_payload
from workflows.interruptible import Waiting
from workflows.job_clock import JobClock
from workflows.job_routes import JobRoutes
from workflows.job_watch import JobWatch
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.settlement import Settlement
from workflows.stop import Stop
from workflows.task_record import TaskRecord
from workflows.undo import Undo

Run = TypeVar("Run", ImageRun, TrainingRun)
Result = TypeVar("Result", ImageResult, TrainingResult)


class TaskFlow(Generic[Run, Result]):
    """The parts of one task and the ends that both kinds of task have in common."""

    def __init__(self, task: Run, routes: JobRoutes) -> None:
        carried = task.carried or Continuation()
        self.task: Run = task
        self.stop = Stop()  # one place decides whether a cancel is obeyed
        self.alarm = Alarm()  # one long-lived timer
        self.waiting = Waiting(self.stop, self.alarm)  # it obeys the stop, the time and the hold's life
        self.outside = OutsideCall(task, self.stop, run_number=carried.run_number, waiting=self.waiting)
        self.row_look = RowLook(self.outside)  # what earlier lives of the task did
        self.record = TaskRecord(task, self.outside, carried.record)  # the only source of state and events
        self.clock = JobClock(
            self.record, carried.clock, default_eta_minutes=DEFAULT_ETA_MINUTES[task.scene][task.priority]
        )
        self.watch = JobWatch(task.task_id, routes, self.outside, self.record, carried.watch)
        self.hold = CreditHold(task, self.outside, self.record, self.clock.deadline, carried.hold, self.row_look)
        self.attempts = Attempts(routes, self.outside, self.record, self.clock, self.stop, self.alarm, carried.jobs)
        self.forgotten_jobs = ForgottenJobs(routes, self.outside, self.record, self.attempts, self.row_look)
        self.hold.deadline_stands = self.clock.stands
        self.waiting.look_after(self.hold, self.latest)
        self.attempts.retry_at, self.attempts.long_run = carried.retry_at, self
        self.settlement = Settlement(task, self.outside, self.record, self.hold)
        self.undo = Undo()  # all of it side by side, each until it lands
        self.price: PriceState = carried.price
        self.policy: Policy | None = carried.policy
        self.signals = 0
        # Looked after while a job runs:
        self.concerns: list[Concern] = [self.outside.earlier, self.clock, self.watch, self.hold]
        self.following = Following(
            self.watch, self.clock, self.stop, self.alarm, self.concerns, self.continue_as_new_if_long
        )
        self.clock.unreadable = lambda: self.watch.state.unreadable
        self.watch.on_news(lambda news: self.clock.estimated(news.estimated_time))

    # What a flow file says of itself

    @abstractmethod
    def result(self, status: TaskStatus) -> Result:
        """The result object of contract §8."""

    async def clean_up(self) -> None:
        """What is left to do when job and credits are settled; it holds up nobody's credits."""

    def continuation(self, carried: Continuation) -> Run:
        """The argument of the run that goes on with `carried`."""
        return self.task.model_copy(update={"carried": carried})

    def latest(self) -> datetime | None:
        """When the task's time is over; delivered work beats it, read or not (decision 8)."""
        return None if self.watch.has_delivery() else self.clock.latest()

    # Row 0

    async def accept(self, resolution: str) -> Policy:
        """Claim the id and read the policy; a continued run brings both."""
        self.record.set_claim(resolution)
        if self.policy is None:
            self.policy = await self.record.claim()
        policy, options = self.policy, self.task.options
        self.clock.configure(
            factor=min(options.deadline_factor or policy.deadline_factor, policy.deadline_factor),
            cap_minutes=policy.cap_minutes,
            queue_sla_minutes=policy.queue_sla_minutes,
        )
        self.watch.poll_after_seconds = min(
            options.poll_after_seconds or policy.poll_after_seconds, policy.poll_after_seconds
        )
        self.watch.poll_at_most_seconds = policy.poll_at_most_seconds
        self.hold.margin_seconds = policy.hold_margin_seconds
        self.hold.setup_minutes = self.attempts.setup_minutes = policy.opening_call_minutes
        self.attempts.retry_after_seconds = policy.retry_after_seconds
        self.settlement.charge_shortfall = policy.charge_shortfall
        self.undo.push("cancel job", self.attempts.cancel_all)
        self.undo.push("cancel hold", self.hold.give_back)
        self.resume_calls()
        return policy

    @property
    def is_continued(self) -> bool:
        return self.task.carried is not None

    @property
    def limits(self) -> Policy:
        assert self.policy is not None
        return self.policy

    def record_prices(self, prices: RecordedPrices) -> None:
        """Where the three prices differ, all three are recorded on the task (contract §5)."""
        self.record.state.prices = prices
        stated = {price for price in (prices.job, prices.estimate, prices.table) if price is not None}
        if len(stated) > 1:
            self.record.record_exception(
                f"prices_differ:{self.attempts.number}",
                ExceptionCode.PRICES_DIFFER,
                f"The job's price is {prices.job}, the estimate {prices.estimate}, the table's {prices.table} points.",
                **prices.model_dump(),
            )

    # Messages: handlers store, the flow decides

    @workflow.signal(name=CALLBACK_SIGNAL)
    @any_payload
    def comfyui_callback(self, payload: bytes | None) -> None:
        """ComfyUI's callback (contract §2, §3)."""
        self.signals += 1
        self.watch.take(payload)

    @workflow.update
    async def cancel_task(self, request: CancelTask) -> CancelTaskOutcome:
        """Stop the task: `accepted`, or `too_late` where it was delivered or has ended; idempotent."""
        return await self.stop.cancel_task(request.reason)

    @cancel_task.validator
    def refuse_bad_cancel(self, request: CancelTask) -> None:
        """Reached only with one good argument: anything else is refused before it (pitfall 3)."""

    @workflow.query
    def credits(self) -> CreditsSummary:
        """Points estimated, held, charged, returned (contract §8)."""
        return self.hold.summary()

    # How a task ends

    async def delivered(self) -> None:
        """No cancel from here. Before anything is settled a renewal in flight finishes, which may take an hour.

        Raises TaskFailed `credit_exhausted`.
        """
        self.stop.close()
        self.outside.resume()
        await self.hold.settled_renewal()

    async def settle(self, delivery: JobUpdate, cost: int) -> Result:
        """Rows 5 and 6, delivered: from here nothing is undone and nothing cuts it short."""
        self.record.decided()
        self.record.waiting_for("credits to be settled", None)
        if cost <= 0 and workflow.patched("row-looked-at-where-nothing-is-charged"):
            await self.row_look.once()  # no commit tells of an earlier life
        try:
            await self.settlement.charge(cost)
        except RowEnded as end:
            return await self.give_back(end)
        return await self.completed(delivery)

    async def publish_difference(self) -> TaskRow | None:
        """What the events tell of points is what was charged, whatever earlier lives have told or left untold.

        The row, where another life has ended the task meanwhile: an earlier look may have been copied by a reset.
        """
        is_unknown = self.hold.state.is_unknown and workflow.patched("row-looked-at-where-settlement-is-unknown")
        if not self.outside.earlier.life.is_sure and not is_unknown:
            return None
        await self.record.all_written()
        await self.row_look.once()
        row = self.row_look.row
        if self.outside.earlier.life.has_ended and row is not None and row.ended_at is not None:
            return row
        if not self.outside.earlier.life.is_sure:
            return None
        charged, told = self.hold.summary().charged, self.row_look.told_points
        difference = 0 if charged is None or told is None else -charged - told
        if difference:
            self.record.publish(
                f"difference:{self.outside.earlier.life.lives}",
                EventType.CREDITS,
                credits_delta=difference,
                message=f"{abs(difference)} points "
                + ("came back that were held" if difference > 0 else "were charged")
                + " before the task's run was reset.",
            )
        return None

    async def delivery_of_any_life(self) -> JobUpdate | None:
        """What the task was charged for."""
        newest = self.watch.newest
        if newest is not None and newest.succeeded:
            return newest
        return await self.forgotten_jobs.delivery() if self.outside.earlier.is_possible else None

    async def completed(self, delivery: JobUpdate | None) -> Result:
        await self.forgotten_jobs.cancel()
        ended = await self.publish_difference()
        if ended is not None:
            return await self.as_in_row(ended)
        if delivery is not None:
            self.record.state.result_urls = delivery.result_urls
            self.record.state.output = delivery.output
        await self.attempts.all_old_cancelled()
        self.record.state.error = None
        self.record.state.progress = 100.0
        self.record.state.credits = self.hold.summary()
        self.record.end(
            TaskStatus.COMPLETED,
            EventType.COMPLETED,
            result_urls=self.record.state.result_urls or None,
            output=self.record.state.output,
        )
        await self.all_published()
        row = await self.ended_otherwise()
        return await self.as_in_row(row) if row is not None else self.result(TaskStatus.COMPLETED)

    async def give_back(self, end: TaskEnd) -> Result:
        """Row 5, not delivered: job and hold are cancelled side by side; then the task's failure or `cancelled`."""
        self.stop.close()
        self.outside.resume()
        self.record.decided()
        self.watch.stop_polling()
        self.hold.close()
        self.record.waiting_for("job and credits to be given back", None)
        await self.undo.all(str(end))
        if workflow.patched("row-looked-at-once-given-back"):
            await self.row_look.once()
        if self.outside.earlier.life.must_stop:
            row = await self.row_look.ended()
            if row is not None:
                return await self.as_in_row(row)
            end = self.row_look.failure()
        if self.outside.earlier.is_possible:
            await self.row_look.once_all_has_landed()
            await self.hold.forgotten.give_back(str(end))
        self.hold.ends.close()
        if self.hold.state.charged:
            if workflow.patched("charge-of-others-told"):
                self.settlement.settled(None)  # by somebody else, or by an earlier life
            return await self.completed(await self.delivery_of_any_life())
        await self.forgotten_jobs.cancel()
        ended = await self.publish_difference()
        if ended is not None:
            return await self.as_in_row(ended)
        self.record.state.credits = self.hold.summary()
        if isinstance(end, TaskFailed):
            self.record.failed(end)
        else:
            self.record.end(TaskStatus.CANCELLED, EventType.CANCELLED, message=str(end))
        await self.all_published()
        row = await self.ended_otherwise()
        if row is not None:
            return await self.as_in_row(row)
        if isinstance(end, TaskFailed):
            raise self.failure(end)
        assert isinstance(end, TaskStopped)
        return self.result(TaskStatus.CANCELLED)

    async def ended_otherwise(self) -> TaskRow | None:
        """The row, where it could not be looked at before, and turns out to have ended in another way than this run."""
        if not self.outside.earlier.life.is_store_away or not workflow.patched("row-looked-at-when-the-store-is-back"):
            return None
        await self.row_look.once()
        row, own = self.row_look.row, self.record.state
        if row is None or row.ended_at is None or (row.status, row.credits) == (own.status, own.credits):
            return None
        return row

    def failure(self, end: TaskFailed) -> ApplicationError:
        return ApplicationError(str(end), self.result(TaskStatus.FAILED), type=end.code.value, non_retryable=True)

    async def as_in_row(self, row: TaskRow) -> Result:
        """An earlier life has ended the task: its outcome is this run's too. Raises as the end that the row tells."""
        self.record.copy_row(row)
        self.hold.summary_in_row = row.credits
        await self.all_published()
        if row.status is TaskStatus.FAILED:
            raise self.failure(TaskFailed.by_row(row.error))
        return self.result(row.status)

    async def all_published(self) -> None:
        """Only the end of the run waits for the event writer and for handlers in flight."""
        await self.clean_up()
        await self.record.all_written()
        await workflow.wait_condition(workflow.all_handlers_finished)

    # Long runs

    async def continue_as_new_if_long(self) -> bool:
        """Start afresh with what counts, never with a cancel pending or a call in flight (pitfall 22).

        A renewal, a give-back and a job's cancel may hang for hours: they are put down, and the next run takes them up.
        True where it waited and a stop was asked for: look again. Of one workflow task the SDK works off the signals
        first, then a cancellation; a run that ends on the signals has never heard of it. So it ends on a timer, which a
        stop that came with them cuts short.
        """
        if not self._may_try_to_continue():
            return False
        self.watch.stop_polling()
        await self.outside.suspend()
        if await self.outside.wait_for(
            timedelta(milliseconds=1), lambda: self.stop.requested, summary="continue as new"
        ):
            return True
        await workflow.wait_condition(lambda: True)  # until what came with the timer has been worked off too
        if self._may_continue():
            workflow.continue_as_new(self._continuation())
        self.resume_calls()
        return True

    def resume_calls(self) -> None:
        """Make the calls that were put down, in this run or by the one before."""
        self.outside.resume()
        self.attempts.resume()
        self.hold.resume()

    def _continuation(self) -> Run:
        state = {
            "policy": self.limits,
            "run_number": self.outside.call_for.run_number + 1,
            "record": self.record.carry(),
            "watch": self.watch.carry(),
            "clock": self.clock.carry(),
            "hold": self.hold.carry(),
            "jobs": self.attempts.carry(),
            "retry_at": self.attempts.retry_at,
            "price": self.price,
        }
        # Not made anew: what a worker of another version carried besides goes on with it.
        return self.continuation((self.task.carried or Continuation()).model_copy(update=state))

    def is_long(self) -> bool:
        """Whether the history is to be left behind."""
        info = workflow.info()
        return (
            info.is_continue_as_new_suggested()
            or info.get_current_history_length() >= self.limits.continue_as_new_events
            or self.signals >= self.limits.continue_as_new_signals
        )

    def _may_try_to_continue(self) -> bool:
        if not self.is_long() or self.stop.requested or not workflow.all_handlers_finished():
            return False
        hangs = self.hold.is_renewing() or self.outside.has_background_calls()
        return not hangs or workflow.patched("continues-while-calls-hang")

    def _may_continue(self) -> bool:
        return not self.stop.requested and not self.outside.has_background_calls() and workflow.all_handlers_finished()

    def progress_fields(self) -> dict[str, Any]:
        """What both `progress` queries answer."""
        state = self.record.state
        return {
            "task_id": self.task.task_id,
            "status": state.status,
            "stage": state.stage,
            "progress": state.progress,
            "next_eta": state.next_eta,
            "estimated_time": state.estimated_time,
            "gpu_slots": state.gpu_slots,
            "queue_position": state.queue_position,
            "job_id": state.job_id,
            "attempts": state.attempts,
            "error_details": state.error,
            "callbacks_refused": self.watch.state.callbacks_refused,
        }

    def result_fields(self, status: TaskStatus) -> dict[str, Any]:
        """What both results hold (contract §8)."""
        state = self.record.state
        return {
            "task_id": self.task.task_id,
            "status": status,
            "estimated_time": state.estimated_time,
            "gpu_slots": state.gpu_slots,
            "error_details": state.error,
            "attempts": state.attempts,
            "credits": self.hold.summary(),
        }
