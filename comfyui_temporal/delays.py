"""Why a task makes no progress now, as Temporal knows it: calls that are being retried, a pause, a run that was
terminated and is not given back yet. Used by `TemporalTasks` and by the gateway, so that both say the same.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.api.workflowservice.v1 import GetWorkflowExecutionHistoryReverseRequest
from temporalio.client import Client, ScheduleActionStartWorkflow, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.give_back import GiveBackResult, give_back_id_of
from comfyui_temporal.contracts.reconcile import ReconcileOrder, reconcile_id_of
from comfyui_temporal.contracts.tasks import TaskDelay
from comfyui_temporal.runs import RunSeen, RunStatus, describe_run

RPC_TIMEOUT: Final = timedelta(seconds=3)
HISTORY_PAGE: Final = 200
TERMINATED: Final = "terminated"
PAUSED: Final = "paused"
WITHOUT_LIMIT: Final = "without a limit: what was begun with money or a job is always brought to an end"
UNTIL_DEADLINE: Final = "until the job's deadline; then the task fails with `timeout` and everything is given back"
WITHOUT_CLEAN_UP: Final = frozenset({RunStatus.TERMINATED, RunStatus.TIMED_OUT})
"""Such a run gave nothing back itself: the reconciler does."""
_POLLS: Final = frozenset({"get_job", "get_training"})


async def delays_of(client: Client, run: RunSeen, *, task_id: str, task_queue: str) -> list[TaskDelay]:
    """What delays the task of this described run; empty if nothing does. Raises RPCError."""
    if run.status in WITHOUT_CLEAN_UP:
        if await give_back_of(client, task_id) is not None:
            return []
        running = await _running_give_back(client, task_id)
        not_yet = await _not_given_back(
            client, run, task_id=task_id, task_queue=task_queue, is_begun=running is not None
        )
        return [not_yet, *(await _retries(client, running) if running else [])]
    if run.status.is_over:
        return []
    delays = await _retries(client, run)
    if run.status is RunStatus.PAUSED:
        advice = f"temporal workflow unpause --workflow-id {run.workflow_id}"
        delays.append(TaskDelay(code=PAUSED, sentence=f"An operator paused the run. To go on: {advice}."))
    return delays


async def give_back_of(client: Client, task_id: str) -> GiveBackResult | None:
    """The result of the task's give-back; None if it has not ended, or there was none. Raises RPCError."""
    handle: WorkflowHandle[Any, GiveBackResult] = client.get_workflow_handle(
        give_back_id_of(task_id), result_type=GiveBackResult
    )
    try:
        run = await describe_run(client, handle.id, rpc_timeout=RPC_TIMEOUT)
        return await handle.result() if run.status is RunStatus.COMPLETED else None
    except WorkflowFailureError:
        return None
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise


async def _running_give_back(client: Client, task_id: str) -> RunSeen | None:
    try:
        run = await describe_run(client, give_back_id_of(task_id), rpc_timeout=RPC_TIMEOUT)
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise
    return None if run.status.is_over else run


async def _retries(client: Client, run: RunSeen) -> list[TaskDelay]:
    """The calls of a run that have failed and are tried again."""
    return [
        await _retried(client, run, activity)
        for activity in run.pending_activities
        if activity.attempt > 1 and activity.HasField("last_failure")
    ]


async def _retried(client: Client, run: RunSeen, activity: PendingActivityInfo) -> TaskDelay:
    failure = await client.data_converter.decode_failure(activity.last_failure)
    is_ours = isinstance(failure, ApplicationError) and failure.type
    until = _instant(activity, "expiration_time")
    name = activity.activity_type.name
    return TaskDelay(
        call=name,
        code=str(failure.type) if isinstance(failure, ApplicationError) and is_ours else FailureCode.INTERNAL.value,
        sentence=failure.message if isinstance(failure, ApplicationError) else f"The worker was lost: {failure}.",
        tries=activity.attempt - (activity.scheduled_time.seconds > 0 and not _is_running(activity)),
        since=await _since(client, run, activity),
        until=until,
        limit=None if until else UNTIL_DEADLINE if name in _POLLS else WITHOUT_LIMIT,
        next_try_at=None if _is_running(activity) else _instant(activity, "next_attempt_schedule_time"),
    )


def _is_running(activity: PendingActivityInfo) -> bool:
    return activity.HasField("last_started_time") and not activity.HasField("next_attempt_schedule_time")


async def _since(client: Client, run: RunSeen, activity: PendingActivityInfo) -> datetime | None:
    """When the call was begun: from its limit, else from the newest part of the run's history."""
    until = _instant(activity, "expiration_time")
    within = activity.activity_options.schedule_to_close_timeout.ToTimedelta()
    if until is not None and within:
        return until - within
    async for scheduled_id, at in _scheduled(client, run):
        if scheduled_id == activity.activity_id:
            return at
    return None


async def _scheduled(client: Client, run: RunSeen) -> AsyncIterator[tuple[str, datetime]]:
    request = GetWorkflowExecutionHistoryReverseRequest(
        namespace=client.namespace, execution=run.info.execution, maximum_page_size=HISTORY_PAGE
    )
    page = await client.workflow_service.get_workflow_execution_history_reverse(request, timeout=RPC_TIMEOUT)
    for event in page.history.events:
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            attributes = event.activity_task_scheduled_event_attributes
            yield attributes.activity_id, event.event_time.ToDatetime(UTC)


async def _not_given_back(client: Client, run: RunSeen, *, task_id: str, task_queue: str, is_begun: bool) -> TaskDelay:
    how = "was terminated in Temporal" if run.status is RunStatus.TERMINATED else "reached a Temporal timeout"
    next_look, pause_seconds = (None, 0.0) if is_begun else await _next_look(client, task_queue)
    when = "is not scheduled here: start a worker, or roll the task back by hand"
    if is_begun:
        when = "has found it, and gives job and credits back now"
    elif next_look:
        when = (
            f"looks next at {next_look:%H:%M:%S} UTC, and gives job and credits back once it has found the run over "
            f"twice, {pause_seconds:g} s apart"
        )
    return TaskDelay(
        code=TERMINATED,
        sentence=f"The run of {task_id} {how} and gave nothing back itself: its hold and its job may still be open. "
        f"The reconciler {when}.",
        since=run.close_time,
        limit=WITHOUT_LIMIT,
        next_try_at=next_look,
    )


async def _next_look(client: Client, task_queue: str) -> tuple[datetime | None, float]:
    """When the reconciler looks next, and the pause before it acts, in seconds. None if it has no schedule."""
    try:
        standing = await client.get_schedule_handle(reconcile_id_of(task_queue)).describe(rpc_timeout=RPC_TIMEOUT)
    except RPCError:
        return None, 0
    order = ReconcileOrder()
    if isinstance(standing.schedule.action, ScheduleActionStartWorkflow) and standing.schedule.action.args:
        [order] = await client.data_converter.decode(standing.schedule.action.args[:1], [ReconcileOrder])
    times = [] if standing.schedule.state.paused else standing.info.next_action_times
    return (times[0] if times else None), order.pause_seconds


def _instant(activity: PendingActivityInfo, field: str) -> datetime | None:
    if not activity.HasField(field):  # type: ignore[arg-type]
        return None
    at: Timestamp = getattr(activity, field)
    return at.ToDatetime(UTC) if at.seconds > 0 else None
