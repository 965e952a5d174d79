"""Upgrades from each release: its open runs go on with today's code, and their money stays correct."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

from comfyui_temporal.contracts.continuation import ImageRun, TrainingRun
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.plugin import TasksPlugin
from tests.versions.record import NEWEST, VERSIONS
from tests.versions.test_side_by_side import bare, continued, delivered, waiting
from tests.versions.words import as_released
from tests.workflows.books import ended, runs_of
from tests.workflows.platform import Platform
from tests.workflows.record_histories import HISTORIES
from worker import WORKFLOWS
from workflows.task_flow import TaskFlow

__all__ = ["bare"]
RELEASES = sorted(folder.name for folder in VERSIONS.iterdir() if folder.is_dir() and folder.name[0].isdigit())
RECORDED = sorted(HISTORIES.glob("*.json"))


def test_every_release_is_recorded() -> None:
    assert RELEASES[0] == "0.1.0" and RELEASES[-1] == NEWEST
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == NEWEST, "the folder of the version in progress has its name"


def continuing_as(release: str, patch: pytest.MonkeyPatch) -> None:
    """Make today's flows pass on what that release would have."""
    today = TaskFlow._continuation

    def continuation_of_release(flow: TaskFlow[Any, Any]) -> Any:
        run: ImageRun | TrainingRun = today(flow)
        document = run.model_dump(mode="json")
        released = as_released(document, recorded_of(release, "image" if isinstance(run, ImageRun) else "training"))
        for job, kept in zip(released["carried"]["jobs"], document["carried"]["jobs"], strict=True):
            job["request"] = kept["request"]  # of two kinds, whose fields have not changed
        return released

    patch.setattr(TaskFlow, "_continuation", continuation_of_release)


def recorded_of(release: str, kind: str) -> Any:
    return json.loads((VERSIONS / release / f"{kind}-run.json").read_text())


@pytest.mark.parametrize("kind", ["image", "training"])
@pytest.mark.parametrize("release", RELEASES)
async def test_a_run_that_a_release_continued_goes_on(
    bare: Platform,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    kind: str,
) -> None:
    task = bare.image() if kind == "image" else bare.training()
    with monkeypatch.context() as patch:
        continuing_as(release, patch)
        async with bare.worker():
            handle = await waiting(bare, task)
            document = await continued(bare, handle)
    assert set(document["carried"]["hold"]) <= set(recorded_of(release, kind)["carried"]["hold"])
    async with bare.worker():
        await continued(bare, handle)
        await delivered(bare, handle)
        ending = await ended(bare, handle)
    assert ending.status is TaskStatus.COMPLETED and len(await runs_of(bare, handle)) >= 3
    assert len(await bare.simulators.admin.credits.holds(task["task_id"])) == 1


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
async def test_a_recorded_run_is_replayed_from_every_open_point(recorded: Path) -> None:
    """An open run is a history without its end: at each of its workflow tasks today's code takes it over."""
    history = WorkflowHistory.from_json("any", recorded.read_text())  # noqa: ASYNC240
    workflow_id = history.events[0].workflow_execution_started_event_attributes.workflow_id
    # `debug_mode`: what a slow machine takes two seconds for is no deadlock.
    replayer = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin()], debug_mode=True)
    begun = [
        place
        for place, event in enumerate(history.events)
        if event.event_type == Happened.EVENT_TYPE_WORKFLOW_TASK_STARTED
    ]
    for place in begun[1:]:
        await replayer.replay_workflow(WorkflowHistory(workflow_id, history.events[: place + 1]))
