"""What the documents say is what the code does: settings, codes, links, workflow names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from comfyui_temporal.command_line.settings import CommandSettings
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from proof.simulation.mutants import MUTANTS
from runtime.settings import Settings

SETTINGS = {**Settings.model_fields, **CommandSettings.model_fields}
PROJECT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").rglob("*.md"))]
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<default>.*?) \| (?P<what>.+) \|$", re.MULTILINE)


def text_of(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def shown_default(field: FieldInfo) -> str:
    """A default as it would be written into the environment."""
    default: Any = field.default
    if default is None or default == []:
        return "none"
    if isinstance(default, BaseModel):
        return "below"
    if isinstance(default, list):
        return f"`{','.join(f'{item:g}' if isinstance(item, float) else item for item in default)}`"
    if isinstance(default, bool | dict):
        return f"`{json.dumps(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def documented(section: str) -> dict[str, str]:
    return {found["name"]: found["default"] for found in ROW.finditer(section)}


def test_every_setting_is_documented_with_its_default() -> None:
    settings, _, prices = text_of("docs/settings.md").partition("## The price table")
    wanted = {name.upper(): shown_default(field) for name, field in SETTINGS.items()}
    assert documented(settings) == wanted, "docs/settings.md needs a row for each setting"
    assert documented(prices) == {name: shown_default(field) for name, field in PriceTable.model_fields.items()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_that_a_document_names_exists(path: Path) -> None:
    named = set(re.findall(r"COMFYUI_TEMPORAL_([A-Z0-9_]+)", path.read_text(encoding="utf-8")))
    assert named <= {name.upper() for name in SETTINGS}


def test_every_code_is_explained_to_operators() -> None:
    ends, _, records = text_of("docs/operations.md").partition("## Exception records")
    assert set(documented(ends)) == set(FailureCode)
    assert set(documented(records)) == set(ExceptionCode)


def test_the_readme_names_each_search_attribute() -> None:
    assert all(f"`{name}`" in text_of("README.md") for name in SEARCH_ATTRIBUTES)


def test_every_mutant_that_the_pitfalls_name_exists() -> None:
    text = text_of("docs/pitfalls.md")
    listed = {name for names in re.findall(r"mutants? ((?:`\w+`(?:, )?)+)", text) for name in re.findall(r"\w+", names)}
    assert len(listed) > 10
    assert listed <= set(MUTANTS)


def test_the_command_lines_settings_mean_what_the_services_settings_of_the_same_name_mean() -> None:
    shared = Settings.model_fields.keys() & CommandSettings.model_fields.keys()
    assert shared == {"temporal_address", "temporal_namespace", "temporal_profile", "task_queue", "encryption_keys"}
    for name in shared:
        ours, theirs = CommandSettings.model_fields[name], Settings.model_fields[name]
        assert (ours.annotation, ours.default) == (theirs.annotation, theirs.default)
    assert CommandSettings.model_config.get("env_prefix") == Settings.model_config.get("env_prefix")
