"""The only source of a task's state: queries, search attributes, UI details and events all come from it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import SearchAttributeKey, SearchAttributePair, SearchAttributeUpdate
from temporalio.exceptions import FailureError

from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.comfyui import SnapshotReference, TrainingOutput
from comfyui_temporal.contracts.continuation import HeldProgress, JobUpdate, RecordState
from comfyui_temporal.contracts.errors import ErrorDetails, ExceptionCode, FailureCode
from comfyui_temporal.contracts.fields import shortened
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import (
    ClaimOutcome,
    Fact,
    PriceToConfirm,
    RecordedPrices,
    TaskClaim,
    TaskException,
    TaskRow,
    TaskState,
    TaskWrite,
)
from comfyui_temporal.contracts.tasks import (
    INPUT_MEMO,
    CreditsSummary,
    TaskInput,
    TaskStatus,
    input_document,
    input_sha256_of,
)
from comfyui_temporal.contracts.ticks import report_taken
from workflows.backlog import Backlog
from workflows.details import current_details
from workflows.failures import TaskFailed
from workflows.guards import input_invalid
from workflows.outside_call import OutsideCall
from workflows.start_answer import StartAnswers
from workflows.step_labels import ACCEPT, wait_in

PROGRESS_EVERY: Final = timedelta(seconds=1)
ESTIMATE_PUBLISHED: Final = "new-estimate-published-by-itself"
_STATUS: Final = SearchAttributeKey.for_keyword("TaskStatus")
_STAGE: Final = SearchAttributeKey.for_keyword("TaskStage")


class TaskRecord:
    """State, facts that are not written yet, and the one writer that writes them in order.

    A write never delays a step or its settlement (decision 3): only the end of the run waits for it.
    """

    def __init__(self, task: TaskInput, outside: OutsideCall, state: RecordState) -> None:
        self._task = task
        self._outside = outside
        self._own = state
        self._backlog = Backlog(state)
        self._decided_at = 0
        self._is_estimate_new = False
        """Whether the job's estimated time or GPU slots have changed since the last event of its progress."""
        self._waits: tuple[str, datetime | None] = ("", None)
        self._claim: TaskClaim | None = None
        self.answers = StartAnswers(lambda: self.state)

    @property
    def state(self) -> TaskState:
        return self._own.state

    def carry(self) -> RecordState:
        return self._own

    # Row 0: the claim

    async def claim(self, in_doubt: str | None = None) -> ClaimOutcome:
        """Claim the task's id for this run; the store writes the first event with it.

        The answer has the task's policy, and the tenant's models that the task uses. `in_doubt`: why the input is
        refused, unless a worker accepted it before the run was reset.

        Raises TaskFailed `task_exists` where another run holds the id, `quota_exceeded` where one of the tenant's
        limits is used up; ApplicationError `input_invalid` where no worker accepted an input that is in doubt. Nothing
        was called then, and nothing is undone.
        """
        claim = self._claim
        assert claim is not None
        model_ids = list(self._task.models.values())
        once = {"input": input_document(self._task), "model_ids": model_ids, "only_if_known": in_doubt is not None}
        first = claim.model_copy(update=once)
        outcome = await self._outside.write_store(TaskStoreActivities.claim, first, summary=ACCEPT)
        if outcome.earlier_life is not None:
            self._outside.earlier.add(outcome.earlier_life)
        if outcome.refused is not None:
            raise self._claim_refused(FailureCode.QUOTA_EXCEEDED, outcome.refused)
        if not outcome.claimed and in_doubt is not None:
            raise input_invalid(in_doubt)
        if not outcome.claimed:
            raise self._claim_refused(
                FailureCode.TASK_EXISTS,
                f"Task {claim.task_id} exists: another run holds its id. Use a new task_id, or read that run's result.",
            )
        self._publish_identity(claim, outcome.input_sha256 or claim.input_sha256)
        return outcome

    def _claim_refused(self, code: FailureCode, sentence: str) -> TaskFailed:
        """There is no row to publish this end in: only a start that waits gets an answer."""
        refused = TaskFailed(code, sentence)
        self.state.status = TaskStatus.FAILED
        self.state.error = refused.error_details
        self.answers.tell()
        return refused

    def set_claim(self, resolution: str) -> None:
        """Keep the claim: each write sends it too, for a store that was restored and has lost the row.

        A continued run's own argument and start are not those that were claimed: the first run's are carried.
        """
        info, own = workflow.info(), self._own
        own.input_sha256 = own.input_sha256 or input_sha256_of(self._task)
        own.claimed_at = own.claimed_at or info.workflow_start_time
        self._claim = TaskClaim(
            task_id=self._task.task_id,
            tenant_id=self._task.tenant_id,
            user_id=self._task.user_id,
            scene=self._task.scene,
            template_id=self._task.template_id,
            priority=self._task.priority,
            resolution=resolution,
            workflow_id=info.workflow_id,
            first_execution_run_id=info.first_execution_run_id,
            input_sha256=own.input_sha256,
            at=own.claimed_at,
        )

    def _publish_identity(self, claim: TaskClaim, input_sha256: str) -> None:
        """Memo and search attributes, where the start did not set them: a run needs no start options."""
        if workflow.memo_value(INPUT_MEMO, None) != input_sha256:
            workflow.upsert_memo({INPUT_MEMO: input_sha256})
        wanted = {
            "TaskId": claim.task_id,
            "TenantId": claim.tenant_id,
            "UserId": claim.user_id,
            "Scene": claim.scene.value,
            "TemplateId": claim.template_id,
            "TaskPriority": claim.priority.value,
            "TaskStatus": TaskStatus.QUEUED.value,
        }
        present = workflow.info().typed_search_attributes
        keys = {name: SearchAttributeKey.for_keyword(name) for name in wanted}
        if any(present.get(key) != wanted[name] for name, key in keys.items()):
            pairs = [SearchAttributePair(key, wanted[name]) for name, key in keys.items()]
            workflow.upsert_search_attributes([pair.key.value_set(pair.value) for pair in pairs])
        self._own.written_status = TaskStatus.QUEUED
        self._own.written_stage = present.get(_STAGE)

    # What happened

    def attempted(self, number: int) -> None:
        """A job is requested: stage and progress of the one before are not its own."""
        self.state.attempts = number
        self.state.stage = None
        self.state.progress = 0.0
        self.state.taken = None
        self._own.held_back = self._own.last_news_at = None

    def job_accepted(self, job_id: str | None, gpu_slots: int | None) -> None:
        self.state.job_id = job_id
        self.state.gpu_slots = gpu_slots

    def job_failed(self, details: ErrorDetails | None) -> None:
        """The error of the job that ended without a delivery; None once the next one may be requested.

        Nothing that the job still reports is its task's: its ticks are none from the next write on.
        """
        self.state.error = details
        if details is not None:
            self.state.taken = None

    def estimated(self, minutes: float) -> None:
        self.state.estimated_time = minutes

    def confirming(self, confirmation: PriceToConfirm | None) -> None:
        """The price that waits to be confirmed, or None."""
        self.state.confirmation = confirmation
        self.answers.tell()

    def credits_changed(self, credits: CreditsSummary) -> CreditsSummary:
        self.state.credits = credits
        return credits

    def delivered(self, result_urls: list[str], output: TrainingOutput | None) -> None:
        self.state.result_urls, self.state.output = result_urls, output

    def completed(self) -> None:
        """Publish the end of a delivered task."""
        self.state.error = None
        self.state.progress = 100.0
        self.end(
            TaskStatus.COMPLETED,
            EventType.COMPLETED,
            result_urls=self.state.result_urls or None,
            output=self.state.output,
        )

    def submitted(self, stage: str | None) -> None:
        """A job was accepted: it is queued until it reports otherwise."""
        self.state.status = TaskStatus.QUEUED
        self.state.stage = stage
        self.state.progress = 0.0
        self.state.next_eta = self.state.queue_position = None
        self._own.last_shown = self._shown()
        self.update_search_attributes()

    def apply(self, update: JobUpdate, *, attempt_changed: bool = False) -> None:
        """Apply a job's update; progress never goes back within an attempt and stage."""
        state = self.state
        self._own.last_news_at = workflow.now()
        state.taken = report_taken(update)
        estimate = (state.estimated_time, state.gpu_slots)
        stage_changed = update.stage != state.stage or attempt_changed
        reached = update.progress if update.progress is not None else (0.0 if stage_changed else state.progress)
        state.progress = reached if stage_changed else max(state.progress, reached)
        state.status = update.status
        state.stage = update.stage
        state.next_eta = update.next_eta
        state.queue_position = update.queue_position
        state.estimated_time = update.estimated_time or state.estimated_time
        state.gpu_slots = update.gpu_slots if update.gpu_slots is not None else state.gpu_slots
        self._is_estimate_new |= (state.estimated_time, state.gpu_slots) != estimate
        self.update_search_attributes()

    def heard(self, update: JobUpdate, *, at: datetime) -> None:
        """Take over figures that the gateway has stored and published."""
        self.apply(update)
        self._own.last_news_at = at
        self._own.last_shown = self._shown()

    @property
    def as_of(self) -> datetime | None:
        """How old stage and figures are; None before the present attempt's job has reported."""
        return self._own.last_news_at

    def publish(self, key: str, event: EventType, **fields: Any) -> None:
        """Add a fact, named by its key; the writer writes it."""
        state = self.state
        self._add(
            Fact(
                key=key,
                event=event,
                ts=workflow.now(),
                attempt=max(state.attempts, 1),
                status=state.status,
                stage=state.stage,
                progress=state.progress,
                next_eta=state.next_eta,
                queue_position=state.queue_position,
                **fields,
            )
        )

    def priced(self, prices: RecordedPrices, *, attempt: int) -> None:
        """Record the prices of an attempt, with an exception record where they differ (contract §5)."""
        self.state.prices = prices
        stated = {price for price in (prices.job, prices.estimate, prices.table) if price is not None}
        if len(stated) > 1:
            self.record_exception(
                f"prices_differ:{attempt}",
                ExceptionCode.PRICES_DIFFER,
                f"The job's price is {prices.job}, the estimate {prices.estimate}, the table's {prices.table} points.",
                **prices.model_dump(),
            )

    def dataset_copied(self, snapshot: SnapshotReference) -> None:
        self.state.dataset = snapshot

    def publish_progress(self, update: JobUpdate, *, is_new_stage: bool) -> None:
        """Publish every change of stage; progress within a stage at most once a second (step table 1, row 6).

        Earlier progress is held back, and published when the second is over unless newer progress came.
        """
        self._own.held_back = None
        if self._shown() == self._own.last_shown and update.error is None and not self._has_new_estimate():
            return
        last = self._own.last_progress_at
        if not is_new_stage and last is not None and workflow.now() - last < PROGRESS_EVERY:
            self._own.held_back = HeldProgress(job_id=update.job_id, sequence=update.sequence)
            return
        self._publish_progress(update.job_id, update.sequence, is_change=is_new_stage or update.error is not None)

    def _publish_progress(self, job_id: str, sequence: int, *, is_change: bool = False) -> None:
        self._own.last_shown = self._shown()
        self._own.last_progress_at = workflow.now()
        self._is_estimate_new = False
        key = f"{job_id}:{sequence}"
        self.publish(key, EventType.RUNNING, job_id=job_id, sequence=sequence, is_change=is_change)

    def _has_new_estimate(self) -> bool:
        """Without an event the row would not have it, and would take the job's next figures for more than a tick."""
        return self._is_estimate_new and workflow.patched(ESTIMATE_PUBLISHED)

    def _shown(self) -> str:
        state = self.state
        return f"{state.status} {state.stage} {int(state.progress)} {state.next_eta} {state.queue_position}"

    def record_exception(self, key: str, code: ExceptionCode | FailureCode, message: str, **details: Any) -> None:
        """Add an exception record for ops; it does not end the task."""
        self._touch()
        self._backlog.add_exception(
            TaskException(key=key, code=code.value, message=shortened(message), details=details, ts=workflow.now())
        )

    def end_decided(self) -> None:
        """The end is decided in this workflow task: history holds the decision once a later one has begun."""
        self._own.held_back = None
        self._decided_at = workflow.info().get_current_history_length()

    def end(self, status: TaskStatus, event: EventType, **fields: Any) -> None:
        """Publish the last fact; nothing is written after it."""
        self.state.status = status
        self.state.next_eta = self.state.queue_position = self.state.confirmation = None
        self.update_search_attributes()
        self.publish("end", event, is_end=True, **fields)
        self.answers.tell()

    def failed(self, failure: TaskFailed) -> None:
        self.state.error = failure.error_details
        self.record_exception("end", failure.code, str(failure))
        self.end(TaskStatus.FAILED, EventType.FAILED, error=failure.error_details, message=shortened(str(failure)))

    def copy_row(self, row: TaskRow) -> None:
        """An earlier life has ended the task: this run reports the state of its row."""
        self._own.state = TaskState.model_validate(row.model_dump(include=set(TaskState.model_fields)))
        self._own.held_back = None
        self.update_search_attributes()
        self.answers.tell()

    def waiting_for(self, what: str, until: datetime | None) -> None:
        """Show what the task waits for now, and until when, in the UI."""
        if (what, until) != self._waits:
            self._waits = (what, until)
            self._show()

    def _show(self) -> None:
        waits_for, until = self._waits
        workflow.set_current_details(
            current_details(self.state, waits_for=waits_for, until=until, last_news_at=self._own.last_news_at)
        )

    def update_search_attributes(self) -> None:
        """Set the search attributes that differ from the state; each upsert is a history event."""
        self._touch()
        updates: list[SearchAttributeUpdate[Any]] = []
        if self.state.status != self._own.written_status:
            self._own.written_status = self.state.status
            updates.append(_STATUS.value_set(self.state.status.value))
        if self.state.stage != self._own.written_stage:
            self._own.written_stage = self.state.stage
            updates.append(_STAGE.value_set(self.state.stage) if self.state.stage else _STAGE.value_unset())
        if updates:
            workflow.upsert_search_attributes(updates)

    # The one writer

    async def write_facts(self) -> None:
        """Write what was published, in order, for as long as the run lives."""
        while True:
            await workflow.wait_condition(lambda: not self._backlog.is_empty or self._own.held_back is not None)
            if self._backlog.is_empty:
                await self._publish_held_back()
            else:
                await self._write_batch()

    async def _publish_held_back(self) -> None:
        """Wait until held back progress may be published, or is published with another fact; one timer a burst."""
        last = self._own.last_progress_at
        rest = last + PROGRESS_EVERY - workflow.now() if last is not None else timedelta(0)
        if rest > timedelta(0):
            try:
                await workflow.wait_condition(
                    lambda: not self._backlog.is_empty or self._own.held_back is None,
                    timeout=rest,
                    timeout_summary=wait_in(self._outside.labels.record, "progress held back"),
                )
            except TimeoutError:
                pass
            else:
                return
        held = self._own.held_back
        if held is not None:
            self._own.held_back = None
            self._publish_progress(held.job_id, held.sequence)

    async def all_written(self) -> None:
        await workflow.wait_condition(lambda: self._backlog.is_empty)

    async def _write_batch(self) -> None:
        facts, exceptions = self._backlog.take()
        write = TaskWrite(
            task_id=self._task.task_id,
            first_execution_run_id=workflow.info().first_execution_run_id,
            state=self.state.model_copy(deep=True),
            facts=facts,
            exceptions=exceptions,
            run_number=self._outside.call_for.run_number,
            written_version=self._own.written_version,
            claim=self._claim,
        )
        try:
            await self._outside.write_store(
                TaskStoreActivities.write,
                write,
                summary=self._outside.labels.record,
                is_recorded=self._is_recorded(facts),
            )
            self._own.written_version = write.state.version
        except FailureError as error:
            # The store will never accept these, because the row is gone for example. Money never depends on events.
            workflow.logger.error("The task store refused %d facts: %s", len(facts), error)
        self._backlog.written()

    def _is_recorded(self, facts: list[Fact]) -> bool:
        """Whether history holds the decision behind these facts, so that it cannot change."""
        is_end = any(fact.is_end for fact in facts)
        return not is_end or workflow.info().get_current_history_length() > self._decided_at

    def _touch(self) -> None:
        self.state.version += 1
        self._show()

    def _add(self, fact: Fact) -> None:
        self._touch()
        self._backlog.add(fact)
