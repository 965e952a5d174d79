"""What one image task with five spread callbacks costs in Temporal, compared with a bare workflow with the same job.

Billable actions by Temporal Cloud's list (docs.temporal.io/cloud/actions): starts, each try of an activity, timers,
signals, updates, search attribute upserts, two for a child; all local activities of one workflow task are one action.
What is in no history is not counted: queries, heartbeats, schedules, the surcharge for fairness.
"""

from __future__ import annotations

import asyncio
from typing import Final

from pydantic import BaseModel
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from comfyui_temporal.contracts.tasks import workflow_id_of
from proof.benchmarks.contestants import Bare, Ours
from proof.benchmarks.throughput import contest, towards

ACTIONS: Final = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED,
    EventType.EVENT_TYPE_TIMER_STARTED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_ACCEPTED,
    EventType.EVENT_TYPE_START_CHILD_WORKFLOW_EXECUTION_INITIATED,
}
EXEMPT: Final = frozenset({"TemporalChangeVersion"})
"""Attributes that Temporal sets by itself."""


class Cost(BaseModel):
    """Of one task on an idle machine."""

    name: str
    events: int
    actions: int

    @property
    def shown(self) -> str:
        return f"{self.events} events, {self.actions} billable actions"


def billable_actions(events: list[HistoryEvent]) -> int:
    """Temporal Cloud's billable actions of one run. A child's own history has its second action."""
    markers = [event for event in events if event.event_type == EventType.EVENT_TYPE_MARKER_RECORDED]
    tasks = {event.marker_recorded_event_attributes.workflow_task_completed_event_id for event in markers}
    retries = sum(max(0, event.activity_task_started_event_attributes.attempt - 1) for event in events)
    upserts = sum(
        bool(set(event.upsert_workflow_search_attributes_event_attributes.search_attributes.indexed_fields) - EXEMPT)
        for event in events
    )
    return sum(event.event_type in ACTIONS for event in events) + retries + upserts + len(tasks)


async def measure() -> list[Cost]:
    costs = []
    for kind in (Ours, Bare):
        async with contest() as (servers, party):
            contestant = kind(servers)
            await contestant.run_workers(1, towards(party))
            party.call_back = contestant.call_back
            await contestant.start("cost")
            handle = servers.client.get_workflow_handle(workflow_id_of("cost"))
            async with asyncio.timeout(60):
                await handle.result()
            events = [event async for event in handle.fetch_history_events()]
            costs.append(Cost(name=contestant.name, events=len(events), actions=billable_actions(events)))
    return costs
