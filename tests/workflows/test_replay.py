"""Recorded histories replay with the real configuration: today's code goes on with runs that older code began."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType as HistoryEvent
from temporalio.client import Interceptor, WorkflowHistory
from temporalio.contrib.opentelemetry import TracingInterceptor
from temporalio.worker import Replayer

from comfyui_temporal.contracts.start_answer import WAIT_UNTIL_HELD
from comfyui_temporal.plugin import TasksPlugin
from tests.bridge.record_histories import HISTORIES as OF_BRIDGE
from tests.workflows.books import ended
from tests.workflows.platform import Handle, Platform
from tests.workflows.record_histories import HISTORIES, SCENARIOS
from worker import WORKFLOWS
from workflows import outside_call

RECORDED = sorted(HISTORIES.glob("*.json"))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
@pytest.mark.parametrize("interceptors", [[], [TracingInterceptor()]], ids=["", "traced"])
async def test_a_recorded_history_replays(recorded: Path, interceptors: list[Interceptor]) -> None:
    replayer = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin(interceptors=interceptors)], debug_mode=True)
    history = json.loads(recorded.read_text())  # noqa: ASYNC240
    workflow_id = history["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    await replayer.replay_workflow(WorkflowHistory.from_json(workflow_id, history))


def test_every_scenario_is_recorded() -> None:
    assert {path.stem for path in RECORDED} == {scenario.__name__ for scenario in SCENARIOS}


@pytest.mark.parametrize("is_training", [False, True], ids=["image", "training"])
@pytest.mark.parametrize("update", ["cancel_task", WAIT_UNTIL_HELD])
async def test_an_update_that_came_while_a_local_try_outlived_its_workflow_task_replays(
    quick_platform: Platform, monkeypatch: pytest.MonkeyPatch, update: str, is_training: bool
) -> None:
    """Replayed, it comes with the start; as it happened, it came some workflow tasks later."""
    monkeypatch.setattr(outside_call, "LOCAL_TIMEOUT", timedelta(seconds=60))
    may_claim, claim = asyncio.Event(), quick_platform.store.claim

    async def claim_late(*arguments: Any, **named: Any) -> bool:
        await may_claim.wait()
        return await claim(*arguments, **named)

    monkeypatch.setattr(quick_platform.store, "claim", claim_late)
    task = quick_platform.training() if is_training else quick_platform.image()
    handle = await quick_platform.start(task, task_timeout=timedelta(seconds=1))
    await quick_platform.until(lambda: _has_workflow_tasks(handle, 1))
    asking = asyncio.create_task(handle.execute_update(update, {}))
    await quick_platform.until(lambda: _has_workflow_tasks(handle, 4))
    may_claim.set()
    answer = await asking
    assert answer.get("outcome", answer.get("reached")) in ("accepted", "held")
    await ended(quick_platform, handle)
    order = [event.event_type async for event in handle.fetch_history_events()]
    answered = order.index(HistoryEvent.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_COMPLETED)
    is_early = answered < order.index(HistoryEvent.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    assert is_early == (update == "cancel_task"), "as when it comes with the start"
    replayer = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin()], debug_mode=True)
    await replayer.replay_workflow(await handle.fetch_history())


async def _has_workflow_tasks(handle: Handle, count: int) -> bool:
    """Whether so many workflow tasks have been completed, with nothing to show for it."""
    events = [event.event_type async for event in handle.fetch_history_events()]
    return events.count(HistoryEvent.EVENT_TYPE_WORKFLOW_TASK_COMPLETED) >= count


@pytest.mark.parametrize("file", [*RECORDED, *sorted(OF_BRIDGE.glob("*.json"))], ids=lambda path: path.stem)
def test_a_recorded_history_does_not_name_the_machine_that_recorded_it(file: Path) -> None:
    assert re.findall(r'File \\"/', file.read_text()) == []
