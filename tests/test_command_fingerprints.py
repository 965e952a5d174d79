"""What today's code issues on each recorded history is what the file beside it says."""

from __future__ import annotations

import difflib
import re
from datetime import timedelta
from pathlib import Path

import pytest

from tests.command_fingerprints import CHANGED, FOLDERS, RECORDED, commands_of, file_of
from workflows import outside_call


async def assert_unchanged(recorded: Path) -> None:
    file = file_of(recorded)
    expected, found = file.read_text(encoding="utf-8"), await commands_of(recorded)
    difference = "\n".join(
        difflib.unified_diff(expected.splitlines(), found.splitlines(), "recorded", "today", lineterm="", n=2)
    )
    assert not difference, CHANGED.format(name=recorded.stem, file=file.name, difference=difference)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
async def test_the_commands_are_those_of_the_file(recorded: Path) -> None:
    await assert_unchanged(recorded)


async def test_a_changed_time_limit_is_shown_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of the same history passes."""
    monkeypatch.setattr(outside_call, "HEARTBEAT_TIMEOUT", timedelta(seconds=7))
    recorded = next(path for path in RECORDED if path.stem == "image_completed")
    with pytest.raises(AssertionError) as shown:
        await assert_unchanged(recorded)
    text = str(shown.value)
    assert "+schedule activity | pre_deduct" in text
    assert "heartbeat 7s" in text
    assert "workflow.patched" in text and "python -m tests.command_fingerprints image_completed" in text


def test_each_history_has_a_file_and_each_file_a_history() -> None:
    files = {path for folder in FOLDERS for path in folder.glob("*.commands")}
    assert files == {file_of(recorded) for recorded in RECORDED}


def test_no_file_shows_what_a_payload_holds() -> None:
    """Prompts, prices, addresses and ids of the recorded tasks."""
    for recorded in RECORDED:
        text = file_of(recorded).read_text(encoding="utf-8")
        for held in ("lighthouse", "tenant-demo", "http", "file:", "no longer wanted"):
            assert held not in text, f"{recorded.stem}: {held}"
        assert not re.search(r"(image|training|hold|queue)-[0-9a-f]{8}", text), recorded.stem
