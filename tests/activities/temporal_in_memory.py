"""A Temporal that keeps runs and their histories in memory, for what activities read of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.any_pb2 import Any as Detail
from temporalio.api.common.v1 import GrpcStatus, Payload
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.enums.v1 import WorkflowExecutionStatus as Status
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.plugin import DATA_CONVERTER

_TYPES = "type.googleapis.com/temporal.api.errordetails.v1."
NO_RUN = RPCError("workflow not found", RPCStatusCode.NOT_FOUND, b"")
NO_NAMESPACE = RPCError(
    "Namespace tasks is not found.",
    RPCStatusCode.NOT_FOUND,
    GrpcStatus(code=5, details=[Detail(type_url=f"{_TYPES}NamespaceNotFoundFailure")]).SerializeToString(),
)
AWAY = RPCError("no connection", RPCStatusCode.UNAVAILABLE, b"")


def payload(document: Any) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(document).encode())


def begun(workflow: str, run: Any) -> HistoryEvent:
    """The first event of a run."""
    event = HistoryEvent(event_type=Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED)
    event.workflow_execution_started_event_attributes.workflow_type.name = workflow
    event.workflow_execution_started_event_attributes.input.payloads.append(payload(run))
    return event


def requested(call: str, argument: Any) -> HistoryEvent:
    """A call that a run made, and that was not answered."""
    event = HistoryEvent(event_type=Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    event.activity_task_scheduled_event_attributes.activity_type.name = call
    event.activity_task_scheduled_event_attributes.input.payloads.append(payload(argument))
    return event


def continued_as(run_id: str) -> HistoryEvent:
    """The last event of a run that continued as this one."""
    event = HistoryEvent(event_type=Happened.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW)
    event.workflow_execution_continued_as_new_event_attributes.new_execution_run_id = run_id
    return event


@dataclass
class Run:
    """One run. `first_run_id` names the first run of its chain; a reset keeps it."""

    run_id: str
    status: str = "TERMINATED"
    first_run_id: str = "run-1"
    events: Iterable[HistoryEvent] = ()

    @property
    def info(self) -> WorkflowExecutionInfo:
        info = WorkflowExecutionInfo(first_run_id=self.first_run_id)
        info.execution.run_id = self.run_id
        info.status = Status.Value(f"WORKFLOW_EXECUTION_STATUS_{self.status}")
        return info


class Temporal:
    """Runs under one workflow id, the newest last. What it has deleted is not there."""

    namespace = "tasks"
    data_converter = DATA_CONVERTER

    def __init__(self, *runs: Run) -> None:
        self.runs = list(runs)
        self.problem: RPCError | None = None
        """What each request is answered with."""
        self.before_answer: Callable[[], Awaitable[object]] | None = None
        self.workflow_service = self

    @property
    def client(self) -> Client:
        return cast(Client, self)

    async def describe_workflow_execution(self, request: Any, **_: Any) -> DescribeWorkflowExecutionResponse:
        run = self._run(request.execution.run_id)
        if self.before_answer is not None:
            await self.before_answer()
        return DescribeWorkflowExecutionResponse(workflow_execution_info=run.info)

    def get_workflow_handle(self, workflow_id: str, *, run_id: str | None = None) -> Any:
        async def events(**asked: Any) -> AsyncIterator[HistoryEvent]:
            run = list(self._run(run_id).events)
            first = len(run) if "event_filter_type" in asked else 1  # the last event alone
            for number, event in enumerate(run[first - 1 :], start=first):
                event.event_id = number
                yield event

        async def describe(**_: Any) -> Any:
            run = self._run(run_id)
            return SimpleNamespace(run_id=run.run_id, status=WorkflowExecutionStatus(run.info.status))

        return SimpleNamespace(id=workflow_id, run_id=run_id, fetch_history_events=events, describe=describe)

    def _run(self, run_id: str | None) -> Run:
        if self.problem is not None:
            raise self.problem
        found = [run for run in self.runs if run.run_id == run_id or not run_id]
        if not found:
            raise NO_RUN
        return found[-1]
