"""Counts what Temporal refuses because its limits are reached.

The SDK's own metric does not show it: it reads the status in an answer's headers, and such a refusal has its own in
the trailers. By default the SDK also tries refused requests again for longer than a caller is kept waiting: they then
end as time-outs. `RETRIES` ends before that.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final, TypeVar

from prometheus_client import Counter
from temporalio.client import (
    Interceptor,
    OutboundInterceptor,
    SignalWorkflowInput,
    StartWorkflowInput,
    StartWorkflowUpdateInput,
    StartWorkflowUpdateWithStartInput,
    WorkflowHandle,
    WorkflowUpdateHandle,
)
from temporalio.service import RetryConfig, RPCError, RPCStatusCode

T = TypeVar("T")
RETRIES: Final = RetryConfig(max_elapsed_time_millis=2_500)
"""With the pauses after a refusal (1 s, then 2 s) its third try is the last: after 3 to 4 s, below `CALL_SECONDS`."""
START: Final = "StartWorkflowExecution"
START_WITH_UPDATE: Final = "ExecuteMultiOperation"
UPDATE: Final = "UpdateWorkflowExecution"
SIGNAL: Final = "SignalWorkflowExecution"
OPERATIONS: Final = (START, START_WITH_UPDATE, UPDATE, SIGNAL)
"""By the names that Temporal's metrics have."""


class CountRefusals(Interceptor):
    """An interceptor of the gateway's client."""

    def __init__(self, refused: Counter) -> None:
        self._refused = refused

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:
        return _Counting(next, self._refused)


class _Counting(OutboundInterceptor):
    def __init__(self, next: OutboundInterceptor, refused: Counter) -> None:
        super().__init__(next)
        self._refused = refused

    async def start_workflow(self, input: StartWorkflowInput) -> WorkflowHandle[Any, Any]:
        return await self._counted(START, super().start_workflow(input))

    async def signal_workflow(self, input: SignalWorkflowInput) -> None:
        await self._counted(SIGNAL, super().signal_workflow(input))

    async def start_workflow_update(self, input: StartWorkflowUpdateInput) -> WorkflowUpdateHandle[Any]:
        return await self._counted(UPDATE, super().start_workflow_update(input))

    async def start_update_with_start_workflow(
        self, input: StartWorkflowUpdateWithStartInput
    ) -> WorkflowUpdateHandle[Any]:
        return await self._counted(START_WITH_UPDATE, super().start_update_with_start_workflow(input))

    async def _counted(self, operation: str, call: Awaitable[T]) -> T:
        try:
            return await call
        except RPCError as error:
            if error.status is RPCStatusCode.RESOURCE_EXHAUSTED:
                self._refused.labels(operation).inc()
            raise
