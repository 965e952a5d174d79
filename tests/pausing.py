"""Pausing a run as an operator does, `temporal workflow pause`: the server of the tests allows it."""

from __future__ import annotations

import secrets
from typing import Any

from temporalio.api.workflowservice.v1 import PauseWorkflowExecutionRequest, UnpauseWorkflowExecutionRequest
from temporalio.client import Client


async def pause(client: Client, workflow_id: str) -> None:
    await client.workflow_service.pause_workflow_execution(PauseWorkflowExecutionRequest(**_named(client, workflow_id)))


async def unpause(client: Client, workflow_id: str) -> None:
    await client.workflow_service.unpause_workflow_execution(
        UnpauseWorkflowExecutionRequest(**_named(client, workflow_id))
    )


def _named(client: Client, workflow_id: str) -> dict[str, Any]:
    return {
        "namespace": client.namespace,
        "workflow_id": workflow_id,
        "reason": "by a test",
        "request_id": secrets.token_hex(8),
    }
