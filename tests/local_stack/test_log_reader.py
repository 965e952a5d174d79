"""`make logs` shows lines that a person can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from local_stack.folder import RunFolder
from local_stack.log_reader import LAST, follow_logs, readable


def test_a_line_is_time_part_and_what_happened() -> None:
    record = {"call": "pre_deduct", "attempt": 2, "event": "outside_call", "logger": "activities", "level": "warning"}
    line = readable("worker", json.dumps(record | {"timestamp": "2026-11-29T09:44:29.163914Z"}))
    assert line == "09:44:29  worker    WARNING outside_call  call=pre_deduct attempt=2"
    assert readable("postgres", "LOG:  ready").split() == ["postgres", "LOG:", "ready"]
    broken = readable("worker", json.dumps(record | {"exception": "Traceback\nValueError: odd"}))
    assert broken.splitlines()[1:] == ["                    Traceback", "                    ValueError: odd"]


def test_the_last_lines_of_each_part_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.log("worker").write_text("".join(f"line {n}\n" for n in range(LAST + 5)) + "half a line")
    folder.log("gateway").write_text('{"event": "request", "timestamp": "2026-11-29T09:44:29Z"}\n')
    follow_logs(folder, is_over=True)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == LAST + 1 and "09:44:29  gateway   request" in shown
    assert shown[-1].endswith(f"line {LAST + 4}")
