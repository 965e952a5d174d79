"""Recorded histories of the bridge's workflows replay with the real configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from temporalio.client import Interceptor, WorkflowHistory
from temporalio.contrib.opentelemetry import TracingInterceptor
from temporalio.worker import Replayer

from bridge.__main__ import WORKFLOWS
from comfyui_temporal.plugin import TasksPlugin
from tests.bridge.record_histories import HISTORIES, SCENARIOS

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
