"""What an ended run left behind, read from its history.

A history holds every request before it takes effect (decision 1), so nothing that may need an undo is missed.
The task's row adds what runs before a reset had requested.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.enums.v1 import WorkflowTaskFailedCause as Cause
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, FailureError

from activities.comfyui import ComfyUIActivities
from activities.credits import CreditsActivities
from activities.datasets import DatasetActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import CallFor, JobCall, Post, SnapshotOrder, number_in
from comfyui_temporal.contracts.comfyui import JobCancelled, SnapshotReference
from comfyui_temporal.contracts.continuation import Continuation
from comfyui_temporal.contracts.credits import (
    MIN_HOLD_SECONDS,
    CancelHoldReply,
    CancelHoldRequest,
    ChargeReply,
    ChargeRequest,
    CommitRequest,
    HoldReply,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import Answer, FailureCode, sentences_of
from comfyui_temporal.contracts.give_back import Orphans, OwnEnd
from comfyui_temporal.contracts.handed_on import Doubtful
from comfyui_temporal.contracts.requests import (
    JobBody,
    RequestedHold,
    RequestedJob,
    RequestOutcome,
    is_key_conflict,
    is_unsent,
    not_left_out,
    refuses_charge,
)
from comfyui_temporal.contracts.scenes import SCENE_OF_WORKFLOW, SCENES
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import DatasetSource, TaskStatus
from comfyui_temporal.encryption_keys import EncryptionError

Model = TypeVar("Model", bound=BaseModel)


class NotReadHere(Exception):
    """This worker does not know something in a history. The text says where, and what follows."""


def _named(method: object) -> str:
    return str(getattr(method, "__name__", ""))


def _of(generic: Any, parameter: type[BaseModel]) -> Any:
    """`generic[parameter]`; type checkers allow that syntax for names only."""
    return generic[parameter]


UNANSWERED_JOBS: Final = "unanswered_jobs"
"""Of EarlierRunActivities, which read histories by this module."""
_KNOWN_CALLS: Final = frozenset(
    name
    for activities in (ComfyUIActivities, CreditsActivities, DatasetActivities, TaskStoreActivities)
    for name, method in vars(activities).items()
    if hasattr(method, "__temporal_activity_definition")
) | {UNANSWERED_JOBS}
"""The activities that runs call, in this version and in earlier ones."""
_SUBMITS: Final = {spec.submit: _of(Post, spec.request) for spec in SCENES.values()}
_SUBMIT_ANSWERS: Final = {spec.submit: _of(Answer, spec.accepted) for spec in SCENES.values()}
_CANCELS: Final = frozenset(spec.cancel for spec in SCENES.values())
_PRE_DEDUCT: Final = _named(CreditsActivities.pre_deduct)
_CANCEL_HOLD: Final = _named(CreditsActivities.cancel_hold)
_CHARGE: Final = _named(CreditsActivities.charge)
_RESET: Final = Cause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW


class _Call(NamedTuple):
    """A scheduled call, and the request that its answer belongs to."""

    name: str
    concerns: RequestedJob | RequestedHold | SnapshotOrder | None = None


class HistoryReader:
    """Reads one run's history, event by event.

    The first event of a continued run contains the requests of the runs before it.
    """

    def __init__(self, orphans: Orphans, converter: DataConverter, *, has_earlier_runs: bool = False) -> None:
        """`orphans` names the task's row; the reader fills in the rest.

        `has_earlier_runs`: runs before a reset acted for the task as well, and may have copied its dataset.
        """
        self._orphans = orphans
        self._holds = orphans.hold_state()
        self._converter = converter
        self._has_earlier_runs = has_earlier_runs
        self._sent: list[tuple[str, JobBody, RequestedJob]] = []
        """Key and body of each different request of a job."""
        self._sendings: Counter[int] = Counter()
        """How many calls requested each hold, by its `n`."""
        self._first_charges: dict[int, str] = {}
        """Keys of charges that this life was the first to request, by the id of their `scheduled` event."""
        self._calls: dict[int, _Call] = {}
        """By the id of their `scheduled` event."""

    @property
    def orphans(self) -> Orphans:
        """What was read so far: the holds and jobs that a call may still affect, without any list of files."""
        self._holds.leave_out_old()
        for job in self._orphans.jobs:
            job.drop_body()
        self._orphans.take_holds(self._holds)
        return self._orphans

    async def take(self, event: HistoryEvent) -> None:
        """Read the next event. Raises NotReadHere: an unreadable event may be about credits or a job."""
        match event.event_type:
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                await self._take_continuation(event)
            case Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                await self._take_call(event)
            case Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                await self._take_answer(event)
            case Happened.EVENT_TYPE_WORKFLOW_TASK_FAILED:
                if event.workflow_task_failed_event_attributes.cause == _RESET:
                    self._take_reset()
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                completed = event.workflow_execution_completed_event_attributes
                await self._take_result(completed.result.payloads, event)
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
                self._orphans.own_end = OwnEnd(status=TaskStatus.CANCELLED)
            case Happened.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                await self._take_failure(event.workflow_execution_failed_event_attributes.failure, event)

    def _take_reset(self) -> None:
        """What was read until now is of an earlier life, also where the row does not know of the reset."""
        self._first_charges.clear()  # it may have sent them
        row = self._orphans.row
        self._orphans.row = row.model_copy(update={"lives": max(1, row.lives)})

    async def _take_continuation(self, event: HistoryEvent) -> None:
        started = event.workflow_execution_started_event_attributes
        spec = SCENE_OF_WORKFLOW.get(started.workflow_type.name)
        if spec is None:
            raise self._unread(event, f"a workflow {started.workflow_type.name} is not known here")
        run: Any = await self._read(started.input.payloads, spec.run, event)
        continuation: Continuation | None = run.carried
        if spec.copies_dataset:
            has_copy = (
                continuation is not None and continuation.dataset.is_asked and not continuation.dataset.is_deleted
            )
            # A checksum means that the gateway has stored a list of files next to the copy.
            if has_copy or self._has_earlier_runs or run.dataset.files_sha256 is not None:
                self._orphans.snapshot = _snapshot_of(self._orphans.row, run.dataset)
        if continuation is not None:
            self._holds, self._orphans.jobs = continuation.hold, list(continuation.jobs)
            self._sent += [(job.key, job.request, job) for job in continuation.jobs if job.request is not None]
            self._holds.open_doubtful()
            self._sendings.update(hold.n for hold in continuation.hold.asked if hold.outcome is RequestOutcome.UNKNOWN)

    async def _take_call(self, event: HistoryEvent) -> None:
        scheduled = event.activity_task_scheduled_event_attributes
        name, payloads = scheduled.activity_type.name, scheduled.input.payloads
        if name not in _KNOWN_CALLS:
            raise self._unread(event, f"a call {name} is not known here")
        at = event.event_time.ToDatetime(UTC)
        concerns: RequestedJob | RequestedHold | SnapshotOrder | None = None
        if name in _SUBMITS:
            concerns = self._job(await self._read(payloads, _SUBMITS[name], event), at)
        elif name in _CANCELS:
            call = await self._read(payloads, JobCall, event)
            concerns = next((job for job in self._orphans.jobs if job.job_id == call.job_id), None)
        elif name == _PRE_DEDUCT:
            concerns = self._hold(await self._read(payloads, Post[PreDeductRequest], event), at)
        elif name == _CANCEL_HOLD:
            pre_deduct_id = (await self._read(payloads, Post[CancelHoldRequest], event)).body.pre_deduct_id
            concerns = next((hold for hold in self._holds.asked if hold.pre_deduct_id == pre_deduct_id), None)
        elif name == _named(CreditsActivities.commit):
            self._take_commit(await self._read(payloads, Post[CommitRequest], event))
        elif name == _CHARGE:
            self._take_charge(await self._read(payloads, Post[ChargeRequest], event), event)
        elif name == _named(DatasetActivities.snapshot):
            self._orphans.snapshot = (await self._read(payloads, SnapshotOrder, event)).to_delete()
        elif name == _named(DatasetActivities.delete_snapshot):
            concerns = self._orphans.snapshot
        self._calls[event.event_id] = _Call(name, concerns)

    def _job(self, post: Post[Any], at: datetime) -> RequestedJob:
        """A run that undoes what earlier ones requested may send one key with each of their bodies."""
        known = next((job for key, body, job in self._sent if (key, body) == (post.key, post.body)), None)
        if known is None:
            known = RequestedJob(attempt=number_in(post.key), key=post.key, request=post.body, asked_at=at)
            self._orphans.jobs.append(known)
            self._sent.append((post.key, post.body, known))
        return known

    def _hold(self, post: Post[PreDeductRequest], at: datetime) -> RequestedHold:
        n = number_in(post.key)
        known = next((hold for hold in self._holds.asked if hold.n == n), None)
        if known is None:
            known = RequestedHold(n=n, request=post.body, asked_at=at)
            self._holds.asked.append(known)
        self._sendings[n] += 1
        return known

    def _take_commit(self, post: Post[CommitRequest]) -> None:
        """A commit requests no more than the hold has. Where an older worker named no price, the largest one counts."""
        least = max(self._orphans.cost or 0, post.body.actual_cost)
        self._orphans.cost = least if post.price is None else post.price
        self._orphans.commit_of = post.body.pre_deduct_id

    def _take_charge(self, post: Post[ChargeRequest], event: HistoryEvent) -> None:
        if all(known.key != post.key for known in self._orphans.charges):
            self._orphans.charges.append(post)
            self._orphans.charge_refused = False
            self._first_charges[event.event_id] = post.key
        if post.price is not None:
            self._orphans.cost = post.price

    def _take_charged(self, answer: Answer[ChargeReply], scheduled_event_id: int) -> None:
        """A charge that was stopped before it was sent is none: the ledger was read in its place."""
        self._orphans.charge_refused = refuses_charge(answer)
        key = self._first_charges.pop(scheduled_event_id, None)
        if key is not None and is_unsent(answer):
            self._orphans.charges = [post for post in self._orphans.charges if post.key != key]

    async def _take_answer(self, event: HistoryEvent) -> None:
        completed = event.activity_task_completed_event_attributes
        payloads = completed.result.payloads
        name, concerns = self._calls.get(completed.scheduled_event_id, _Call(""))
        if name == _CHARGE:
            charged = await self._read(payloads, Answer[ChargeReply], event)
            self._take_charged(charged, completed.scheduled_event_id)
        match concerns:
            case RequestedHold() if name == _CANCEL_HOLD:
                concerns.cancel_answered(await self._read(payloads, Answer[CancelHoldReply], event))
            case RequestedHold():
                held = await self._read(payloads, Answer[HoldReply], event)
                self._holds.answered(concerns, held, earlier_tries=self._sendings[concerns.n] - 1)
            case RequestedJob() if name in _CANCELS:
                concerns.cancel_answered(await self._read(payloads, Answer[JobCancelled], event))
            case RequestedJob():
                answer = await self._read(payloads, _SUBMIT_ANSWERS[name], event)
                concerns.answered(answer)
                concerns.is_key_taken = is_key_conflict(answer)
            case SnapshotOrder():
                self._orphans.snapshot = None

    async def _take_result(self, payloads: Any, event: HistoryEvent) -> None:
        result = await self._read(payloads, SCENES[self._orphans.row.scene].result, event)
        self._orphans.own_end = OwnEnd.of(result)

    async def _take_failure(self, failure: Failure, event: HistoryEvent) -> None:
        """A failure that ends a task has the result in its details. A run that was refused at its start has none."""
        application = failure.application_failure_info
        if application.type in set(FailureCode) and application.details.payloads:
            code = FailureCode(application.type)
            try:
                error = await self._converter.decode_failure(failure)
            except EncryptionError as encrypted:
                raise self._undecryptable(event, encrypted) from None
            message = error.message if isinstance(error, FailureError) else str(error)
            self._orphans.own_end = OwnEnd(status=TaskStatus.FAILED, code=code, message=message)

    async def _read(self, payloads: Any, model: type[Model], event: HistoryEvent) -> Model:
        """The one value, including fields that this version does not know. Raises NotReadHere."""
        try:
            [value] = await self._converter.decode(payloads, [model])
        except EncryptionError as error:
            raise self._undecryptable(event, error) from None
        except (ApplicationError, ValidationError, ValueError, RuntimeError) as error:
            reason = "; ".join(sentences_of(error)) if isinstance(error, ValidationError) else type(error).__name__
            raise self._unread(event, reason) from None
        if isinstance(value, Doubtful):  # a newer worker's value, or an unreadable one
            if value.as_read is None:
                raise self._unread(event, value.reason)
            value = value.as_read
        if not isinstance(value, model):
            raise self._unread(event, f"it is not a {model.__name__}")
        return value

    def _undecryptable(self, event: HistoryEvent, error: EncryptionError) -> NotReadHere:
        return NotReadHere(
            f"Event {event.event_id} of the history of {self._orphans.row.workflow_id} cannot be read here: {error} "
            "Nothing is given back until a worker that has the key tries."
        )

    def _unread(self, event: HistoryEvent, reason: str) -> NotReadHere:
        row = self._orphans.row
        return NotReadHere(
            f"Event {event.event_id} of the history of {row.workflow_id} cannot be read here ({reason}). A newer "
            "worker wrote it, and it may hold credits: nothing is given back until a worker that knows it tries."
        )


def orphans_by_row(row: TaskRow, how: str) -> Orphans:
    """What the row knows, for a run that Temporal no longer has."""
    orphans = Orphans(row=row, how=how)
    if row.dataset is not None:
        orphans.snapshot = _snapshot_of(row, row.dataset)
    add_from_row(orphans)
    return orphans


def add_from_row(orphans: Orphans) -> None:
    """Add holds and jobs of earlier lives, which may be missing in the last run's history.

    Their ids are known, so their requests are never sent again.
    """
    row = orphans.row
    holds = {hold.pre_deduct_id for hold in orphans.holds if hold.pre_deduct_id}
    taken = max((hold.n for hold in orphans.holds), default=0)
    in_order = list(dict.fromkeys([*row.hold_ids, *row.credits.pre_deduct_ids]))
    in_order = not_left_out(in_order, holds, orphans.holds_before)
    unknown = [pre_deduct_id for pre_deduct_id in in_order if pre_deduct_id not in holds]
    orphans.holds_before += max(0, len(unknown) - MAX_KEPT_HOLDS)
    for n, pre_deduct_id in enumerate(unknown[-MAX_KEPT_HOLDS:], start=taken + 1):
        orphans.holds.append(_hold_of(row, n, pre_deduct_id))
    jobs = {job.job_id for job in orphans.jobs}
    attempt = max((job.attempt for job in orphans.jobs), default=0)
    for job_id in dict.fromkeys([*row.job_ids, *([row.job_id] if row.job_id else [])]):
        if job_id not in jobs:
            attempt += 1
            orphans.jobs.append(_job_of(row, attempt, job_id))


def _snapshot_of(row: TaskRow, dataset: DatasetSource | SnapshotReference) -> SnapshotOrder:
    """To be deleted: the task and the dataset's id name its folder, wherever it was copied from."""
    call_for = CallFor(task_id=row.task_id, tenant_id=row.tenant_id, user_id=row.user_id, scene=row.scene)
    source_uri = dataset.source_uri if isinstance(dataset, DatasetSource) else ""
    return SnapshotOrder(call_for=call_for, dataset_id=dataset.dataset_id, source_uri=source_uri)


def _hold_of(row: TaskRow, n: int, pre_deduct_id: str) -> RequestedHold:
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
    return RequestedHold(n=n, request=request, asked_at=asked_at, pre_deduct_id=pre_deduct_id, amount=amount)


def _job_of(row: TaskRow, attempt: int, job_id: str) -> RequestedJob:
    key = f"{row.task_id}:submit:{attempt}"
    return RequestedJob(attempt=attempt, key=key, asked_at=row.created_at, job_id=job_id)
