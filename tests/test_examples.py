"""Every request, answer, callback, error and event of the contract has an example that says nothing the models lose."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, TypeAdapter

from comfyui_temporal.contracts.comfyui import JobStatus, TrainingStatus
from comfyui_temporal.contracts.credits import LedgerKind
from comfyui_temporal.contracts.errors import COMFYUI_ERRORS, CREDITS_ERRORS, WireError
from comfyui_temporal.contracts.schemas import SCHEMAS
from comfyui_temporal.contracts.task_events import EventType

PROJECT = Path(__file__).parents[1]
EXAMPLES = PROJECT / "docs" / "examples"
FILES = sorted(EXAMPLES.rglob("*.json"))
BY_NAME = {schema.name: schema for schema in SCHEMAS}
READ_AS_NUMBER = {("cancel-hold-reply", "balance_after")}
"""The one field that a service sends as a text and our model reads as a number (contract §4, field)."""


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def schema_of(path: Path) -> str:
    return path.name.partition(".")[0]


def comparable(value: Any) -> Any:
    """Instants by their moment, numbers by their value: `Z` and `+00:00`, 3 and 3.0 are the same."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if isinstance(value, str) and re.match(r"^\d{4}-\d\d-\d\dT", value):
        return datetime.fromisoformat(value)
    return value


def as_read(value: Any) -> Any:
    """What the models read of an example, as JSON; a field that is read and not kept counts too."""
    if isinstance(value, list):
        return [as_read(item) for item in value]
    if not isinstance(value, BaseModel):
        return TypeAdapter(Any).dump_python(value, mode="json")
    extra = value.__pydantic_extra__ or {}
    fields = {name: getattr(value, name) for name in value.model_fields_set if name not in extra}
    return {name: as_read(field) for name, field in (fields | extra).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_says_exactly_what_its_model_keeps(path: Path) -> None:
    schema = BY_NAME[schema_of(path)]
    example = load(path)
    adapter = TypeAdapter(schema.type)
    kept = as_read(adapter.validate_python(example))
    for name, field in READ_AS_NUMBER:
        if schema.name == name:
            example = example | {field: int(example[field])}
    assert comparable(kept) == comparable(example)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_valid_against_the_exported_schema(path: Path) -> None:
    document = load(PROJECT / "docs" / "schemas" / f"{schema_of(path)}.json")
    problems = [
        error.message
        for error in Draft202012Validator(document).iter_errors(load(path))
        if (schema_of(path), *error.path) not in READ_AS_NUMBER
    ]
    assert problems == []


def test_every_schema_has_an_example() -> None:
    assert {schema_of(path) for path in FILES} == set(BY_NAME)


@pytest.mark.parametrize(("party", "rows"), [("comfyui", COMFYUI_ERRORS), ("credits", CREDITS_ERRORS)])
def test_every_error_has_an_example(party: str, rows: tuple[WireError, ...]) -> None:
    bodies = [load(path)["detail"] for path in (EXAMPLES / "errors" / party).glob("*.json")]
    assert sorted((body["message"], body["code"]) for body in bodies) == sorted((row.message, row.code) for row in rows)


def test_every_state_and_event_has_an_example() -> None:
    def values(prefix: str, field: str) -> set[str]:
        return {load(path)[field] for path in FILES if schema_of(path) == prefix}

    assert values("task-event", "event") | values("heartbeat", "event") == set(EventType)
    assert values("job-state", "job_status") == set(JobStatus)
    assert values("job-callback", "job_status") == set(JobStatus)
    assert values("training-state", "training_status") == set(TrainingStatus)
    kinds = {entry["kind"] for entry in load(EXAMPLES / "credits" / "ledger.json")["entries"]}
    assert kinds == set(LedgerKind)


def test_the_ledger_example_adds_up() -> None:
    entries = load(EXAMPLES / "credits" / "ledger.json")["entries"]
    assert sum(entry["change"] for entry in entries) == entries[0]["balance_after"]
    assert sum(entry["frozen_change"] for entry in entries) == 0


def test_the_index_lists_every_example() -> None:
    listed = re.findall(r"\]\(([^)]+\.json)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(path.relative_to(EXAMPLES)) for path in FILES)
