"""What a run left, read from its history: every intent stands there before its effect (design, decision 1)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError

from activities.comfyui import ComfyUIActivities
from activities.credits import CreditsActivities
from activities.datasets import DatasetActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import CallFor, JobCall, Post, SnapshotOrder
from comfyui_temporal.contracts.comfyui import JobAccepted, JobRequest, TrainingAccepted, TrainingDraft
from comfyui_temporal.contracts.continuation import AskedHold, AskedJob, HoldState, ImageRun, TrainingRun, not_left_out
from comfyui_temporal.contracts.credits import (
    MIN_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    ChargeRequest,
    CommitRequest,
    HoldReply,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import Answer, FailureCode, sentences_of
from comfyui_temporal.contracts.give_back import LeftBehind, OwnEnd
from comfyui_temporal.contracts.handed_on import Doubtful
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TRAINING_WORKFLOW, ImageResult, TaskStatus, TrainingResult

Model = TypeVar("Model", bound=BaseModel)

_RUNS: Final[dict[str, type[ImageRun] | type[TrainingRun]]] = {
    IMAGE_WORKFLOW: ImageRun,
    TRAINING_WORKFLOW: TrainingRun,
}


class NotReadHere(Exception):
    """A history holds what this worker does not know; the text says where, and what that means."""


def _named(method: object) -> str:
    return str(getattr(method, "__name__", ""))


_KNOWN_CALLS: Final = frozenset(
    name
    for activities in (ComfyUIActivities, CreditsActivities, DatasetActivities, TaskStoreActivities)
    for name, method in vars(activities).items()
    if hasattr(method, "__temporal_activity_definition")
)
"""What runs of this version and of those before it call."""


def _number_in(key: str) -> int:
    """`n` of an idempotency key `{task_id}:{step}:{n}`."""
    return int(key.rpartition(":")[2])


class HistoryReading:
    """One run's history, event by event. A continued run's first event carries what its forerunners left."""

    def __init__(self, left: LeftBehind, converter: DataConverter) -> None:
        self._left = left
        self._holds = HoldState(asked=left.holds)
        self._converter = converter
        self._asked: dict[int, tuple[str, Any]] = {}
        """Scheduled event → the activity's name, and what was asked."""

    @property
    def left(self) -> LeftBehind:
        """What was read so far: of holds and jobs what can still be asked about, and never a list of files."""
        self._holds.leave_out_old()
        for job in self._left.jobs:
            job.lighten()
        self._left.holds, self._left.holds_before = self._holds.asked, self._holds.granted_before
        return self._left

    async def take(self, event: HistoryEvent) -> None:
        """Raises NotReadHere: what a newer worker wrote is never passed over, for it may hold credits or a job."""
        match event.event_type:
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                await self._take_carried(event)
            case Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                await self._take_call(event)
            case Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                await self._take_answer(event)
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                completed = event.workflow_execution_completed_event_attributes
                await self._take_result(completed.result.payloads, event)
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
                self._left.own_end = OwnEnd(status=TaskStatus.CANCELLED)
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                self._take_failure(event.workflow_execution_failed_event_attributes.failure)

    async def _take_carried(self, event: HistoryEvent) -> None:
        started = event.workflow_execution_started_event_attributes
        model = _RUNS.get(started.workflow_type.name)
        if model is None:
            raise self._unread(event, f"a workflow {started.workflow_type.name} is not known here")
        run: ImageRun | TrainingRun = await self._read(started.input.payloads, model, event)
        if isinstance(run, TrainingRun) and run.dataset.files_sha256 is not None:
            self._left.snapshot = self._snapshot_of(run)  # the gateway's list of files lies there
        carried = run.carried
        if carried is None:
            return
        self._holds, self._left.jobs = carried.hold, list(carried.jobs)
        if isinstance(run, TrainingRun) and carried.dataset.is_asked and not carried.dataset.is_deleted:
            self._left.snapshot = self._snapshot_of(run)

    def _snapshot_of(self, run: TrainingRun) -> SnapshotOrder:
        row, dataset = self._left.row, run.dataset
        call_for = CallFor(task_id=row.task_id, tenant_id=row.tenant_id, user_id=row.user_id, scene=row.scene)
        return SnapshotOrder(call_for=call_for, dataset_id=dataset.dataset_id, source_uri=dataset.source_uri)

    async def _take_call(self, event: HistoryEvent) -> None:
        scheduled = event.activity_task_scheduled_event_attributes
        name, payloads = scheduled.activity_type.name, scheduled.input.payloads
        at = event.event_time.ToDatetime(UTC)
        asked: Any = None
        if name not in _KNOWN_CALLS:
            raise self._unread(event, f"a call {name} is not known here")
        if name == _named(ComfyUIActivities.submit_job):
            asked = self._job(await self._read(payloads, Post[JobRequest], event), at)
        elif name == _named(ComfyUIActivities.create_training):
            asked = self._job(await self._read(payloads, Post[TrainingDraft], event), at)
        elif name == _named(CreditsActivities.pre_deduct):
            asked = self._hold(await self._read(payloads, Post[PreDeductRequest], event), at)
        elif name == _named(CreditsActivities.cancel_hold):
            cancel = await self._read(payloads, Post[CancelHoldRequest], event)
            asked = next((hold for hold in self._holds.asked if hold.pre_deduct_id == cancel.body.pre_deduct_id), None)
        elif name in (_named(ComfyUIActivities.cancel_job), _named(ComfyUIActivities.cancel_training)):
            call = await self._read(payloads, JobCall, event)
            asked = next((job for job in self._left.jobs if job.job_id == call.job_id), None)
        elif name == _named(CreditsActivities.commit):
            self._take_commit(await self._read(payloads, Post[CommitRequest], event))
        elif name == _named(CreditsActivities.charge):
            self._take_charge(await self._read(payloads, Post[ChargeRequest], event))
        elif name == _named(DatasetActivities.snapshot):
            self._left.snapshot = (await self._read(payloads, SnapshotOrder, event)).to_delete()
        elif name == _named(DatasetActivities.delete_snapshot):
            asked = self._left.snapshot
        self._asked[event.event_id] = (name, asked)

    def _job(self, post: Post[Any], at: datetime) -> AskedJob:
        known = next((job for job in self._left.jobs if job.key == post.key), None)
        if known is None:
            known = AskedJob(attempt=_number_in(post.key), key=post.key, request=post.body, asked_at=at)
            self._left.jobs.append(known)
        return known

    def _hold(self, post: Post[PreDeductRequest], at: datetime) -> AskedHold:
        n = _number_in(post.key)
        known = next((hold for hold in self._holds.asked if hold.n == n), None)
        if known is None:
            known = AskedHold(n=n, request=post.body, asked_at=at)
            self._holds.asked.append(known)
        return known

    def _take_commit(self, post: Post[CommitRequest]) -> None:
        """The first asks for the whole cost; where the hold has less, a second asks for what it has."""
        self._left.cost = max(self._left.cost or 0, post.body.actual_cost)

    def _take_charge(self, post: Post[ChargeRequest]) -> None:
        if all(known.key != post.key for known in self._left.charges):
            self._left.charges.append(post)

    async def _take_answer(self, event: HistoryEvent) -> None:
        completed = event.activity_task_completed_event_attributes
        payloads = completed.result.payloads
        name, asked = self._asked.get(completed.scheduled_event_id, ("", None))
        if isinstance(asked, AskedHold) and name == _named(CreditsActivities.cancel_hold):
            asked.resolved = (await self._read(payloads, Answer[CancelHoldReply], event)).reply is not None
        elif isinstance(asked, AskedHold):
            held = await self._read(payloads, Answer[HoldReply], event)
            if held.reply is not None:
                asked.pre_deduct_id, asked.amount = held.reply.pre_deduct_id, held.reply.frozen_amount
                self._left.asked_again += held.tries > 1
            asked.refused = held.refusal is not None
        elif isinstance(asked, AskedJob) and name == _named(ComfyUIActivities.submit_job):
            submitted = await self._read(payloads, Answer[JobAccepted], event)
            if submitted.reply is not None:
                asked.is_known_as(submitted.reply.job_id)
        elif isinstance(asked, AskedJob) and name == _named(ComfyUIActivities.create_training):
            created = await self._read(payloads, Answer[TrainingAccepted], event)
            if created.reply is not None:
                asked.is_known_as(created.reply.training_id)
        elif isinstance(asked, AskedJob):
            asked.cancelled = True
        elif isinstance(asked, SnapshotOrder):
            self._left.snapshot = None

    async def _take_result(self, payloads: Any, event: HistoryEvent) -> None:
        if self._left.row.scene is Scene.IMAGE_GENERATE:
            image = await self._read(payloads, ImageResult, event)
            self._left.own_end = OwnEnd(status=image.status, result_urls=image.result_urls)
        else:
            training = await self._read(payloads, TrainingResult, event)
            self._left.own_end = OwnEnd(status=training.status, output=training.output)

    def _take_failure(self, failure: Failure) -> None:
        """An end of the task brings its result along; a run that was refused has begun nothing."""
        application = failure.application_failure_info
        if application.type in set(FailureCode) and application.details.payloads:
            code = FailureCode(application.type)
            self._left.own_end = OwnEnd(status=TaskStatus.FAILED, code=code, message=failure.message)

    async def _read(self, payloads: Any, model: type[Model], event: HistoryEvent) -> Model:
        """The one value, with the fields that this code does not know. Raises NotReadHere."""
        try:
            [value] = await self._converter.decode(payloads, [model])
        except (ApplicationError, ValidationError, ValueError, RuntimeError) as error:
            why = "; ".join(sentences_of(error)) if isinstance(error, ValidationError) else type(error).__name__
            raise self._unread(event, why) from None
        if isinstance(value, Doubtful):  # with a field of a caller's that a newer worker took, or not to be read at all
            if value.as_read is None:
                raise self._unread(event, value.why)
            value = value.as_read
        if not isinstance(value, model):
            raise self._unread(event, f"it is no {model.__name__}")
        return value

    def _unread(self, event: HistoryEvent, why: str) -> NotReadHere:
        row = self._left.row
        return NotReadHere(
            f"Event {event.event_id} of the history of {row.workflow_id} cannot be read here ({why}). A newer "
            "worker wrote it, and it may hold credits: nothing is given back until a worker that knows it tries."
        )


def left_by_row(row: TaskRow, how: str) -> LeftBehind:
    """The run is gone from Temporal: what the row knows."""
    left = LeftBehind(row=row, how=how)
    add_what_the_row_knows(left)
    return left


def add_what_the_row_knows(left: LeftBehind) -> None:
    """Holds and jobs of earlier lives, which the last run's history may not hold.

    Their requests are never sent: their ids are known.
    """
    row = left.row
    holds = {hold.pre_deduct_id for hold in left.holds if hold.pre_deduct_id}
    taken = max((hold.n for hold in left.holds), default=0)
    in_order = not_left_out(list(dict.fromkeys([*row.hold_ids, *row.credits.pre_deduct_ids])), holds, left.holds_before)
    unknown = [pre_deduct_id for pre_deduct_id in in_order if pre_deduct_id not in holds]
    left.holds_before += max(0, len(unknown) - MAX_KEPT_HOLDS)
    for n, pre_deduct_id in enumerate(unknown[-MAX_KEPT_HOLDS:], start=taken + 1):
        left.holds.append(_hold_of(row, n, pre_deduct_id))
    jobs = {job.job_id for job in left.jobs}
    asked = max((job.attempt for job in left.jobs), default=0)
    for job_id in dict.fromkeys([*row.job_ids, *([row.job_id] if row.job_id else [])]):
        if job_id not in jobs:
            asked += 1
            left.jobs.append(_job_of(row, asked, job_id))


def _hold_of(row: TaskRow, n: int, pre_deduct_id: str) -> AskedHold:
    request = PreDeductRequest(
        task_id=row.task_id,
        template_id=row.template_id,
        tenant_id=row.tenant_id,
        user_id=row.user_id,
        scene=row.scene,
        estimated_cost=row.credits.held,
        expire_in=MIN_HOLD_SECONDS,
    )
    asked_at, amount = row.created_at, row.credits.held
    return AskedHold(n=n, request=request, asked_at=asked_at, pre_deduct_id=pre_deduct_id, amount=amount)


def _job_of(row: TaskRow, attempt: int, job_id: str) -> AskedJob:
    key = f"{row.task_id}:submit:{attempt}"
    return AskedJob(attempt=attempt, key=key, asked_at=row.created_at, job_id=job_id)
