"""A mechanism of a run on its own: some lines of workflow code in a real run, and what they left in its history."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from temporalio import workflow
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import WorkflowHandle
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from tests.conftest import unique

Lines = Callable[[], Awaitable[Any]]
Meanwhile = Callable[[WorkflowHandle[Any, Any]], Awaitable[None]]
_lines: dict[str, Lines] = {}


@workflow.defn(failure_exception_types=[Exception])
class Probe:
    """Runs the lines that are registered under its id; an error that they raise ends the run."""

    @workflow.run
    async def run(self) -> Any:
        return await _lines[workflow.info().workflow_id]()


@dataclass
class Probed:
    """The result of the lines, and the run's events."""

    result: Any
    events: list[HistoryEvent]

    @property
    def timers(self) -> dict[str, str]:
        """How each timer with a summary ended, by summary."""
        ends = {
            EventType.EVENT_TYPE_TIMER_FIRED: ("timer_fired_event_attributes", "rang"),
            EventType.EVENT_TYPE_TIMER_CANCELED: ("timer_canceled_event_attributes", "cancelled"),
        }
        summaries: dict[str, str] = {}
        found: dict[str, str] = {}
        for event in self.events:
            if event.event_type == EventType.EVENT_TYPE_TIMER_STARTED and event.user_metadata.HasField("summary"):
                summary = json.loads(event.user_metadata.summary.data)
                assert summary not in found, f"two timers are called {summary}"
                summaries[event.timer_started_event_attributes.timer_id] = summary
                found[summary] = "stood"
            elif event.event_type in ends:
                attributes, end = ends[event.event_type]
                summary = summaries.get(getattr(event, attributes).timer_id)
                if summary is not None:
                    found[summary] = end
        return found


async def nothing(_handle: WorkflowHandle[Any, Any]) -> None:
    pass


async def probed(environment: WorkflowEnvironment, lines: Lines, meanwhile: Meanwhile = nothing) -> Probed:
    """Run the lines on their own worker, and `meanwhile` once they run.

    Raises WorkflowFailureError if they raise.
    """
    name = unique("probe")
    _lines[name] = lines
    worker = Worker(environment.client, task_queue=name, workflows=[Probe], workflow_runner=UnsandboxedWorkflowRunner())
    async with worker:
        handle = await environment.client.start_workflow(Probe.run, id=name, task_queue=name)
        await meanwhile(handle)
        result = await handle.result()
    return Probed(result, [event async for event in handle.fetch_history_events()])
