"""Gives back what a run left behind that ended without its own clean-up: terminated, timed out, vanished (pitfall 7).

The task's row and the run's history say what was requested (`comfyui_temporal/contracts/requests.py`). The mechanisms
of a task's own undo give it back. If the hold turns out to be committed, the task had been delivered: it is completed,
and nothing is taken back.
"""

from __future__ import annotations

from typing import Any, Final

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.closed_runs import ClosedRunActivities
from activities.credits import CreditsActivities
from activities.datasets import DatasetActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.continuation import ClockState, JobUpdate, RecordState
from comfyui_temporal.contracts.errors import Answer, FailureCode
from comfyui_temporal.contracts.give_back import (
    GiveBackOrder,
    GiveBackResult,
    GiveBackRun,
    Orphans,
    give_back_id_of,
    outcome_of,
)
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.requests import RequestedJob, RequestOutcome
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import TaskRow, TaskState, TaskWrite
from comfyui_temporal.contracts.tasks import CreditsSummary, TaskInput, TaskStatus
from workflows.alarm import Alarm
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.failures import RowEnded, TaskFailed
from workflows.guards import input_invalid, validated
from workflows.job_clock import JobClock
from workflows.job_routes import ROUTES
from workflows.outside_call import HEARTBEAT_TIMEOUT, RETRY, STORE_TIMEOUT, OutsideCall, TaskFor
from workflows.row_look import RowRead
from workflows.settlement import Settlement
from workflows.step_labels import POLL
from workflows.stop import Stop
from workflows.task_record import TaskRecord
from workflows.training_dataset import DELETE_TIMEOUT
from workflows.undo import Undo

LIVES_KNOWN: Final = "lives-known-to-the-charges-of-a-give-back"
CHARGED_TO_THE_END: Final = "left-charges-finished"
CHARGE_TOLD: Final = "left-charge-told"
LEDGER_READ: Final = "ledger-read-by-give-back"
LEDGER_READ_FIRST: Final = "ledger-read-before-left-charges"


class ManualCall(OutsideCall):
    """Calls with the rollback scope, under keys that the run itself never used with another body."""

    def __init__(self, task: TaskFor, stop: Stop) -> None:
        super().__init__(task, stop)
        self.call_for = self.call_for.model_copy(update={"is_rollback": True})

    def key(self, step: str, n: int | str) -> str:
        return super().key("give_back" if step == "cancel" else step, n)


class OrphanedInput(TaskInput):
    """The task of a run that has ended, as far as its row says. Calls are made in its name."""

    row_scene: Scene

    @property
    def scene(self) -> Scene:
        return self.row_scene

    @classmethod
    def of_row(cls, row: TaskRow) -> OrphanedInput:
        shared = row.model_dump(include=set(TaskInput.model_fields))
        return cls(row_scene=row.scene, **shared)


class OrphanedRecord(TaskRecord):
    """The record of a task whose run is over, written in the name of the run that claimed it."""

    def __init__(self, task: TaskInput, outside: OutsideCall, row: TaskRow) -> None:
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


class OrphanedTask:
    """One task whose run is over: what it requested is undone, then its end is published."""

    def __init__(self, orphans: Orphans, reason: str) -> None:
        self._orphans = orphans
        self._reason = reason
        task = OrphanedInput.of_row(orphans.row)
        self._routes = ROUTES[task.scene]
        self._stop = Stop()
        self._outside = OutsideCall(task, self._stop)
        manual = ManualCall(task, self._stop)
        self._record = OrphanedRecord(task, self._outside, orphans.row)
        eta_minutes = SCENES[task.scene].eta_minutes[task.priority]
        clock = JobClock(self._record, ClockState(), self._outside.limits, default_eta_minutes=eta_minutes)
        self._ended_before = {hold.n for hold in orphans.holds if hold.outcome is RequestOutcome.ENDED}
        """Holds that the run had given back, and published as such."""
        look = RowRead(manual, orphans.row)
        if orphans.row.lives and workflow.patched(LIVES_KNOWN):
            self._outside.earlier.add(manual.earlier.life)
        self._hold = CreditHold(task, manual, self._record, workflow.now, orphans.hold_state(), look)
        self._price = orphans.price_before if orphans.cost is None else orphans.cost
        self._hold.ends.price = self._price
        self._hold.ends.charges = max(orphans.charges_before, orphans.charges_sent)
        self._attempts = Attempts(self._routes, self._outside, self._record, clock, self._stop, Alarm(), orphans.jobs)
        self._settlement = Settlement(task, self._outside, self._record, self._hold)
        self._undo = Undo()
        self._undo.push("cancel job", self._attempts.cancel_all)
        self._undo.push("cancel hold", self._hold.give_back)

    async def given_back(self) -> GiveBackResult:
        """Give everything back. A cancellation is recorded and changes nothing: a give-back is an undo.

        Raises RowEnded where another give-back has claimed the row, or ended it.
        """
        return await self._stop.uninterrupted(self._steps(), self._record.write_facts())

    async def _steps(self) -> GiveBackResult:
        self._stop.close()
        self._record.waiting_for("job and credits to be given back", None)
        # A constant text: a second give-back repeats key and body of the first.
        await self._undo.all("its run ended without its own clean-up")
        await self._finish_charges()
        await self._delete_snapshot()
        self._hold.ends.close()
        credits = self._record.credits_changed(self._hold.summary())
        is_charged = bool(self._hold.state.charged) or (credits.charged is None and self._may_be_charged())
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
        return GiveBackResult(task_id=self._orphans.row.task_id, outcome=outcome, credits=credits)

    def _may_be_charged(self) -> bool:
        """Whether the run had begun to charge and nothing shows that this had no effect."""
        orphans = self._orphans
        if orphans.cost is None:
            return False
        if orphans.charges or orphans.row.lives:
            return True  # a charge, or the commit of another life
        committed = [hold for hold in self._hold.state.asked if hold.pre_deduct_id == orphans.commit_of]
        return not committed or not committed[0].told_back

    async def _publish_own_end(self) -> None:
        """Nothing was charged: publish the end that the run came to by itself, or that it came to none."""
        end = self._orphans.own_end
        if end is None or (end.status is TaskStatus.COMPLETED and self._record.state.credits.charged is None):
            self._record.failed(TaskFailed(FailureCode.INTERNAL, self._sentence()))
        elif end.status is TaskStatus.COMPLETED:
            await self._publish_completed()
        elif end.status is TaskStatus.CANCELLED:
            self._record.end(TaskStatus.CANCELLED, EventType.CANCELLED, message="The task was cancelled.")
        else:
            self._record.failed(TaskFailed(end.code or FailureCode.INTERNAL, end.message))

    async def _publish_difference(self, credits: CreditsSummary) -> None:
        """Make the points of all events add up to what was charged, also where the run published only some of them."""
        if credits.charged is None:
            return
        await self._record.all_written()
        published = await workflow.execute_activity_method(
            ClosedRunActivities.published_points,
            GiveBackOrder(task_id=self._orphans.row.task_id),
            start_to_close_timeout=STORE_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=RETRY,
            summary=f"{self._outside.labels.record}: points published before",
        )
        difference = -credits.charged - published
        if difference:
            self._record.publish(
                "difference",
                EventType.CREDITS,
                credits_delta=difference,
                message=f"{abs(difference)} points {'came back' if difference > 0 else 'were charged'}.",
            )

    def _sentence(self) -> str:
        how, reason = self._orphans.how, f" ({self._reason})" if self._reason else ""
        return f"The task's run ended without its own clean-up ({how}); job and credits were given back{reason}."

    async def _finish_charges(self) -> None:
        """Charge the rest of the price of a task that was being charged after its hold had ended.

        The ledger is read first: earlier lives may have charged a part of it.
        """
        if workflow.patched(LEDGER_READ_FIRST):
            await self._hold.forgotten.give_back()
            await self._hold.forgotten.look_for_charges(self._orphans.charges_before)
            await self._finish_requested(has_read=True)
            return
        if self._orphans.charges and not workflow.patched(CHARGED_TO_THE_END):
            await self._repeat_charges()
        else:
            await self._finish_requested(has_read=False)
        if workflow.patched(LEDGER_READ):
            await self._hold.forgotten.give_back()

    async def _finish_requested(self, *, has_read: bool) -> None:
        orphans, end = self._orphans, self._orphans.own_end
        await self._settlement.finish(
            orphans.charges,
            self._price,
            is_refused=orphans.charge_refused or orphans.price_before is not None,
            has_read=has_read,
            was_completed=end is not None and end.status is TaskStatus.COMPLETED,
        )

    async def _repeat_charges(self) -> None:
        for post in self._orphans.charges:
            answer = await self._outside.until_answered(
                CreditsActivities.charge, post, summary=self._outside.labels.charge
            )
            if answer is not None and answer.reply is not None:
                self._hold.add_charged(post.body.amount)

    async def _delete_snapshot(self) -> None:
        if self._orphans.snapshot is not None:
            await self._outside.visible(
                DatasetActivities.delete_snapshot,
                self._orphans.snapshot,
                summary=self._outside.labels.delete_snapshot,
                attempt_timeout=DELETE_TIMEOUT,
            )

    def _publish_settled(self) -> None:
        for hold in self._hold.state.asked:
            if hold.pre_deduct_id and hold.n not in self._ended_before:
                self._hold.publish_held(hold)
        self._settlement.settled(None)

    async def _publish_completed(self) -> None:
        """It was charged, so it was delivered: publish the result."""
        delivered = await self._delivered()
        if delivered is not None:
            self._record.delivered(delivered.result_urls, delivered.output)
        elif self._orphans.own_end is not None:
            self._record.delivered(self._orphans.own_end.result_urls, self._orphans.own_end.output)
        self._record.completed()

    async def _delivered(self) -> JobUpdate | None:
        for job in reversed(self._orphans.jobs):
            update = await self._polled(job)
            if update is not None and update.succeeded:
                return update
        return None

    async def _polled(self, job: RequestedJob) -> JobUpdate | None:
        if job.job_id is None:
            return None
        call = JobCall(call_for=self._outside.call_for, job_id=job.job_id)
        answer: Answer[Any] | None = await self._outside.until_answered(self._routes.get, call, summary=POLL)
        return self._routes.update_from_state(answer.reply) if answer is not None and answer.reply is not None else None


@workflow.defn
class GiveBackWorkflow:
    """Gives back one task; started by a rollback (contract §7) or by the reconciler."""

    @workflow.run
    async def run(self, order: GiveBackRun) -> GiveBackResult:
        order = validated(order, GiveBackRun)
        if workflow.info().workflow_id != give_back_id_of(order.task_id):
            raise input_invalid("task_id: the workflow id must be 'give-back-' followed by it")
        orphans = await workflow.execute_activity_method(
            ClosedRunActivities.orphans,
            order,
            start_to_close_timeout=STORE_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=RETRY,
            summary="0 read what was left",
        )
        row = orphans.row
        if row.ended_at is not None:  # its run published the end itself, which it does after its clean-up only
            return GiveBackResult(
                task_id=row.task_id, outcome=outcome_of(row.credits, "nothing_held"), credits=row.credits
            )
        try:
            return await OrphanedTask(orphans, order.reason).given_back()
        except RowEnded:  # this run was reset: what it has read may be outdated
            workflow.continue_as_new(order)
