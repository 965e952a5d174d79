"""Tasks that stand already: show, list, cancel, confirm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final, Literal

from temporalio.client import (
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.command_line.connection import RPC_TIMEOUT, Connection
from comfyui_temporal.command_line.failures import BadInput, CannotReach
from comfyui_temporal.command_line.follow import QUERY_TIMEOUT, read_progress
from comfyui_temporal.command_line.outcome import RESULT_TYPES, TaskOutcome, find_task, outcome_of
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.tasks import (
    SEARCH_ATTRIBUTES,
    CancelTask,
    CancelTaskOutcome,
    Confirmation,
    ConfirmPrice,
    ConfirmPriceOutcome,
    CreditsSummary,
    TaskStatus,
    TrainingProgress,
)
from comfyui_temporal.runs import NoQueryNow, RunSeen, RunStatus, describe_run, list_runs, query_run

UPDATE_SECONDS: Final = 10.0
_ENDED: Final = {
    RunStatus.FAILED: TaskStatus.FAILED,
    RunStatus.CANCELED: TaskStatus.CANCELLED,
    RunStatus.TERMINATED: TaskStatus.FAILED,
    RunStatus.TIMED_OUT: TaskStatus.FAILED,
}


class TaskRow(OwnModel):
    """One task as visibility knows it."""

    task_id: str
    scene: str | None = None
    status: str | None = None
    stage: str | None = None
    is_paused: bool = False
    """Its run was paused by hand in Temporal: nothing of it goes on."""
    tenant_id: str | None = None
    user_id: str | None = None
    template_id: str | None = None
    priority: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    workflow_id: str
    run_id: str
    ui_url: str | None = None


class TaskPicture(OwnModel):
    """What `show` tells: `progress` and `credits` while it runs (they need a worker), `outcome` once it ended."""

    task: TaskRow
    progress: TrainingProgress | None = None
    credits: CreditsSummary | None = None
    outcome: TaskOutcome | None = None


def row_of(run: RunSeen, connection: Connection) -> TaskRow:
    """A run's search attributes as a row; a run that ended without its own last word shows Temporal's status."""
    attributes = run.search_attributes
    found = {name: attributes.get(SearchAttributeKey.for_keyword(name)) for name in SEARCH_ATTRIBUTES}
    ended = _ENDED.get(run.status)
    return TaskRow(
        task_id=found["TaskId"] or run.workflow_id.removeprefix("task-"),
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
        ui_url=connection.server.ui_link(run.workflow_id, run.run_id),
    )


async def show_task(connection: Connection, task_id: str) -> TaskPicture:
    """A task as it stands. Raises UnknownTask, CannotReach."""
    handle = await find_task(connection.client, connection.server, task_id)
    run = await describe_run(connection.client, handle.id, rpc_timeout=RPC_TIMEOUT)
    row = row_of(run, connection)
    if run.status.is_over:
        outcome = await outcome_of(handle, connection, task_id)
        return TaskPicture(task=row, credits=outcome.credits, outcome=outcome)
    progress = await _answered(read_progress(handle))
    credits = await _answered(query_run(handle, "credits", result_type=CreditsSummary, rpc_timeout=QUERY_TIMEOUT))
    return TaskPicture(task=row, progress=progress, credits=credits)


async def _answered(query: Any) -> Any:
    """A query's answer, or None where no worker gives one, or the run takes none."""
    try:
        return await query
    except (WorkflowQueryFailedError, NoQueryNow, RPCError):
        return None


async def list_tasks(connection: Connection, *, filters: dict[str, str], limit: int) -> AsyncIterator[TaskRow]:
    """Newest first. `filters`: search attribute → value; values are quoted, so any text is safe."""
    types = ", ".join(f"'{name}'" for name in RESULT_TYPES)
    terms = [f"WorkflowType IN ({types})"]
    for name, value in filters.items():
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        terms.append(f"{name} = '{quoted}'")
    seen: set[str] = set()
    async for run in list_runs(connection.client, " AND ".join(terms), rpc_timeout=RPC_TIMEOUT):
        if run.workflow_id in seen:  # a run that continued as new is listed once for each of its runs
            continue
        seen.add(run.workflow_id)
        yield row_of(run, connection)
        if len(seen) >= limit:
            return


async def cancel_task(connection: Connection, task_id: str, reason: str) -> Literal["accepted", "too_late"]:
    """Ask a task to end cancelled; a task that is over says `too_late`. Raises UnknownTask, CannotReach."""
    handle = await find_task(connection.client, connection.server, task_id)
    try:
        outcome: CancelTaskOutcome = await _update(
            connection, handle, "cancel_task", CancelTask(reason=reason), CancelTaskOutcome
        )
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:  # the run is known (found above) and over
            return "too_late"
        raise
    return outcome.outcome


async def confirm_price(connection: Connection, task_id: str, max_credits: int) -> int:
    """Raise a training's ceiling; the ceiling in force, in points. Raises BadInput where it is refused."""
    handle = await find_task(connection.client, connection.server, task_id)
    try:
        outcome: ConfirmPriceOutcome = await _update(
            connection, handle, "confirm_price", ConfirmPrice(max_credits=max_credits), ConfirmPriceOutcome
        )
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            raise BadInput(f"Task {task_id!r} is over: there is no price left to confirm.") from None
        raise
    return outcome.max_credits


async def asked_price_of(connection: Connection, task_id: str) -> Confirmation | None:
    """The price that a task waits to have confirmed; None where it waits for none, or no worker tells."""
    handle = await find_task(connection.client, connection.server, task_id)
    progress: TrainingProgress | None = await _answered(read_progress(handle))
    return progress.confirmation if progress else None


async def _update(
    connection: Connection, handle: WorkflowHandle[Any, Any], name: str, argument: object, result_type: type
) -> Any:
    try:
        return await asyncio.wait_for(
            handle.execute_update(name, argument, result_type=result_type), timeout=UPDATE_SECONDS
        )
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError):
        raise CannotReach(
            f"{name} was not taken within {UPDATE_SECONDS:g} s: no worker answers on task queue "
            f"{connection.task_queue!r} of {connection.server.address}. Start a worker and say it again."
        ) from None
    except WorkflowUpdateFailedError as failure:
        cause = failure.cause
        sentence = cause.message if isinstance(cause, ApplicationError) else str(cause)
        raise BadInput(f"The task refused {name}: {sentence}") from None
