"""What a run left, read from its history: every intent stands there before its effect (design, decision 1)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.history.v1 import HistoryEvent
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError

from activities.comfyui import ComfyUIActivities
from activities.credits import CreditsActivities
from activities.datasets import DatasetActivities
from contracts.calls import CallFor, JobCall, Post, SnapshotOrder
from contracts.carried import AskedHold, AskedJob, CarriedRun, HoldState, ImageRun, TrainingRun
from contracts.comfyui import JobAccepted, JobRequest, TrainingAccepted, TrainingDraft
from contracts.credits import (
    MIN_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    ChargeRequest,
    HoldReply,
    PreDeductRequest,
)
from contracts.errors import Answer
from contracts.give_back import LeftBehind
from contracts.task_store import TaskRow
from contracts.tasks import IMAGE_WORKFLOW, TRAINING_WORKFLOW

Model = TypeVar("Model", bound=BaseModel)

_RUNS: Final[dict[str, type[ImageRun] | type[TrainingRun]]] = {
    IMAGE_WORKFLOW: ImageRun,
    TRAINING_WORKFLOW: TrainingRun,
}


def _named(method: object) -> str:
    return str(getattr(method, "__name__", ""))


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
        self._left.holds, self._left.holds_before = self._holds.asked, self._holds.granted_before
        return self._left

    async def take(self, event: HistoryEvent) -> None:
        match event.event_type:
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                started = event.workflow_execution_started_event_attributes
                await self._take_carried(started.workflow_type.name, started.input.payloads)
            case Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                await self._take_call(event)
            case Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                completed = event.activity_task_completed_event_attributes
                await self._take_answer(completed.scheduled_event_id, completed.result.payloads)

    async def _take_carried(self, workflow_type: str, payloads: Any) -> None:
        model = _RUNS.get(workflow_type)
        run = None if model is None else await self._decoded(payloads, model)
        if isinstance(run, TrainingRun) and run.dataset.files_sha256 is not None:
            self._left.snapshot = self._snapshot_of(run)  # the gateway's list of files lies there
        carried: CarriedRun | None = None if run is None else run.carried
        if run is None or carried is None:
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
        if name == _named(ComfyUIActivities.submit_job):
            asked = self._job(await self._decoded(payloads, Post[JobRequest]), at)
        elif name == _named(ComfyUIActivities.create_training):
            asked = self._job(await self._decoded(payloads, Post[TrainingDraft]), at)
        elif name == _named(CreditsActivities.pre_deduct):
            asked = self._hold(await self._decoded(payloads, Post[PreDeductRequest]), at)
        elif name == _named(CreditsActivities.cancel_hold):
            cancel = await self._decoded(payloads, Post[CancelHoldRequest])
            asked = next(
                (h for h in self._holds.asked if cancel and h.pre_deduct_id == cancel.body.pre_deduct_id), None
            )
        elif name in (_named(ComfyUIActivities.cancel_job), _named(ComfyUIActivities.cancel_training)):
            call = await self._decoded(payloads, JobCall)
            asked = next((job for job in self._left.jobs if call and job.job_id == call.job_id), None)
        elif name == _named(CreditsActivities.charge):
            self._take_charge(await self._decoded(payloads, Post[ChargeRequest]))
        elif name == _named(DatasetActivities.snapshot):
            order = await self._decoded(payloads, SnapshotOrder)
            self._left.snapshot = None if order is None else order.to_delete()
        elif name == _named(DatasetActivities.delete_snapshot):
            asked = self._left.snapshot
        self._asked[event.event_id] = (name, asked)

    def _job(self, post: Post[Any] | None, at: datetime) -> AskedJob | None:
        if post is None:
            return None
        known = next((job for job in self._left.jobs if job.key == post.key), None)
        if known is None:
            known = AskedJob(attempt=_number_in(post.key), key=post.key, request=post.body, asked_at=at)
            self._left.jobs.append(known)
        return known

    def _hold(self, post: Post[PreDeductRequest] | None, at: datetime) -> AskedHold | None:
        if post is None:
            return None
        n = _number_in(post.key)
        known = next((hold for hold in self._holds.asked if hold.n == n), None)
        if known is None:
            known = AskedHold(n=n, request=post.body, asked_at=at)
            self._holds.asked.append(known)
        return known

    def _take_charge(self, post: Post[ChargeRequest] | None) -> None:
        if post is not None and all(known.key != post.key for known in self._left.charges):
            self._left.charges.append(post)

    async def _take_answer(self, scheduled_event_id: int, payloads: Any) -> None:
        name, asked = self._asked.get(scheduled_event_id, ("", None))
        if isinstance(asked, AskedHold) and name == _named(CreditsActivities.cancel_hold):
            cancelled = await self._decoded(payloads, Answer[CancelHoldReply])
            asked.resolved = cancelled is not None and cancelled.reply is not None
        elif isinstance(asked, AskedHold):
            held = await self._decoded(payloads, Answer[HoldReply])
            if held is not None and held.reply is not None:
                asked.pre_deduct_id, asked.amount = held.reply.pre_deduct_id, held.reply.frozen_amount
            asked.refused = held is not None and held.refusal is not None and held.refusal.message != "unreadable"
        elif isinstance(asked, AskedJob) and name == _named(ComfyUIActivities.submit_job):
            submitted = await self._decoded(payloads, Answer[JobAccepted])
            if submitted is not None and submitted.reply is not None:
                asked.is_known_as(submitted.reply.job_id)
        elif isinstance(asked, AskedJob) and name == _named(ComfyUIActivities.create_training):
            created = await self._decoded(payloads, Answer[TrainingAccepted])
            if created is not None and created.reply is not None:
                asked.is_known_as(created.reply.training_id)
        elif isinstance(asked, AskedJob):
            asked.cancelled = True
        elif isinstance(asked, SnapshotOrder):
            self._left.snapshot = None

    async def _decoded(self, payloads: Any, model: type[Model]) -> Model | None:
        """The one value; None where it cannot be read: a call of that kind was never made by us."""
        try:
            [value] = await self._converter.decode(payloads, [model])
        except (ApplicationError, ValidationError, ValueError, RuntimeError):
            return None
        return value if isinstance(value, model) else None


def left_by_row(row: TaskRow, how: str) -> LeftBehind:
    """The run is gone from Temporal: what the row knows. These requests are never sent: their ids are known."""
    ids = row.credits.pre_deduct_ids
    before = max(row.credits.pre_deduct_count, len(ids)) - len(ids)
    holds = [
        AskedHold(
            n=n,
            request=PreDeductRequest(
                task_id=row.task_id,
                template_id=row.template_id,
                tenant_id=row.tenant_id,
                user_id=row.user_id,
                scene=row.scene,
                estimated_cost=row.credits.held,
                expire_in=MIN_HOLD_SECONDS,
            ),
            asked_at=row.created_at,
            pre_deduct_id=pre_deduct_id,
            amount=row.credits.held,
        )
        for n, pre_deduct_id in enumerate(ids, start=before + 1)
    ]
    left = LeftBehind(row=row, how=how, holds=holds, holds_before=before)
    if row.job_id is not None:
        key = f"{row.task_id}:submit:{row.attempts}"
        left.jobs = [AskedJob(attempt=row.attempts, key=key, asked_at=row.created_at, job_id=row.job_id)]
    return left
