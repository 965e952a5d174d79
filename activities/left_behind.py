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
from contracts.carried import AskedHold, AskedJob, CarriedRun, ImageRun, TrainingRun
from contracts.comfyui import JobAccepted, JobRequest, Resolution, TaskPriority, TrainingAccepted, TrainingRequest
from contracts.credits import (
    MIN_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    ChargeRequest,
    CommitRequest,
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
        self.left = left
        self._converter = converter
        self._asked: dict[int, tuple[str, Any]] = {}
        """Scheduled event → the activity's name, and what was asked."""

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
        carried: CarriedRun | None = None if run is None else run.carried
        if run is None or carried is None:
            return
        self.left.holds, self.left.jobs = list(carried.hold.asked), list(carried.jobs)
        if isinstance(run, TrainingRun) and carried.dataset.is_asked and not carried.dataset.is_deleted:
            row = self.left.row
            self.left.snapshot = SnapshotOrder(
                call_for=CallFor(task_id=row.task_id, tenant_id=row.tenant_id, user_id=row.user_id, scene=row.scene),
                **run.dataset.model_dump(),
            )

    async def _take_call(self, event: HistoryEvent) -> None:
        scheduled = event.activity_task_scheduled_event_attributes
        name, payloads = scheduled.activity_type.name, scheduled.input.payloads
        at = event.event_time.ToDatetime(UTC)
        asked: Any = None
        if name == _named(ComfyUIActivities.submit_job):
            asked = self._job(await self._decoded(payloads, Post[JobRequest]), at)
        elif name == _named(ComfyUIActivities.create_training):
            asked = self._job(await self._decoded(payloads, Post[TrainingRequest]), at)
        elif name == _named(CreditsActivities.pre_deduct):
            asked = self._hold(await self._decoded(payloads, Post[PreDeductRequest]), at)
        elif name == _named(CreditsActivities.cancel_hold):
            cancel = await self._decoded(payloads, Post[CancelHoldRequest])
            asked = next((h for h in self.left.holds if cancel and h.pre_deduct_id == cancel.body.pre_deduct_id), None)
        elif name in (_named(ComfyUIActivities.cancel_job), _named(ComfyUIActivities.cancel_training)):
            call = await self._decoded(payloads, JobCall)
            asked = next((job for job in self.left.jobs if call and job.job_id == call.job_id), None)
        elif name == _named(CreditsActivities.commit):
            self._take_commit(await self._decoded(payloads, Post[CommitRequest]))
        elif name == _named(CreditsActivities.charge):
            self._take_charge(await self._decoded(payloads, Post[ChargeRequest]))
        elif name == _named(DatasetActivities.snapshot):
            self.left.snapshot = await self._decoded(payloads, SnapshotOrder)
        elif name == _named(DatasetActivities.delete_snapshot):
            asked = self.left.snapshot
        self._asked[event.event_id] = (name, asked)

    def _job(self, post: Post[Any] | None, at: datetime) -> AskedJob | None:
        if post is None:
            return None
        known = next((job for job in self.left.jobs if job.key == post.key), None)
        if known is None:
            known = AskedJob(attempt=_number_in(post.key), key=post.key, request=post.body, asked_at=at)
            self.left.jobs.append(known)
        return known

    def _hold(self, post: Post[PreDeductRequest] | None, at: datetime) -> AskedHold | None:
        if post is None:
            return None
        n = _number_in(post.key)
        known = next((hold for hold in self.left.holds if hold.n == n), None)
        if known is None:
            known = AskedHold(n=n, request=post.body, asked_at=at)
            self.left.holds.append(known)
        return known

    def _take_commit(self, post: Post[CommitRequest] | None) -> None:
        """The first asks for the whole cost; where the hold has less, a second asks for what it has."""
        if post is not None:
            self.left.cost = max(self.left.cost or 0, post.body.actual_cost)

    def _take_charge(self, post: Post[ChargeRequest] | None) -> None:
        if post is not None and all(known.key != post.key for known in self.left.charges):
            self.left.charges.append(post)

    async def _take_answer(self, scheduled_event_id: int, payloads: Any) -> None:
        name, asked = self._asked.get(scheduled_event_id, ("", None))
        if isinstance(asked, AskedHold) and name == _named(CreditsActivities.cancel_hold):
            cancelled = await self._decoded(payloads, Answer[CancelHoldReply])
            asked.resolved = cancelled is not None and cancelled.reply is not None
        elif isinstance(asked, AskedHold):
            held = await self._decoded(payloads, Answer[HoldReply])
            if held is not None and held.reply is not None:
                asked.pre_deduct_id, asked.amount = held.reply.pre_deduct_id, held.reply.frozen_amount
                self.left.asked_again += held.tries > 1
            asked.refused = held is not None and held.refusal is not None and held.refusal.message != "unreadable"
        elif isinstance(asked, AskedJob) and name == _named(ComfyUIActivities.submit_job):
            submitted = await self._decoded(payloads, Answer[JobAccepted])
            asked.job_id = submitted.reply.job_id if submitted and submitted.reply else None
        elif isinstance(asked, AskedJob) and name == _named(ComfyUIActivities.create_training):
            created = await self._decoded(payloads, Answer[TrainingAccepted])
            asked.job_id = created.reply.training_id if created and created.reply else None
        elif isinstance(asked, AskedJob):
            asked.cancelled = True
        elif isinstance(asked, SnapshotOrder):
            self.left.snapshot = None

    async def _decoded(self, payloads: Any, model: type[Model]) -> Model | None:
        """The one value; None where it cannot be read: a call of that kind was never made by us."""
        try:
            [value] = await self._converter.decode(payloads, [model])
        except (ApplicationError, ValidationError, ValueError, RuntimeError):
            return None
        return value if isinstance(value, model) else None


def left_by_row(row: TaskRow, how: str) -> LeftBehind:
    """The run is gone from Temporal: what the row knows. These requests are never sent: their ids are known."""
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
        for n, pre_deduct_id in enumerate(row.credits.pre_deduct_ids, start=1)
    ]
    left = LeftBehind(row=row, how=how, holds=holds)
    if row.job_id is not None:
        request = JobRequest(
            task_id=row.task_id,
            tenant_id=row.tenant_id,
            user_id=row.user_id,
            template_id=row.template_id,
            prompt="",
            resolution=Resolution.HD,
            priority=TaskPriority.STANDARD,
            callback_url="",
        )
        key = f"{row.task_id}:submit:{row.attempts}"
        left.jobs = [
            AskedJob(attempt=row.attempts, key=key, request=request, asked_at=row.created_at, job_id=row.job_id)
        ]
    return left
