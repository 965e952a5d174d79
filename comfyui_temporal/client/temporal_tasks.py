"""Tasks by Temporal: for a service that may start workflows in the namespace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.client.errors import (
    InvalidInput,
    TaskOver,
    TemporalUnavailable,
    UnknownTask,
    WorkerUnavailable,
    checked,
    start_refused,
)
from comfyui_temporal.client.interface import WAIT_SECONDS, CancelAnswer
from comfyui_temporal.client.models import StartedTask, TaskDetails, TaskOutcome, TaskSummary, TaskUpdate
from comfyui_temporal.client.run_outcome import GIVEN_BACK, TERMINATED, ended_as
from comfyui_temporal.client.submission import RPC_TIMEOUT, Started, start_task
from comfyui_temporal.client.temporal_errors import decrypted, typed_errors
from comfyui_temporal.client.waiting_start import go_on_waiting, start_waiting, wait_again, within
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENE_OF_WORKFLOW, AnyTask
from comfyui_temporal.contracts.start_answer import MAX_WAIT_SECONDS, Reached, StartAnswer, WaitFor
from comfyui_temporal.contracts.tasks import (
    SEARCH_ATTRIBUTES,
    TASK_QUEUE,
    WORKFLOW_ID_PREFIX,
    CancelTask,
    CancelTaskOutcome,
    ConfirmPrice,
    ConfirmPriceOutcome,
    CreditsSummary,
    TaskStatus,
    TrainingProgress,
    workflow_id_of,
)
from comfyui_temporal.delays import WITHOUT_CLEAN_UP, delays_of, give_back_of
from comfyui_temporal.encryption import NO_ENCRYPTION
from comfyui_temporal.plugin import TaskPayloadConverter
from comfyui_temporal.process_end import wait_for_last_reply_at_exit
from comfyui_temporal.runs import NoQueryNow, RunSeen, RunStatus, describe_run, list_runs, query_run

POLL_SECONDS: Final = 0.5
QUERY_TIMEOUT: Final = timedelta(seconds=2)
UPDATE_SECONDS: Final = 10.0
T = TypeVar("T")
_STATUS_OF_CLOSED_RUN: Final = {
    RunStatus.FAILED: TaskStatus.FAILED,
    RunStatus.CANCELED: TaskStatus.CANCELLED,
    RunStatus.TERMINATED: TaskStatus.FAILED,
    RunStatus.TIMED_OUT: TaskStatus.FAILED,
}
_NAME_IN_QUERIES: Final = {
    RunStatus.FAILED: "Failed",
    RunStatus.CANCELED: "Canceled",
    RunStatus.TERMINATED: "Terminated",
    RunStatus.TIMED_OUT: "TimedOut",
}


class TemporalTasks:
    """Tasks by Temporal. Implements `Tasks`; every method raises TaskError."""

    def __init__(self, client: Client, *, task_queue: str = TASK_QUEUE, ui_url: str | None = None) -> None:
        """`client`: any client of the namespace; its payload codec is kept. `ui_url`: the Temporal UI, for links."""
        self.client = _with_our_converter(client)
        self.task_queue = task_queue
        self._ui_url = ui_url
        wait_for_last_reply_at_exit()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Does nothing: the caller closes the client."""

    async def start(
        self, task: AnyTask, *, wait_for: WaitFor | None = None, wait_seconds: float = WAIT_SECONDS
    ) -> StartedTask:
        """Start a task, as `Tasks.start` says."""
        if wait_for is not None:
            return await self._start_waiting(task, time.monotonic() + min(MAX_WAIT_SECONDS, wait_seconds))
        with typed_errors(self.client):
            started = await start_task(self.client, task, task_queue=self.task_queue)
        return _started(started)

    async def _start_waiting(self, task: AnyTask, ends_at: float) -> StartedTask:
        with typed_errors(self.client):
            try:
                waited = await start_waiting(
                    self.client, task, task_queue=self.task_queue, within_seconds=ends_at - time.monotonic()
                )
            except TimeoutError:
                raise TemporalUnavailable(f"Temporal at {_address(self.client)} does not answer.") from None
        started, handle = _started(waited.started), waited.started.handle
        if waited.answer is not None:
            return _with_answer(started, waited.answer)
        if not started.is_new:
            progress = await self._queried(handle, "progress", TrainingProgress)
            if progress is not None and progress.status.is_end():
                return await self._start_of_ended(started, handle)
        left = ends_at - time.monotonic()
        with typed_errors(self.client):
            if started.is_new:
                answer = await go_on_waiting(handle, waited.update_id, within_seconds=left)
            else:
                answer = await wait_again(handle, within_seconds=left)
        return started if answer is None else _with_answer(started, answer)

    async def _start_of_ended(self, started: StartedTask, handle: WorkflowHandle[Any, Any]) -> StartedTask:
        """The answer to the repeat of a start whose task has ended."""
        outcome = await self._outcome(handle, started.task_id)
        credits = outcome.credits
        if outcome.code is not None and not (credits and credits.pre_deduct_count):
            refusal = start_refused(started.task_id, outcome.code, outcome.sentence or outcome.code)
            if refusal is not None:
                raise refusal
        return started.model_copy(update={"reached": Reached.ENDED, "credits": credits})

    async def follow(self, task_id: str, *, cursor: str | None = None) -> AsyncGenerator[TaskUpdate, None]:
        """Yield each change until the task ends, read by query twice a second. `cursor` is ignored.

        An update with `standstill` says that no worker answers, or that the run is paused. Raises UnknownTask.
        """
        handle = await self.find(task_id)
        end = asyncio.create_task(self._outcome(handle, task_id))
        newest: TaskUpdate | None = None
        try:
            while not end.done():
                update = await self.read_update(handle, newest)
                if update is not None and update != newest:
                    newest = update
                    if not update.status.is_end():  # the run's outcome is the end, and comes last
                        yield update
                await asyncio.wait({end}, timeout=POLL_SECONDS)
            outcome = await end
            yield _last_update(await self.read_update(handle, newest) or newest, outcome)
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)

    async def wait(self, task_id: str) -> TaskOutcome:
        """Wait until the task ends. Raises UnknownTask."""
        return await self._outcome(await self.find(task_id), task_id)

    async def show(self, task_id: str) -> TaskDetails:
        """The task's current state. Without a worker an open task has neither `progress` nor `credits`."""
        handle = await self.find(task_id)
        with typed_errors(self.client, task_id=task_id):
            run = await describe_run(self.client, handle.id, rpc_timeout=RPC_TIMEOUT)
            delays = await delays_of(self.client, run, task_id=task_id, task_queue=self.task_queue)
        summary = self._summary(run)
        if run.status.is_over:
            outcome = await self._outcome(handle, task_id)
            return TaskDetails(task=summary, credits=outcome.credits, outcome=outcome, delays=delays)
        progress = await self._queried(handle, "progress", TrainingProgress)
        credits = await self._queried(handle, "credits", CreditsSummary)
        return TaskDetails(task=summary, progress=progress, credits=credits, delays=delays)

    async def list(
        self,
        *,
        status: TaskStatus | None = None,
        scene: Scene | None = None,
        limit: int = 20,
        filters: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[TaskSummary, None]:
        """Tasks of all tenants, newest first. `filters`: search attribute → value, e.g. `{"TenantId": "tenant-a"}`.

        Values are quoted, so any text is safe.
        """
        wanted = {"Scene": scene, **(filters or {})}
        types = ", ".join(f"'{name}'" for name in SCENE_OF_WORKFLOW)
        terms = [f"WorkflowType IN ({types})"]
        terms += [f"{name} = '{_quoted(value)}'" for name, value in wanted.items() if value is not None]
        terms += ["ExecutionStatus != 'ContinuedAsNew'", *([_has_status(status)] if status else [])]
        seen: set[str] = set()
        with typed_errors(self.client):
            async for run in list_runs(self.client, " AND ".join(terms), rpc_timeout=RPC_TIMEOUT):
                if run.workflow_id in seen:  # a task that was reset is listed once for each of its runs
                    continue
                if status and run.status is RunStatus.TERMINATED and not await self._is_newest(run):
                    continue
                if len(seen) >= limit:
                    return
                seen.add(run.workflow_id)
                yield self._summary(run)

    async def confirm(self, task_id: str, max_credits: int) -> int:
        """Confirm a training's price up to `max_credits` points. Returns the limit in force, in points.

        Raises UnknownTask, TaskOver, WorkerUnavailable; InvalidInput if the task rejects the value.
        """
        handle = await self.find(task_id)
        order = checked(ConfirmPrice, max_credits=max_credits)
        try:
            outcome = await self._updated(handle, "confirm_price", order, ConfirmPriceOutcome)
        except TaskOver:
            raise TaskOver(f"Task {task_id!r} is over: its price can no longer be confirmed.") from None
        return outcome.max_credits

    async def cancel(self, task_id: str, reason: str = "") -> CancelAnswer:
        """Cancel a task; `too_late` if it was delivered or ended first. Raises UnknownTask, WorkerUnavailable."""
        handle = await self.find(task_id)
        order = checked(CancelTask, reason=reason)
        try:
            outcome = await self._updated(handle, "cancel_task", order, CancelTaskOutcome)
        except TaskOver:
            return "too_late"
        return outcome.outcome

    async def find(self, task_id: str) -> WorkflowHandle[Any, Any]:
        """The handle of the task's run; it knows the result's type. Raises UnknownTask."""
        workflow_id = workflow_id_of(task_id)
        with typed_errors(self.client, task_id=task_id):
            run = await describe_run(self.client, workflow_id, rpc_timeout=RPC_TIMEOUT)
        spec = SCENE_OF_WORKFLOW.get(run.workflow_type)
        if spec is None:
            raise UnknownTask(f"Workflow {workflow_id!r} is a {run.workflow_type}, not a task of this system.")
        return self.client.get_workflow_handle(workflow_id, result_type=spec.result)

    async def read_update(self, handle: WorkflowHandle[Any, Any], newest: TaskUpdate | None) -> TaskUpdate | None:
        """One `progress` query; None if the run has not begun or has ended. A standstill repeats `newest`.

        Raises Undecryptable.
        """
        try:
            with decrypted():
                progress = await query_run(handle, "progress", result_type=TrainingProgress, rpc_timeout=QUERY_TIMEOUT)
            return TaskUpdate(**dict(progress))
        except (WorkflowQueryFailedError, WorkflowQueryRejectedError):
            return None
        except NoQueryNow as paused:
            return _standing_still(handle, newest, str(paused))
        except RPCError as error:
            if not _is_silence_of_worker(error):
                return None
            sentence = f"No worker answers on task queue {self.task_queue!r}: the task waits until one runs."
            return _standing_still(handle, newest, sentence)

    async def _outcome(self, handle: WorkflowHandle[Any, Any], task_id: str) -> TaskOutcome:
        with typed_errors(self.client, task_id=task_id):
            while True:
                ended = await ended_as(handle)
                run = await describe_run(self.client, handle.id, rpc_timeout=RPC_TIMEOUT)
                # A reset terminates the run that was waited for, and the task goes on in a newer one.
                if ended.get("code") != TERMINATED or run.status is RunStatus.TERMINATED:
                    break
            if run.status in WITHOUT_CLEAN_UP:
                ended |= await self._left_behind(handle, run, task_id)
        return TaskOutcome(task_id=task_id, workflow_id=handle.id, ui_url=self.ui_link(handle.id, run.run_id), **ended)

    async def _left_behind(self, handle: WorkflowHandle[Any, Any], run: RunSeen, task_id: str) -> dict[str, Any]:
        """What became of a run that gave nothing back itself, as its task's row has it. Raises RPCError."""
        spec = SCENE_OF_WORKFLOW[run.workflow_type]
        given_back = await give_back_of(self.client, task_id)
        if given_back is not None:
            status = TaskStatus.COMPLETED if given_back.outcome == "already_charged" else TaskStatus.FAILED
            result = spec.result(task_id=task_id, status=status, credits=given_back.credits)
            return {"status": status, "result": result, "sentence": GIVEN_BACK[given_back.outcome]}
        delays = await delays_of(self.client, run, task_id=task_id, task_queue=self.task_queue)
        if not delays:  # it was given back meanwhile
            return await self._left_behind(handle, run, task_id)
        credits = await self._queried(handle, "credits", CreditsSummary)
        open_credits = spec.result(task_id=task_id, status=TaskStatus.FAILED, credits=credits) if credits else None
        return {"sentence": delays[0].sentence, "result": open_credits}

    async def _queried(self, handle: WorkflowHandle[Any, Any], query: str, result_type: type[T]) -> T | None:
        with decrypted(), suppress(WorkflowQueryFailedError, WorkflowQueryRejectedError, NoQueryNow, RPCError):
            return await query_run(handle, query, result_type=result_type, rpc_timeout=QUERY_TIMEOUT)
        return None

    async def _updated(self, handle: WorkflowHandle[Any, Any], name: str, argument: object, result_type: type[T]) -> T:
        """The run's answer to an update. Raises TaskOver, InvalidInput, WorkerUnavailable."""
        try:
            with typed_errors(self.client, missing=TaskOver(f"The run of {handle.id} is over.")):
                answer: T = await within(handle.execute_update(name, argument, result_type=result_type), UPDATE_SECONDS)
                return answer
        except TimeoutError:
            raise WorkerUnavailable(
                f"{name} was not taken within {UPDATE_SECONDS:g} s: no worker answers on task queue "
                f"{self.task_queue!r} of {_address(self.client)}. Start a worker and try again."
            ) from None
        except WorkflowUpdateFailedError as failure:
            cause = failure.cause
            sentence = cause.message if isinstance(cause, ApplicationError) else str(cause)
            raise InvalidInput(f"The task rejected {name}: {sentence}") from None

    async def _is_newest(self, run: RunSeen) -> bool:
        """False for one that was terminated by a reset: its task goes on in a newer run."""
        try:
            newest = await describe_run(self.client, run.workflow_id, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:  # the list is older than the deletion of the run
                raise
            return True
        return newest.run_id == run.run_id

    def _summary(self, run: RunSeen) -> TaskSummary:
        """A run's search attributes. A run that was terminated or timed out has Temporal's status."""
        attributes = run.search_attributes
        found = {name: attributes.get(SearchAttributeKey.for_keyword(name)) for name in SEARCH_ATTRIBUTES}
        ended = _STATUS_OF_CLOSED_RUN.get(run.status)
        return TaskSummary(
            task_id=found["TaskId"] or run.workflow_id.removeprefix(WORKFLOW_ID_PREFIX),
            scene=found["Scene"],
            status=ended.value if ended else found["TaskStatus"],
            stage=found["TaskStage"],
            tenant_id=found["TenantId"],
            user_id=found["UserId"],
            template_id=found["TemplateId"],
            priority=found["TaskPriority"],
            is_paused=run.status is RunStatus.PAUSED,
            started_at=run.start_time,
            ended_at=run.close_time,
            workflow_id=run.workflow_id,
            run_id=run.run_id,
            ui_url=self.ui_link(run.workflow_id, run.run_id),
        )

    def ui_link(self, workflow_id: str, run_id: str | None = None) -> str | None:
        """The run's page in the Temporal UI; None if the UI's address is not known."""
        if self._ui_url is None:
            return None
        page = f"{self._ui_url.rstrip('/')}/namespaces/{self.client.namespace}/workflows/{workflow_id}"
        return f"{page}/{run_id}/history" if run_id else page


def _started(started: Started) -> StartedTask:
    return StartedTask(
        task_id=started.task_id, workflow_id=started.handle.id, run_id=started.run_id, is_new=started.is_new
    )


def _with_answer(started: StartedTask, answer: StartAnswer) -> StartedTask:
    """Raises CreditsRefused, InvalidInput, TaskExists of a task that ended so before anything was held."""
    state = answer.state
    if state.status is TaskStatus.FAILED and state.error is not None and not state.credits.pre_deduct_count:
        refusal = start_refused(started.task_id, state.error.code, state.error.message)
        if refusal is not None:
            raise refusal
    wanted = state.confirmation and state.confirmation.shown()
    answered = {"reached": answer.reached, "credits": state.credits, "confirmation": wanted}
    return started.model_copy(update=answered)


def _with_our_converter(client: Client) -> Client:
    """The same connection with this package's payload converter; the caller's codec and failure converter are kept."""
    converter = client.data_converter
    if converter.payload_converter_class is TaskPayloadConverter and converter.payload_codec is not None:
        return client
    config = client.config()
    config["data_converter"] = replace(
        converter,
        payload_converter_class=TaskPayloadConverter,
        payload_codec=converter.payload_codec or NO_ENCRYPTION,
    )
    return Client(**config)


def _last_update(newest: TaskUpdate | None, outcome: TaskOutcome) -> TaskUpdate:
    """The newest queried state, with the final status of the run."""
    known = newest or TaskUpdate(task_id=outcome.task_id, status=outcome.status)
    result = outcome.result
    return known.model_copy(
        update={
            "status": outcome.status,
            "progress": 100.0 if outcome.status is TaskStatus.COMPLETED else known.progress,
            "attempts": result.attempts if result else known.attempts,
            "error_details": result.error_details if result else known.error_details,
            "next_eta": None,
            "confirmation": None,
            "standstill": None,
        }
    )


def _standing_still(handle: WorkflowHandle[Any, Any], newest: TaskUpdate | None, sentence: str) -> TaskUpdate:
    known = newest or TaskUpdate(task_id=handle.id.removeprefix(WORKFLOW_ID_PREFIX), status=TaskStatus.QUEUED)
    return known.model_copy(update={"standstill": sentence})


def _is_silence_of_worker(error: RPCError) -> bool:
    return error.status in (
        RPCStatusCode.FAILED_PRECONDITION,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
    )


def _has_status(status: TaskStatus) -> str:
    """The query for what `_summary` calls `status`: a search attribute stays as it was where a run was cut off."""
    by_run = [_NAME_IN_QUERIES[run] for run, its_own in _STATUS_OF_CLOSED_RUN.items() if its_own is status]
    others = ", ".join(f"'{_NAME_IN_QUERIES[run]}'" for run in _STATUS_OF_CLOSED_RUN)
    own = f"TaskStatus = '{status}' AND ExecutionStatus NOT IN ({others})"
    terms = [own if status.is_end() else f"{own} AND CloseTime IS NULL", *(f"ExecutionStatus = '{n}'" for n in by_run)]
    return "(" + " OR ".join(f"({term})" for term in terms) + ")"


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")


def _address(client: Client) -> str:
    return client.service_client.config.target_host
