"""An image task's cost (docs/performance.md, "What a task costs Temporal"); its history reads as the step table."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.client.submission import start_task
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus
from proof.benchmarks.history_cost import billable_actions
from store import TaskStore
from tests.workflows.books import ended
from tests.workflows.platform import Platform, running_platform
from tests.workflows.test_ticks import heard, report, shown, started_job


class Cost(NamedTuple):
    signals: int
    events: int
    actions: int


COST = Cost(signals=2, events=42, actions=16)
COST_OF_SIGNALS = Cost(signals=5, events=57, actions=22)
"""With `--signals`."""

OF_THE_CLOCK = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_OPTIONS_UPDATED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIME_SKIPPING_TRANSITIONED,
}
"""The events by which a test moves a run's clock."""


def names_of(events: list[HistoryEvent]) -> list[str]:
    return [EventType.Name(event.event_type).removeprefix("EVENT_TYPE_") for event in events]


async def test_an_image_task_with_five_spread_callbacks_stays_small(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cost = COST_OF_SIGNALS if pytestconfig.getoption("signals") else COST
    async with running_platform(temporal_env, task_store, tmp_path, speed=24.0) as platform, platform.worker():
        task = ImageTask.model_validate(platform.image(priority="accelerated"))
        started = await start_task(platform.client, task, task_queue=platform.task_queue)
        handle = platform.client.get_workflow_handle(started.handle.id)
        ending = await ended(platform, handle)
        events = [event async for event in handle.fetch_history_events()]
    assert ending.status is TaskStatus.COMPLETED
    signals = [event for event in events if event.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED]
    assert len(signals) == cost.signals, names_of(events)
    assert sum(kind.startswith("task.running") for kind in ending.kinds) == 5, "no event was coalesced"
    names = names_of(events)
    assert len(events) <= cost.events, names
    assert billable_actions(events) <= cost.actions, names


@pytest.mark.usefixtures("short_way")
async def test_a_look_into_the_store_costs_six_events_and_two_actions(slow_platform: Platform) -> None:
    """A job that ticks for longer than 30 s: its run takes the figures over, once in 30 s.

    Before the first look an older timer may fire, and the run notes its version with it.
    """
    handle = await started_job(slow_platform)
    looks = []
    for progress in (20.0, 30.0, 40.0):
        await report(slow_platform, handle, stage_progress=progress)
        await shown(slow_platform, handle, progress)
        before = len([event async for event in handle.fetch_history_events()])
        await slow_platform.pass_time(handle, 31)
        await heard(slow_platform, handle, progress)
        since = [event async for event in handle.fetch_history_events()][before:]
        looks.append([event for event in since if event.event_type not in OF_THE_CLOCK])
    assert len(looks[0]) <= 13 and billable_actions(looks[0]) <= 3, names_of(looks[0])
    assert [billable_actions(look) for look in looks[1:]] == [2, 2]
    step = ["TIMER_FIRED", *(f"WORKFLOW_TASK_{end}" for end in ("SCHEDULED", "STARTED", "COMPLETED"))]
    assert [names_of(look) for look in looks[1:]] == 2 * [[*step, "MARKER_RECORDED", "TIMER_STARTED"]]


async def test_the_calls_of_a_history_read_as_the_step_table(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> None:
    async with running_platform(temporal_env, task_store, tmp_path) as platform, platform.worker():
        handle = await platform.start_image()
        await ended(platform, handle)
        scheduled = [
            event
            async for event in handle.fetch_history_events()
            if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
        ]
    summaries = [event.user_metadata.summary.data.decode().strip('"') for event in scheduled]
    assert [summary for summary in summaries if summary != "6 record"] == ["1 submit", "3 hold", "5 commit"]
