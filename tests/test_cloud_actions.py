"""docs/temporal-cloud.md states what the recorded histories cost, counted by Temporal Cloud's list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory

from comfyui_temporal.client.temporal_tasks import POLL_SECONDS
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from proof.benchmarks.history_cost import billable_actions
from runtime.settings import Settings

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "temporal-cloud.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(?P<name>\w+)` \| .+ \| (?P<events>\d+) \| (?P<actions>\d+) \|$", re.MULTILINE)
STATED = {row["name"]: (int(row["events"]), int(row["actions"])) for row in ROW.finditer(PAGE)}
SECONDS_OF_30_DAYS = 30 * 24 * 3600


def counted(name: str, folder: str = "histories") -> tuple[int, int]:
    """Events and actions of a recorded history."""
    recorded = json.loads((TESTS / folder / f"{name}.json").read_text())
    events = WorkflowHistory.from_json("recorded", recorded).events
    return len(events), billable_actions(list(events))


def test_the_page_has_an_image_and_a_training() -> None:
    assert {"image_completed", "training_completed", "reconciler_idle"} <= set(STATED)


@pytest.mark.parametrize("name", STATED)
def test_a_history_costs_what_the_page_says(name: str) -> None:
    assert counted(name) == STATED[name]


def test_the_sentences_say_the_same() -> None:
    image, training = STATED["image_completed"][1], STATED["training_completed"][1]
    assert f"**an image takes {image} actions and a training {training}**" in " ".join(PAGE.split())
    job, bridge_training = (counted(name, "bridge/histories")[1] for name in ("job_delivered", "training_completed"))
    assert f"a job adds {job} (`job_delivered`), and a training {bridge_training}." in " ".join(PAGE.split())
    every = float(Settings.model_fields["reconcile_every_seconds"].default)
    a_pass = STATED["reconciler_idle"][1] + 2
    assert f"{a_pass} every {every / 60:g} minutes, {a_pass * SECONDS_OF_30_DAYS / every:,.0f} in 30 days" in PAGE
    assert f"makes it {a_pass * SECONDS_OF_30_DAYS / 1800:,.0f}" in PAGE
    assert f"{3600 / POLL_SECONDS:,.0f} actions an hour" in PAGE


def test_the_command_creates_every_search_attribute() -> None:
    assert re.findall(r'--search-attribute "(\w+)=Keyword"', PAGE) == list(SEARCH_ATTRIBUTES)
