"""Gives back what a run left that ended without its own clean-up: terminated, timed out, or vanished (pitfall 7).

The task's row and the run's history say what was begun; the same parts that a task's own undo is made of give it back.
Where the hold turns out to be committed, the task had been delivered: it is completed, and nothing is taken back.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import FailureError

from activities.closed_runs import ClosedRunActivities
from activities.credits import CreditsActivities
from activities.datasets import DatasetActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.continuation import AskedJob, ClockState, HoldState, JobUpdate, RecordState
from comfyui_temporal.contracts.errors import Answer, FailureCode
from comfyui_temporal.contracts.give_back import (
    GiveBackOrder,
    GiveBackResult,
    GiveBackRun,
    LeftBehind,
    give_back_id_of,
    outcome_of,
)
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.prices import DEFAULT_ETA_MINUTES
from comfyui_temporal.contracts.task_store import TaskRow, TaskState, TaskWrite
from comfyui_temporal.contracts.tasks import (
    CreditsSummary,
    EventType,
    Hyperparameters,
    ImageTask,
    TakenDataset,
    TaskStatus,
    TrainingTask,
)
from workflows.alarm import Alarm
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.failures import TaskFailed
from workflows.guards import input_invalid, validated
from workflows.job_clock import JobClock
from workflows.job_routes import IMAGE_ROUTES, TRAINING_ROUTES
from workflows.outside_call import HEARTBEAT_TIMEOUT, OutsideCall, TaskFor
from workflows.row_look import RowRead
from workflows.settlement import Settlement
from workflows.step_labels import POLL
from workflows.stop import Stop
from workflows.task_record import TaskRecord
from workflows.undo import Undo

LOOK_TIMEOUT: Final = timedelta(minutes=1)
LOOK_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
DELETE_TIMEOUT: Final = timedelta(minutes=10)
CHARGED_TO_THE_END: Final = "left-charges-finished"
CHARGE_TOLD: Final = "left-charge-told"
LEDGER_READ: Final = "ledger-read-by-give-back"


class HandCall(OutsideCall):
    """Calls made by hand: with the rollback scope, and under keys that the run itself never used with another body."""

    def __init__(self, task: TaskFor, stop: Stop) -> None:
        super().__init__(task, stop)
        self.call_for = self.call_for.model_copy(update={"is_rollback": True})

    def key(self, step: str, n: int | str) -> str:
        return super().key("give_back" if step == "cancel" else step, n)


class LeftRecord(TaskRecord):
    """The record of a task whose run is over, written in the name of the run that claimed it."""

    def __init__(self, task: ImageTask | TrainingTask, outside: OutsideCall, row: TaskRow) -> None:
        state = TaskState.model_validate(row.model_dump(include=set(TaskState.model_fields)))
        super().__init__(task, outside, RecordState(state=state, written_status=row.status, written_stage=row.stage))
        self._claimant = row.first_execution_run_id

    async def _write_batch(self) -> None:
        facts, exceptions = self._backlog.take()
        write = TaskWrite(
            task_id=self._task.task_id,
            first_execution_run_id=self._claimant,
            state=self.state.model_copy(deep=True),
            facts=facts,
            exceptions=exceptions,
        )
        try:
            await self._outside.write_store(TaskStoreActivities.write, write, summary=self._outside.labels.record)
        except FailureError as error:
            workflow.logger.error("The task store refused %d facts: %s", len(facts), error)
        self._backlog.written()


class LeftTask:
    """One task whose run is over: what it began is undone, then its end is told."""

    def __init__(self, left: LeftBehind, reason: str) -> None:
        self._left = left
        self._reason = reason
        task = _stand_in(left.row)
        self._routes = IMAGE_ROUTES if isinstance(task, ImageTask) else TRAINING_ROUTES
        self._stop = Stop()
        self._outside = OutsideCall(task, self._stop)
        by_hand = HandCall(task, self._stop)
        self._record = LeftRecord(task, self._outside, left.row)
        clock = JobClock(
            self._record,
            ClockState(),
            self._outside.limits,
            default_eta_minutes=DEFAULT_ETA_MINUTES[task.scene][task.priority],
        )
        holds = HoldState(
            asked=left.holds,
            granted_before=left.holds_before,
            estimated=left.row.credits.estimated,
            asked_again=left.asked_again,
        )
        self._ended_before = {hold.n for hold in left.holds if hold.resolved}
        """Holds that the run had given back, and told so."""
        look = RowRead(by_hand, left.row)
        self._hold = CreditHold(task, by_hand, self._record, workflow.now, holds, look)
        self._attempts = Attempts(self._routes, self._outside, self._record, clock, self._stop, Alarm(), left.jobs)
        self._settlement = Settlement(task, self._outside, self._record, self._hold)
        self._undo = Undo()
        self._undo.push("cancel job", self._attempts.cancel_all)
        self._undo.push("cancel hold", self._hold.give_back)

    async def given_back(self) -> GiveBackResult:
        """A cancellation is noted and not obeyed: a give-back is an undo."""
        return await self._stop.uninterrupted(self._walk(), self._record.write_facts())

    async def _walk(self) -> GiveBackResult:
        self._stop.close()
        self._record.waiting_for("job and credits to be given back", None)
        # The same words whoever asks: a second give-back repeats key and body of the first.
        await self._undo.all("its run ended without its own clean-up")
        await self._finish_charges()
        if workflow.patched(LEDGER_READ):
            await self._hold.forgotten.give_back("its run ended without its own clean-up")
        await self._delete_snapshot()
        self._hold.ends.close()
        credits = self._record.state.credits = self._hold.summary()
        is_charged = bool(self._hold.state.charged) or (self._left.cost is not None and credits.charged is None)
        if is_charged and workflow.patched(CHARGE_TOLD):
            self._publish_settled()
        if workflow.patched(LEDGER_READ):
            await self._publish_difference(credits)
        if is_charged:
            await self._publish_completed()
        else:
            await self._publish_own_end()
        await self._record.all_written()
        outcome = outcome_of(credits, "given_back")
        return GiveBackResult(task_id=self._left.row.task_id, outcome=outcome, credits=credits)

    async def _publish_own_end(self) -> None:
        """Nothing was charged: the end that the run came to by itself, else that it came to none."""
        end = self._left.own_end
        if end is None or (end.status is TaskStatus.COMPLETED and self._record.state.credits.charged is None):
            self._record.failed(TaskFailed(FailureCode.INTERNAL, self._sentence()))
        elif end.status is TaskStatus.COMPLETED:
            await self._publish_completed()
        elif end.status is TaskStatus.CANCELLED:
            self._record.end(TaskStatus.CANCELLED, EventType.CANCELLED, message="The task was cancelled.")
        else:
            self._record.failed(TaskFailed(end.code or FailureCode.INTERNAL, end.message))

    async def _publish_difference(self, credits: CreditsSummary) -> None:
        """What the events tell of points is what was charged, whatever the run has left untold."""
        if credits.charged is None:
            return
        await self._record.all_written()
        told = await workflow.execute_activity_method(
            ClosedRunActivities.told_points,
            GiveBackOrder(task_id=self._left.row.task_id),
            start_to_close_timeout=LOOK_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=LOOK_RETRY,
            summary=f"{self._outside.labels.record}: points published before",
        )
        difference = -credits.charged - told
        if difference:
            self._record.publish(
                "difference",
                EventType.CREDITS,
                credits_delta=difference,
                message=f"{abs(difference)} points {'came back' if difference > 0 else 'were charged'}.",
            )

    def _sentence(self) -> str:
        said = f" ({self._reason})" if self._reason else ""
        return (
            f"The task's run ended without its own clean-up ({self._left.how}); job and credits were given back{said}."
        )

    async def _finish_charges(self) -> None:
        """It was delivered after its hold had ended, and being charged: what is missing of its price is charged too."""
        if self._left.charges and not workflow.patched(CHARGED_TO_THE_END):
            await self._repeat_charges()
        else:
            await self._settlement.finish(self._left.charges, self._left.cost)

    async def _repeat_charges(self) -> None:
        for post in self._left.charges:
            answer = await self._outside.until_answered(
                CreditsActivities.charge, post, summary=self._outside.labels.charge
            )
            if answer is not None and answer.reply is not None:
                self._hold.state.charged += post.body.amount

    async def _delete_snapshot(self) -> None:
        if self._left.snapshot is not None:
            await self._outside.visible(
                DatasetActivities.delete_snapshot,
                self._left.snapshot,
                summary=self._outside.labels.delete_snapshot,
                attempt_timeout=DELETE_TIMEOUT,
            )

    def _publish_settled(self) -> None:
        for hold in self._hold.state.asked:
            if hold.pre_deduct_id and hold.n not in self._ended_before:
                self._hold.publish_held(hold)
        self._settlement.settled(None)

    async def _publish_completed(self) -> None:
        """It was charged, so it was delivered: what was made is handed out."""
        state = self._record.state
        delivered = await self._delivered()
        if delivered is not None:
            state.result_urls, state.output = delivered.result_urls, delivered.output
        elif self._left.own_end is not None:
            state.result_urls, state.output = self._left.own_end.result_urls, self._left.own_end.output
        state.error, state.progress = None, 100.0
        self._record.end(
            TaskStatus.COMPLETED, EventType.COMPLETED, result_urls=state.result_urls or None, output=state.output
        )

    async def _delivered(self) -> JobUpdate | None:
        for job in reversed(self._left.jobs):
            news = await self._asked(job)
            if news is not None and news.succeeded:
                return news
        return None

    async def _asked(self, job: AskedJob) -> JobUpdate | None:
        if job.job_id is None:
            return None
        call = JobCall(call_for=self._outside.call_for, job_id=job.job_id)
        answer: Answer[Any] | None = await self._outside.until_answered(self._routes.get, call, summary=POLL)
        return self._routes.news_of_state(answer.reply) if answer is not None and answer.reply is not None else None


@workflow.defn
class GiveBackWorkflow:
    """Gives back one task; started by hand (contract §7 rollback), or by who finds it."""

    @workflow.run
    async def run(self, order: GiveBackRun) -> GiveBackResult:
        order = validated(order, GiveBackRun)
        if workflow.info().workflow_id != give_back_id_of(order.task_id):
            raise input_invalid("task_id: the workflow id must be 'give-back-' followed by it")
        left = await workflow.execute_activity_method(
            ClosedRunActivities.left_behind,
            order,
            start_to_close_timeout=LOOK_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=LOOK_RETRY,
            summary="0 what was left",
        )
        row = left.row
        if row.ended_at is not None:  # it told its end itself, and does that after its clean-up only
            return GiveBackResult(
                task_id=row.task_id, outcome=outcome_of(row.credits, "nothing_held"), credits=row.credits
            )
        return await LeftTask(left, order.reason).given_back()


def _stand_in(row: TaskRow) -> ImageTask | TrainingTask:
    """The task by its row: whom calls are made for. What it was to make is no longer known, nor needed."""
    known: dict[str, Any] = row.model_dump(include={"task_id", "tenant_id", "user_id", "template_id", "priority"})
    if row.scene is Scene.IMAGE_GENERATE:
        return ImageTask(prompt="", **known)
    return TrainingTask(
        dataset=TakenDataset(dataset_id="unknown", source_uri="unknown"),
        hyperparameters=Hyperparameters(epochs=1, batch_size=1, learning_rate=1.0),
        **known,
    )
