"""Runs as Temporal describes them, in any status.

The SDK's `describe`, `list_workflows` and `query` raise if a status is not in its enum, and the status of a paused run
is not (pitfall 42). Here such a run is read like any other. Only a run that is known to be closed counts as over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import PendingActivityInfo, WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest, ListWorkflowExecutionsRequest
from temporalio.client import Client, WorkflowHandle
from temporalio.common import TypedSearchAttributes
from temporalio.converter import DataConverter, decode_typed_search_attributes
from temporalio.service import RPCError

PAGE_SIZE: Final = 100
T = TypeVar("T")


def is_namespace_missing(error: RPCError) -> bool:
    """NOT_FOUND of the namespace, not of a run: the configuration is wrong, and no run has vanished."""
    return any("NamespaceNotFound" in detail.type_url for detail in error.grpc_status.details)


class RunStatus(StrEnum):
    """A run's status. `UNKNOWN`: the server reports a status that this code does not know."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    TERMINATED = "terminated"
    CONTINUED_AS_NEW = "continued_as_new"
    TIMED_OUT = "timed_out"
    UNKNOWN = "unknown"

    @property
    def is_over(self) -> bool:
        """Whether the run is known to be closed. A paused or unknown one is open."""
        return self not in (RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.UNKNOWN)

    @classmethod
    def of(cls, number: int) -> RunStatus:
        """The status by the server's number for it."""
        known = WorkflowExecutionStatus.DESCRIPTOR.values_by_number.get(number)
        name = known.name.removeprefix("WORKFLOW_EXECUTION_STATUS_") if known else ""
        return cls(name.lower()) if name in cls.__members__ else cls.UNKNOWN


@dataclass(frozen=True)
class RunSeen:
    """One run of a workflow."""

    info: WorkflowExecutionInfo
    """As the server sent it."""
    pending_activities: Sequence[PendingActivityInfo] = field(default=(), repr=False)
    """Only set if the run was described, not listed."""
    converter: DataConverter = field(default=DataConverter.default, repr=False)

    @property
    def workflow_id(self) -> str:
        return self.info.execution.workflow_id

    @property
    def run_id(self) -> str:
        return self.info.execution.run_id

    @property
    def first_run_id(self) -> str:
        """The first run of the chain that continued as this one."""
        return self.info.first_run_id

    @property
    def workflow_type(self) -> str:
        return self.info.type.name

    @property
    def status(self) -> RunStatus:
        return RunStatus.of(self.info.status)

    @property
    def start_time(self) -> datetime:
        return _instant(self.info.start_time)

    @property
    def close_time(self) -> datetime | None:
        return _instant(self.info.close_time) if self.info.HasField("close_time") else None

    @property
    def search_attributes(self) -> TypedSearchAttributes:
        return decode_typed_search_attributes(self.info.search_attributes)

    async def memo(self) -> dict[str, Any]:
        """The memo's values as plain JSON."""
        fields = self.info.memo.fields
        return {name: (await self.converter.decode([payload]))[0] for name, payload in fields.items()}


def _instant(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)


class NoQueryNow(Exception):
    """The run is paused and answers no query. The text is a sentence to display."""


async def query_run(handle: WorkflowHandle[Any, Any], query: str, *, result_type: type[T], rpc_timeout: timedelta) -> T:
    """A query's answer. Raises NoQueryNow, and the errors of the SDK's `query`."""
    try:
        answer: T = await handle.query(query, result_type=result_type, rpc_timeout=rpc_timeout)
    except ValueError as error:
        if type(error) is not ValueError or "WorkflowExecutionStatus" not in str(error):
            raise
        raise NoQueryNow(
            f"The run of {handle.id} is paused in Temporal: it makes no progress until it is unpaused."
        ) from None
    return answer


async def describe_run(
    client: Client, workflow_id: str, run_id: str | None = None, *, rpc_timeout: timedelta
) -> RunSeen:
    """The run with this id, the newest unless one is named. Raises RPCError, NOT_FOUND if there is none."""
    described = await client.workflow_service.describe_workflow_execution(
        DescribeWorkflowExecutionRequest(
            namespace=client.namespace,
            execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id or ""),
        ),
        retry=True,
        timeout=rpc_timeout,
    )
    return RunSeen(described.workflow_execution_info, described.pending_activities, client.data_converter)


async def list_runs(client: Client, query: str, *, rpc_timeout: timedelta) -> AsyncIterator[RunSeen]:
    """The runs that a visibility query finds, in the server's order. Raises RPCError."""
    page = b""
    while True:
        listed = await client.workflow_service.list_workflow_executions(
            ListWorkflowExecutionsRequest(
                namespace=client.namespace, query=query, page_size=PAGE_SIZE, next_page_token=page
            ),
            retry=True,
            timeout=rpc_timeout,
        )
        for info in listed.executions:
            yield RunSeen(info, converter=client.data_converter)
        page = listed.next_page_token
        if not page:
            return
