"""A whole soak in small: real stack, real faults, interrupted once and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proof.simulators.credits_profile import PROFILES
from tests.waiting import eventually

PROJECT = Path(__file__).parents[2]
TASKS = 16


def soak(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "proof.soak", "--folder", str(folder), *options]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def is_under_way(folder: Path) -> bool:
    journal = folder / "soak.jsonl"
    return journal.exists() and '"fault"' in journal.read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("profile", list(PROFILES))
def test_a_soak_that_is_interrupted_goes_on_and_finds_no_untruth(tmp_path: Path, profile: str) -> None:
    folder = tmp_path / "soak"
    given = ("--tasks", str(TASKS), "--seed", "5", "--open", "12", "--gap", "2", "--speed", "200", "--profile", profile)
    first = soak(folder, *given)
    eventually(lambda: is_under_way(folder), within_seconds=60)
    os.kill(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    second = soak(folder, "--resume")
    said, _ = second.communicate(timeout=110)
    assert second.returncode == 0, said
    result = json.loads((folder / "result.json").read_text())
    assert sum(result["tasks"].values()) == TASKS
    assert result["faults"]
    assert not any(result["findings"].values())
