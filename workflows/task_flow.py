"""What both flows share: mechanisms, messages, continue-as-new. The step tables are in the flow files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar, cast

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from comfyui_temporal.contracts.continuation import Continuation, JobUpdate
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.scenes import SCENES, AnyResult, AnyRun
from comfyui_temporal.contracts.start_answer import StartAnswer, WaitUntilHeld
from comfyui_temporal.contracts.tasks import (
    CALLBACK_SIGNAL,
    CANCEL_SIGNAL,
    CancelTask,
    CancelTaskOutcome,
    CreditsSummary,
    TaskStatus,
)
from workflows.alarm import Alarm
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.ending import Outcome, TaskEnding
from workflows.failures import TaskFailed
from workflows.following import Concern, Following
from workflows.forgotten_jobs import ForgottenJobs
from workflows.guards import Ordered, any_payload, order_in
from workflows.interruptible import InterruptibleWaits
from workflows.job_clock import JobClock
from workflows.job_routes import JobRoutes
from workflows.job_watch import JobWatch
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.settlement import Settlement
from workflows.stop import Stop
from workflows.task_limits import TaskLimits
from workflows.task_record import TaskRecord
from workflows.undo import Undo

Run = TypeVar("Run", bound=AnyRun)
Result = TypeVar("Result", bound=AnyResult)


class TaskFlow(Generic[Run, Result]):
    """The mechanisms of one task. Each is made once, from the state that a continued run brings along."""

    def __init__(self, task: Run, routes: JobRoutes) -> None:
        carried = task.carried or Continuation()
        self.task: Run = task
        self.signals = 0
        self._waits_for_calls = False
        self.limits = TaskLimits(task.options, carried.policy)
        self.stop = Stop()  # the one place that decides about a cancel
        self.alarm = Alarm()  # one long-lived timer
        self.waits = InterruptibleWaits(self.stop, self.alarm, hold=lambda: self.hold, latest=self.latest)
        self.outside = OutsideCall(task, self.stop, run_number=carried.run_number, waits=self.waits, limits=self.limits)
        self.row_look = RowLook(self.outside)  # what earlier lives of the task did
        self.record = TaskRecord(task, self.outside, carried.record)  # the only source of state and events
        self.watch = JobWatch(task.task_id, routes, self.outside, self.record, carried.watch, self.job_updated)
        self.clock = JobClock(
            self.record,
            carried.clock,
            self.limits,
            default_eta_minutes=SCENES[task.scene].eta_minutes[task.priority],
            unreadable=self.watch.unreadable,
            asks_last=self.watch.asks_before_timeout,
            begun_at=self.watch.begun_at,
        )
        self.hold = CreditHold(
            task,
            self.outside,
            self.record,
            self.clock.deadline,
            carried.hold,
            self.row_look,
            deadline_is_fixed=self.clock.deadline_is_fixed,
        )
        self.attempts = Attempts(
            routes,
            self.outside,
            self.record,
            self.clock,
            self.stop,
            self.alarm,
            carried.jobs,
            retry_at=carried.retry_at,
            long_run=self,
        )
        self.undo = Undo()  # every undo in parallel, each until it succeeds
        self.ending = self._ending_of(task, routes)
        self.price_state = carried.price
        self.models = carried.models  # those of the tenant that the task uses
        if task.carried is not None:
            self.record.answers.held()  # no run continues as new before that

    def _ending_of(self, task: Run, routes: JobRoutes) -> TaskEnding:
        forgotten_jobs = ForgottenJobs(routes, self.outside, self.record, self.attempts, self.row_look)
        return TaskEnding(
            self.outside,
            self.record,
            self.stop,
            self.watch,
            self.hold,
            self.attempts,
            forgotten_jobs,
            self.row_look,
            Settlement(task, self.outside, self.record, self.hold, forgotten_jobs.charges_sent),
            self.undo,
            self.clean_up,
        )

    def following_with(self, *concerns: Concern) -> Following:
        """Row 4: the loop that waits for a job. `concerns` are checked before the shared ones."""
        shared: Sequence[Concern] = (self.outside.earlier, self.clock, self.watch, self.hold)
        return Following(
            self.watch, self.clock, self.stop, self.alarm, [*concerns, *shared], self.continue_as_new_if_long
        )

    # What a flow file says of itself

    @abstractmethod
    def result(self, status: TaskStatus) -> Result:
        """The result object of contract §8."""

    def job_updated(self, update: JobUpdate) -> None:
        """Take over what a job reports, once for each message that is applied."""
        self.clock.estimated(update.estimated_time)

    async def clean_up(self) -> None:
        """What is left to do once job and credits are settled; no credits wait for it."""

    def argument_of_next_run(self, carried: Continuation) -> Run:
        """The argument of the run that this one continues as."""
        return cast("Run", self.task.model_copy(update={"carried": carried}))

    def latest(self) -> datetime | None:
        """When the task's time is over. None where it has delivered, read or not: a delivery wins (decision 8)."""
        return None if self.watch.has_delivery() else self.clock.latest()

    # Row 0

    async def accept(self, resolution: str) -> None:
        """Claim the id and read the policy; a continued run has both. Raises ApplicationError `task_exists`."""
        self.record.set_claim(resolution)
        if not self.limits.is_known:
            try:
                claimed = await self.record.claim(self.task.in_doubt)
            except (TaskFailed, ApplicationError) as error:
                self.stop.close()
                await workflow.wait_condition(workflow.all_handlers_finished)
                raise self._failure(error) if isinstance(error, TaskFailed) else error from None
            self.limits.claimed(claimed.policy)
            self.models = claimed.models
        self.undo.push("cancel job", self.attempts.cancel_all)
        self.undo.push("cancel hold", self.hold.give_back)
        self.resume_calls()

    @property
    def is_continued(self) -> bool:
        return self.task.carried is not None

    @property
    def policy(self) -> Policy:
        return self.limits.policy

    # Messages: handlers store, the flow decides

    @workflow.signal(name=CALLBACK_SIGNAL)
    @any_payload
    def comfyui_callback(self, payload: bytes | None) -> None:
        """ComfyUI's callback (contract §2, §3)."""
        self.signals += 1
        self.watch.take(payload)

    @workflow.signal(name=CANCEL_SIGNAL)
    @any_payload
    def cancel_by_signal(self, payload: bytes | None) -> None:
        """The update `cancel_task` without an answer, for callers that are workflows (contract §8)."""
        order = self.ordered(payload, CancelTask)
        if order is not None:
            self.stop.ask(order.reason)

    def ordered(self, payload: bytes | None, model: type[Ordered]) -> Ordered | None:
        """What a signal orders; what cannot be read is counted. Older workers did not know such signals."""
        if not workflow.patched("orders-by-signal"):
            return None
        self.signals += 1
        order = order_in(payload, model)
        if order is None:
            self.watch.refuse()
        return order

    @workflow.update
    async def cancel_task(self, request: CancelTask) -> CancelTaskOutcome:
        """Stop the task: `accepted`, or `too_late` where it was delivered or has ended. Idempotent."""
        return await self.stop.cancel_task(request.reason)

    @cancel_task.validator
    def refuse_bad_cancel(self, request: CancelTask) -> None:
        """Reached only with one valid argument: anything else is refused before it (pitfall 3)."""

    @workflow.update
    async def wait_until_held(self, request: WaitUntilHeld) -> StartAnswer:
        """Answered once credits are held, a price is to be confirmed, or the task has ended. It changes nothing."""
        return await self.record.answers.given()

    @wait_until_held.validator
    def refuse_bad_wait(self, request: WaitUntilHeld) -> None:
        """Reached only with one valid argument: anything else is refused before it (pitfall 3)."""

    @workflow.query
    def credits(self) -> CreditsSummary:
        """Points estimated, held, charged and returned (contract §8)."""
        return self.hold.summary()

    # The end

    async def close_to_cancel(self) -> None:
        """No cancel from here: the job has delivered. A renewal in flight ends first, which may take an hour.

        Raises TaskFailed `credit_exhausted`.
        """
        self.stop.close()
        self.outside.resume()
        await self.hold.settled_renewal()

    def result_of(self, outcome: Outcome) -> Result:
        """The run's result. Raises ApplicationError where the task failed."""
        if isinstance(outcome.end, TaskFailed):
            raise self._failure(outcome.end)
        status = TaskStatus.COMPLETED if outcome.end is None else TaskStatus.CANCELLED
        if outcome.row is not None:
            status = outcome.row.status
            if status is TaskStatus.FAILED:
                raise self._failure(TaskFailed.by_row(outcome.row.error))
        if status is TaskStatus.COMPLETED:
            self.stop.overrule()
        return self.result(status)

    def _failure(self, end: TaskFailed) -> ApplicationError:
        return ApplicationError(str(end), self.result(TaskStatus.FAILED), type=end.code.value, non_retryable=True)

    # Long runs

    async def continue_as_new_if_long(self) -> bool:
        """Continue as new where the history is long, never with a cancel pending or a call in flight (pitfall 22).

        A renewal, a give-back and a job's cancel may hang for hours: they are suspended, and the next run repeats them.
        One that has just begun is waited for: under a flood of callbacks every run is long from its first task on.
        Returns True where it waited and did not continue: the caller checks everything again. Within one workflow task
        the SDK handles signals first, then a cancellation; a run that ended on the signals would never see it. So the
        run ends on a timer, which a stop that arrived with the signals interrupts.
        """
        self._waits_for_calls = False
        if not self._may_try_to_continue():
            return False
        if self._has_calls() and workflow.patched("calls-answered-before-continuing"):
            await workflow.wait_condition(lambda: True)  # until each call that is due has begun
            self._waits_for_calls = self.outside.has_new_calls()
            if self._waits_for_calls:
                return False
        self.watch.stop_polling()
        await self.outside.suspend()
        moment = timedelta(milliseconds=1)
        if await self.outside.wait_for(moment, lambda: self.stop.requested, summary="wait: continue as new"):
            return True
        await workflow.wait_condition(lambda: True)  # until what arrived with the timer was handled too
        if self._may_continue():
            workflow.continue_as_new(self._continuation())
        self.resume_calls()
        return True

    def resume_calls(self) -> None:
        """Repeat the calls that were suspended, in this run or by the one before."""
        self.outside.resume()
        self.attempts.resume()
        self.hold.resume()

    def _continuation(self) -> Run:
        state = {
            "policy": self.policy,
            "run_number": self.outside.call_for.run_number + 1,
            "record": self.record.carry(),
            "watch": self.watch.carry(),
            "clock": self.clock.carry(),
            "hold": self.hold.carry(),
            "jobs": self.attempts.carry(),
            "retry_at": self.attempts.retry_at,
            "price": self.price_state,
            "models": self.models,
        }
        # A copy keeps the fields that a worker of another version added.
        return self.argument_of_next_run((self.task.carried or Continuation()).model_copy(update=state))

    def is_long(self) -> bool:
        """Whether it is time to leave the history behind."""
        info = workflow.info()
        return (
            info.is_continue_as_new_suggested()
            or info.get_current_history_length() >= self.policy.continue_as_new_events
            or self.signals >= self.policy.continue_as_new_signals
        )

    def has_waited(self) -> bool:
        """Whether the run is long and has waited for its calls: it may try to continue as new again."""
        return self._waits_for_calls and not self.outside.has_new_calls()

    def _may_try_to_continue(self) -> bool:
        if not self.is_long() or self.stop.requested or not workflow.all_handlers_finished():
            return False
        return not self._has_calls() or workflow.patched("continues-while-calls-hang")

    def _has_calls(self) -> bool:
        """Whether a renewal or another background call is in flight, or begins in this workflow task."""
        return self.hold.is_renewing() or self.outside.has_background_calls()

    def _may_continue(self) -> bool:
        return not self.stop.requested and not self.outside.has_background_calls() and workflow.all_handlers_finished()

    # Queries and results

    def progress_fields(self) -> dict[str, Any]:
        """The fields that both `progress` queries share."""
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
            "as_of": self.record.as_of,
            "job_id": state.job_id,
            "attempts": state.attempts,
            "error_details": state.error,
            "callbacks_refused": self.watch.state.callbacks_refused,
        }

    def result_fields(self, status: TaskStatus) -> dict[str, Any]:
        """The fields that both results share (contract §8)."""
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
