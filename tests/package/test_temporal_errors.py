"""What each status of Temporal's service means to a caller."""

from __future__ import annotations

import pytest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal import AccessDenied, TaskError, TemporalUnavailable, UnexpectedReply, UnknownTask
from comfyui_temporal.client.temporal_errors import task_error

ERROR_OF = {
    RPCStatusCode.OK: UnexpectedReply,
    RPCStatusCode.CANCELLED: TemporalUnavailable,
    RPCStatusCode.UNKNOWN: TemporalUnavailable,
    RPCStatusCode.INVALID_ARGUMENT: UnexpectedReply,
    RPCStatusCode.DEADLINE_EXCEEDED: TemporalUnavailable,
    RPCStatusCode.NOT_FOUND: UnknownTask,
    RPCStatusCode.ALREADY_EXISTS: UnexpectedReply,
    RPCStatusCode.PERMISSION_DENIED: AccessDenied,
    RPCStatusCode.RESOURCE_EXHAUSTED: TemporalUnavailable,
    RPCStatusCode.FAILED_PRECONDITION: UnexpectedReply,
    RPCStatusCode.ABORTED: TemporalUnavailable,
    RPCStatusCode.OUT_OF_RANGE: UnexpectedReply,
    RPCStatusCode.UNIMPLEMENTED: UnexpectedReply,
    RPCStatusCode.INTERNAL: TemporalUnavailable,
    RPCStatusCode.UNAVAILABLE: TemporalUnavailable,
    RPCStatusCode.DATA_LOSS: UnexpectedReply,
    RPCStatusCode.UNAUTHENTICATED: AccessDenied,
}


@pytest.mark.parametrize("status", list(RPCStatusCode))
async def test_every_status_of_temporal_is_one_typed_error(status: RPCStatusCode) -> None:
    client = await Client.connect("127.0.0.1:9", lazy=True)
    error: TaskError = task_error(RPCError("a reason", status, b""), client, task_id="task-1")
    assert type(error) is ERROR_OF[status]
    assert ("a reason" in error.sentence) is (status is not RPCStatusCode.NOT_FOUND)
