"""What a person sees while a task runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from comfyui_temporal.command_line.terminal import eta_of, printable, span, watchers
from comfyui_temporal.contracts.tasks import Confirmation, TaskStatus, TrainingProgress
from tests.cli.conftest import run_process

NOW = datetime(2026, 5, 4, 9, 0, tzinfo=UTC)


def progress(**fields: Any) -> TrainingProgress:
    return TrainingProgress(**{"task_id": "t1", "status": TaskStatus.RUNNING, **fields})


def shown(*states: TrainingProgress, is_terminal: bool, width: int = 200, task_id: str = "t1") -> str:
    screen = StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=width, legacy_windows=False)
    with watchers(console, [task_id]) as rows:
        for state in states:
            rows[task_id].progressed(state)
        if is_terminal:
            console.print()  # draws the bars once more, in their current state
    return Text.from_ansi(screen.getvalue()).plain


def test_a_bar_shows_stage_percentage_and_eta() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=90)
    screen = shown(progress(stage="processing", progress=40.0, next_eta=soon, estimated_time=3.0), is_terminal=True)
    assert "processing" in screen
    assert "40 %" in screen
    assert "next stage in 1 min" in screen
    assert "about 3 min in all" in screen


def test_a_bar_fits_a_narrow_terminal_with_its_eta() -> None:
    soon = datetime.now(UTC) + timedelta(minutes=59, seconds=30)
    state = progress(stage="data_ingest", progress=100.0, next_eta=soon, estimated_time=45.0)
    screen = shown(state, is_terminal=True, width=80, task_id="demo-training-9cf43b18")
    assert "demo-training-9cf43b18 data_ingest" in screen
    assert "next stage in 59 min" in screen


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_price_to_confirm_is_shown_with_its_command(is_terminal: bool) -> None:
    wanted = Confirmation(estimated_cost=180, current_balance=1000, confirm_by=NOW)
    screen = shown(progress(confirmation=wanted), is_terminal=is_terminal)
    assert "costs 180 points, balance 1000" in screen
    assert "comfyui-tasks confirm t1 --max-credits 180" in screen


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_price_that_rose_while_it_runs_names_its_next_checkpoint_and_no_time(is_terminal: bool) -> None:
    wanted = Confirmation(estimated_cost=360)
    screen = shown(progress(stage="training", confirmation=wanted), is_terminal=is_terminal)
    assert "costs 360 points: confirm before its next checkpoint, where it stops, with" in " ".join(screen.split())
    assert "price open" not in screen


def test_plain_lines_show_each_stage_and_each_ten_percent_once() -> None:
    states = [progress(stage="training", progress=percent / 2) for percent in range(0, 50)]
    lines = shown(*states, progress(stage="evaluating"), is_terminal=False).splitlines()
    assert [line.split()[2:4] for line in lines] == [
        ["training", "0"],
        ["training", "10"],
        ["training", "20"],
        ["evaluating", "0"],
    ]


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\rb\x00\u202ec\ud800") == "a\ufffd[2J\ufffdb\ufffd\ufffdc\ufffd"
    assert "\x1b[2J" not in shown(progress(stage="\x1b[2Jgone"), is_terminal=False)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (185, "3 min 5 s"), (3_540, "59 min"), (7_800, "2 h 10 min"), (-5, "0 s")],
)
def test_a_duration_reads_as_words(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_an_eta_says_what_is_known() -> None:
    assert eta_of(progress(), NOW) == ""
    assert (
        eta_of(progress(next_eta=NOW + timedelta(seconds=30), queue_position=2), NOW) == "next stage in 30 s, 2 ahead"
    )
    assert eta_of(progress(next_eta=NOW - timedelta(seconds=30)), NOW) == "next stage any moment"


INTERRUPTED_AT = """
import importlib.abc, os, signal, sys

class Ctrl(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Ctrl())
"""


@pytest.mark.parametrize("module", ["comfyui_temporal.command_line.app", "doctor.command"])
async def test_ctrl_c_while_it_is_loaded_ends_it_without_a_traceback(tmp_path: Path, module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_AT.format(module=module))
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    ended = await run_process("list", environment=environment)
    assert (ended.exit_code, ended.out, ended.err) == (130, "", "")
