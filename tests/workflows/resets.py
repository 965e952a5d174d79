"""`temporal workflow reset`, as an operator does it: to any workflow task of any run of a task."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType, ResetReapplyExcludeType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest

from tests.workflows.books import runs_of
from tests.workflows.platform import Handle, Platform


@dataclass(frozen=True)
class Point:
    """A workflow task that a run can be reset to; what came after it is forgotten."""

    run_id: str
    event_id: int
    place: int
    """0 for the first of the whole chain of runs."""


async def points_of(platform: Platform, handle: Handle) -> list[Point]:
    """Every point of every run of the task, oldest first."""
    points: list[Point] = []
    for run in await runs_of(platform, handle):
        run_id = run.run_id or run.result_run_id or ""
        async for event in run.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
                points.append(Point(run_id, event.event_id, len(points)))
    return points


async def point_before(platform: Platform, handle: Handle, call: str, *, nth: int = 1) -> Point:
    """The point at which this call was scheduled. A run that is reset to it schedules the call again."""
    newest: Point | None = None
    seen = 0
    for run in await runs_of(platform, handle):
        run_id = run.run_id or run.result_run_id or ""
        async for event in run.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
                newest = Point(run_id, event.event_id, newest.place + 1 if newest else 0)
            seen += event.activity_task_scheduled_event_attributes.activity_type.name == call
            if seen == nth and newest is not None:
                return newest
    raise LookupError(call)


async def reset(platform: Platform, handle: Handle, point: Point, *, forgets_messages: bool = False) -> Handle:
    """Reset the task; the new run. Signals and updates that came later are given to it, unless it forgets them."""
    forgotten = [ResetReapplyExcludeType.Value(f"RESET_REAPPLY_EXCLUDE_TYPE_{name}") for name in ("SIGNAL", "UPDATE")]
    answer = await platform.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=platform.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=point.run_id),
            reason="by a test",
            workflow_task_finish_event_id=point.event_id,
            request_id=str(uuid.uuid4()),
            reset_reapply_exclude_types=forgotten if forgets_messages else [],
        )
    )
    return platform.client.get_workflow_handle(handle.id, run_id=answer.run_id)
