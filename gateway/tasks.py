"""What callers do with tasks: each method is one operation of contract §6, for one caller's tenant.

A task that the caller does not see, above all another tenant's, looks like one that does not exist (contract §7). All
methods raise Problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Final, NamedTuple, TypeVar

import structlog
from temporalio.client import Client
from temporalio.service import RPCError

from activities.file_lists import FileLists
from activities.outside_http import OutsideFailure
from comfyui_temporal.client import submission
from comfyui_temporal.client.errors import TaskExists
from comfyui_temporal.contracts.loras import no_such_model
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.start_answer import StartAnswer
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.tasks import (
    CancelTask,
    CancelTaskOutcome,
    ConfirmPrice,
    ConfirmPriceOutcome,
    TaskDelay,
    TaskInput,
    workflow_id_of,
)
from comfyui_temporal.contracts.tasks_api import TaskDetail, TaskList, TaskView
from comfyui_temporal.delays import RPC_TIMEOUT, delays_of
from comfyui_temporal.encryption import encryption_of
from comfyui_temporal.encryption_keys import EncryptionError
from comfyui_temporal.runs import describe_run
from gateway.inputs import StoredInputs
from gateway.problems import FieldProblem, Problem, ProblemCode
from gateway.runs_without_row import view_of_run
from gateway.start_waits import APPLIED, REPLAYED, StartWaits, ends_at, is_answered, refusal_of
from gateway.task_bodies import (
    KEYED,
    TASKS,
    EventsQuery,
    LogQuery,
    Order,
    TaskFilters,
    TrainingLog,
    TrainingOrder,
    task_id_by_key,
)
from gateway.task_uploads import TaskUploads
from gateway.temporal_calls import RunMissing, bounded, updated
from gateway.tenant_limits import TenantDoor
from runtime.caller_tokens import Caller
from store import CursorInvalid, StoreUnavailable, TaskStore

log = structlog.get_logger(__name__)

T = TypeVar("T")
MAX_EXCEPTIONS: Final = 100
DELAYS_SECONDS: Final = 2.0
"""A task is answered without its delays if Temporal takes longer than this."""


class StartedTask(NamedTuple):
    """A start's answer; `headers`: the tenant's limits, and the wait in force."""

    task: TaskView
    is_new: bool
    headers: Mapping[str, str] = {}
    is_answered: bool | None = None
    """Of a start that waits: whether credits are held, a price is to be confirmed, or the task has ended."""

    @property
    def all_headers(self) -> dict[str, str]:
        """Also for a refusal: a client must learn from it whether it was a repeat."""
        place = {"Location": f"{TASKS}/{self.task.task_id}"}
        return {**place, **self.headers, **({} if self.is_new else {REPLAYED: "true"})}


class Tasks:
    """The tasks of all tenants, for one caller at a time."""

    def __init__(
        self,
        temporal: Client,
        store: TaskStore,
        lists: FileLists,
        uploads: TaskUploads,
        *,
        task_queue: str,
        door: TenantDoor,
        waits: StartWaits,
    ) -> None:
        """`lists` stores lists of files that are too long for a run's input; `uploads`: the files that orders name."""
        self._uploads = uploads
        self._door = door
        self._waits = waits
        self._temporal = temporal
        self._store = store
        self._inputs = StoredInputs(store, encryption_of(temporal))
        self._lists = lists
        self._task_queue = task_queue

    async def start(
        self, caller: Caller, order: Order, key: str | None, *, size: int = 0, wait_seconds: int = 0
    ) -> StartedTask:
        """Start a task, or find it: the same order with the same id or key is one task.

        `size`: the bytes of the request's body, for the tenant's limits. `wait_seconds`: how long to wait until credits
        are held; then a task that failed before that is raised as its Problem.
        """
        until = ends_at(wait_seconds) if wait_seconds else None
        applied = {APPLIED: f"wait={wait_seconds}"} if wait_seconds else {}
        _check_own(caller, order)
        if key and caller.own_tasks_only:
            # Otherwise a user would learn from a refusal which keys the tenant's other users have.
            key = f"{caller.user_id}\n{key}"
        _check_not_reserved(caller, order.task_id, key)
        task = order.task(tenant_id=caller.tenant_id, user_id=caller.user_id, key=key)
        earlier = await self._claimed(task)
        if earlier is not None:
            return await self._repeated(task, earlier, until, applied)
        await self._check_models(caller, task)
        inline = order.inline_files(task.tenant_id, task.task_id)
        await self._uploads.check(caller, task, inline)
        headers = await self._door.admit_start(caller.tenant_id, task.task_id, size)
        await self._uploads.keep(caller, inline)
        if isinstance(order, TrainingOrder) and order.long_list is not None:
            await self._keep(task.task_id, order.dataset.dataset_id, order.long_list)
        try:
            if until is not None:
                return await self._started_waiting(task, until, {**headers, **applied})
            started = await bounded(submission.start_task(self._temporal, task, task_queue=self._task_queue))
        except TaskExists:
            raise _exists(task.task_id) from None
        if started.is_new:
            return StartedTask(TaskView.accepted(task), is_new=True, headers=headers)
        row = await _stored(self._store.task(task.task_id))
        view = TaskView.of_row(row) if row else await self._without_row(task)
        return StartedTask(view, is_new=False, headers=headers)

    async def _without_row(self, task: TaskInput) -> TaskView:
        """A task that was started before and has no row: it waits for a worker, or its run was refused the id."""
        return await view_of_run(self._temporal, task.task_id) or TaskView.accepted(task)

    async def _started_waiting(self, task: TaskInput, until: float, headers: Mapping[str, str]) -> StartedTask:
        waited = await self._waits.begin(task, until)
        answer = await self._waits.go_on(waited, until)
        is_new = waited.started.is_new
        view = await self._waits.seen(task, answer)
        if answer is None and not is_new and not view.last_seq:
            view = await self._without_row(task)
        return self._answered(view, answer, is_new=is_new, headers=headers)

    async def _repeated(
        self, task: TaskInput, earlier: TaskView, until: float | None, headers: Mapping[str, str]
    ) -> StartedTask:
        """The answer to a repeat of a start whose run has claimed the id."""
        if until is None:
            return StartedTask(earlier, is_new=False)
        if is_answered(earlier) and earlier.confirmation is None:
            return self._answered(earlier, None, is_new=False, headers=headers)
        answer = await self._waits.again(earlier, until)
        try:
            view = await self._waits.seen(task, answer)
        except TaskExists:
            raise _exists(task.task_id) from None
        return self._answered(view, answer, is_new=False, headers=headers)

    def _answered(
        self, view: TaskView, answer: StartAnswer | None, *, is_new: bool, headers: Mapping[str, str]
    ) -> StartedTask:
        """Raises the Problem of a task that failed before anything was held."""
        started = StartedTask(view, is_new, headers, is_answered=answer is not None or is_answered(view))
        refusal = refusal_of(view)
        if refusal is not None:
            refusal.headers |= started.all_headers
            raise refusal
        return started

    async def _check_models(self, caller: Caller, task: TaskInput) -> None:
        """Raises Problem 422 for a model that is not one of the tenant's own; a run checks it again at its start."""
        if not task.models:
            return
        user_id = caller.user_id if caller.own_tasks_only else None
        found = await _stored(self._store.models(caller.tenant_id, list(task.models.values()), user_id=user_id))
        own = {model.model_id for model in found}
        fields = [
            FieldProblem(field=field, message=no_such_model(model_id))
            for field, model_id in task.models.items()
            if model_id not in own
        ]
        if fields:
            raise Problem(
                ProblemCode.INPUT_INVALID, "Nothing was done: a model cannot be used; see `fields`.", fields=fields
            )

    async def _keep(self, task_id: str, dataset_id: str, files: list[str]) -> None:
        try:
            await self._lists.put(task_id, dataset_id, files)
        except OutsideFailure:
            raise Problem(
                ProblemCode.STORAGE_UNAVAILABLE,
                "The list of files cannot be stored in object storage now; nothing was started. Try again.",
            ) from None

    async def _claimed(self, task: TaskInput) -> TaskView | None:
        """The task that already holds the id. The claim outlives the run and the row. While the store is away, the
        run's own claim decides."""
        try:
            claimed_input = await self._store.claimed_input(task.task_id)
            if claimed_input is None:
                return None
            if not encryption_of(self._temporal).is_hash_of(claimed_input, task):
                raise _exists(task.task_id)
            row = await self._store.task(task.task_id)
        except StoreUnavailable:
            return None
        if row is None:
            raise Problem(
                ProblemCode.TASK_EXISTS,
                f"Task {task.task_id} ended long ago and its record was purged; nothing was started. "
                "Use another task_id.",
            )
        return TaskView.of_row(row)

    async def task(self, caller: Caller, task_id: str) -> TaskDetail:
        view = await self.owned(caller, task_id)
        exceptions = await _stored(self._store.exceptions(task_id=task_id, limit=MAX_EXCEPTIONS))
        given = await _stored(self._inputs.of_task(task_id))
        delays = await self._delays(view)
        return TaskDetail(**view.model_dump() | {"input": given}, exceptions=exceptions, delays=delays)

    async def _delays(self, view: TaskView) -> list[TaskDelay]:
        """What delays an open task; none if Temporal does not say so now."""
        if view.ended_at is not None:
            return []
        try:
            async with asyncio.timeout(DELAYS_SECONDS):
                run = await describe_run(self._temporal, view.workflow_id, rpc_timeout=RPC_TIMEOUT)
                return await delays_of(self._temporal, run, task_id=view.task_id, task_queue=self._task_queue)
        except (RPCError, TimeoutError, RuntimeError, EncryptionError) as error:
            # RuntimeError: the client has not been able to connect since the gateway's start.
            log.warning("delays_not_read", task_id=view.task_id, reason=type(error).__name__)
            return []

    async def page(self, caller: Caller, filters: TaskFilters) -> TaskList:
        """The tasks that the caller sees, newest first. One whose row cannot be read is left out, and logged."""
        page = await _stored(
            self._store.tasks(
                tenant_id=caller.tenant_id,
                user_id=caller.user_id if caller.own_tasks_only else None,
                status=filters.status,
                scene=filters.scene,
                text=filters.text,
                cursor=filters.cursor,
                limit=filters.limit,
            )
        )
        for row in page.unreadable:
            log.warning("row_not_listed", task_id=row.task_id, reason=row.reason)
        given = await _stored(self._inputs.of_tasks([row.task_id for row in page.tasks]))
        views = [TaskView.of_row(row, given.get(row.task_id)) for row in page.tasks]
        return TaskList(tasks=views, cursor=page.cursor)

    async def events(self, caller: Caller, task_id: str, query: EventsQuery) -> list[TaskEvent]:
        """The task's history."""
        await self.owned(caller, task_id)
        after = query.after
        if after is not None and after.isascii() and after.isdigit() and len(after) < 19:
            return await _stored(self._store.events_after(task_id, int(after), limit=query.limit))
        return await _stored(self._store.events(task_id, after=after, limit=query.limit))

    async def training_log(self, caller: Caller, task_id: str, query: LogQuery) -> TrainingLog:
        """Lines and metrics that ComfyUI sent for a training; none for an image."""
        await self.owned(caller, task_id)
        lines = await _stored(self._store.training_log(task_id, after_position=query.after, limit=query.limit))
        return TrainingLog(lines=lines, after=lines[-1].position if lines else query.after)

    async def cancel(self, caller: Caller, task_id: str, order: CancelTask) -> CancelTaskOutcome:
        """`accepted`: the task ends cancelled. `too_late`: it was delivered or ended first."""
        view = await self.owned(caller, task_id)
        if view.ended_at is not None:
            return CancelTaskOutcome(outcome="too_late")
        handle = self._temporal.get_workflow_handle(workflow_id_of(task_id))
        try:
            return await updated(handle, "cancel_task", order, CancelTaskOutcome)
        except RunMissing:
            return CancelTaskOutcome(outcome="too_late")

    async def confirm_price(self, caller: Caller, task_id: str, order: ConfirmPrice) -> ConfirmPriceOutcome:
        """Raise a training's ceiling."""
        view = await self.owned(caller, task_id)
        if not SCENES[view.scene].confirms_price:
            raise Problem(ProblemCode.INPUT_INVALID, "Only a training has a price to confirm.")
        over = Problem(ProblemCode.TASK_OVER, f"Task {task_id} is over: its price can no longer be confirmed.")
        if view.ended_at is not None:
            raise over
        handle = self._temporal.get_workflow_handle(workflow_id_of(task_id))
        try:
            return await updated(handle, "confirm_price", order, ConfirmPriceOutcome)
        except RunMissing:
            raise over from None

    async def owned(self, caller: Caller, task_id: str) -> TaskView:
        """The task, if the caller sees it; also if its run has not claimed its id yet."""
        row = await _stored(self._store.task(task_id))
        if row is not None and caller.sees(tenant_id=row.tenant_id, user_id=row.user_id):
            return TaskView.of_row(row)
        if row is None:
            view = await view_of_run(self._temporal, task_id)
            if view is not None and caller.sees(tenant_id=view.tenant_id, user_id=view.user_id):
                return view
        raise Problem(ProblemCode.TASK_UNKNOWN, f"There is no task {task_id} of this tenant.")


async def _stored(reading: Awaitable[T]) -> T:
    try:
        return await reading
    except CursorInvalid as error:
        raise Problem(ProblemCode.CURSOR_INVALID, str(error)) from None
    except StoreUnavailable:
        raise Problem(
            ProblemCode.STORE_UNAVAILABLE, "The task store cannot be read now; nothing was changed. Try again."
        ) from None


def _check_own(caller: Caller, order: Order) -> None:
    """Raises Problem 403 if the body names another tenant or user than the token."""
    for field in ("tenant_id", "user_id"):
        named = getattr(order, field)
        if named is not None and named != getattr(caller, field):
            detail = f"{field} is not the token's: leave it out, or use that tenant's and user's own token."
            raise Problem(
                ProblemCode.NOT_AUTHORIZED, detail, fields=[FieldProblem(field=field, message="must be the token's")]
            )


def _check_not_reserved(caller: Caller, task_id: str | None, key: str | None) -> None:
    """Raises Problem 422 for an id that only the gateway makes, unless it is the one of the caller's own key."""
    if task_id is None or not task_id.startswith(KEYED):
        return
    if key is None or task_id != task_id_by_key(caller.tenant_id, key):
        message = f"ids that begin with {KEYED!r} are made from idempotency keys: leave it out, or use another"
        raise Problem(
            ProblemCode.INPUT_INVALID,
            "Nothing was done: this task_id is reserved.",
            fields=[FieldProblem(field="task_id", message=message)],
        )


def _exists(task_id: str) -> Problem:
    """The same words whoever has the id: ids are global, and a caller learns nothing of another tenant's task."""
    return Problem(
        ProblemCode.TASK_EXISTS,
        f"The task_id {task_id} cannot be used with this input; nothing was started or changed. "
        "Leave it out, and one is made, or use another.",
    )
