"""`temporal workflow reset` of a job or training, as an operator does it."""

from __future__ import annotations

import uuid

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import WorkflowHandle

from bridge.calls import workflow_of
from tests.bridge.platform import BridgePlatform


async def reset_before(bridge: BridgePlatform, run_id: str, call: str) -> WorkflowHandle[object, object]:
    """Reset a job or training to the workflow task that scheduled this call first. Returns the new run."""
    handle = bridge.client.get_workflow_handle(workflow_of(run_id))
    finished = 0
    async for event in handle.fetch_history_events():
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
            finished = event.event_id
        if event.activity_task_scheduled_event_attributes.activity_type.name == call:
            break
    else:
        raise LookupError(call)
    described = await handle.describe()
    answer = await bridge.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=bridge.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=described.run_id),
            reason="by a test",
            workflow_task_finish_event_id=finished,
            request_id=str(uuid.uuid4()),
        )
    )
    return bridge.client.get_workflow_handle(handle.id, run_id=answer.run_id)
