"""Every code block of README and docs runs as written, in the order of its page, or says why it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_stack.background import end_stack
from local_stack.folder import RunFolder
from proof.document_blocks import PAGES, PROJECT, RUNNABLE, SHOWN, Block, blocks_of, script_of
from tests.local_stack.folders import new_run_folder

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.reason]
MOST_NOT_RUN = 31
RUN_SECONDS = 400
OWN_SHELL = ("PATH", "HOME", "LANG", "TMPDIR")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_is_run_or_shown_or_says_why_not(block: Block) -> None:
    assert block.language in RUNNABLE | SHOWN, f"{block.place}: name the block's language"
    assert block.language in RUNNABLE or block.reason is None
    assert block.reason is None or len(block.reason) > 10


def test_few_blocks_are_not_run() -> None:
    not_run = [block.place for block in BLOCKS if block.reason is not None]
    assert len(not_run) <= MOST_NOT_RUN, not_run


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=lambda block: block.place)
def test_a_shell_block_can_be_parsed(block: Block) -> None:
    ended = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 or "<" in block.code, ended.stderr


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_a_python_block_is_whole(block: Block) -> None:
    compile(block.code, block.place, "exec")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the checkout whose stack uses free ports, with the environment that is set up already.

    Outside pytest's own folder: started by root, PostgreSQL runs as another user, which cannot enter that.
    """
    with tempfile.TemporaryDirectory(prefix="checkout-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        folder.chmod(0o755)
        run_folder = _copied(folder)
        yield folder
        end_stack(run_folder)


def _copied(folder: Path) -> RunFolder:
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    _set_up(folder, (PROJECT / ".venv").resolve())
    for name in ("Makefile", "requirements-dev.lock"):  # older than the environment: `make setup` has nothing to do
        os.utime(folder / name, (0, 0))
    return new_run_folder(folder / ".run")


def _set_up(folder: Path, venv: Path) -> None:
    """What `make setup` makes: the environment, and the program that runs this copy."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("lib", "pyvenv.cfg", ".ready"):
        (folder / ".venv" / name).symlink_to(venv / name)
    for program in (venv / "bin").iterdir():
        if program.name != "comfyui-tasks":
            (programs / program.name).symlink_to(program)
    own = programs / "comfyui-tasks"
    own.write_text(f'#!/bin/sh\nexec "{programs}/python" "{folder}/starter.py" "$@"\n')
    own.chmod(0o755)


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS + 60)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language in RUNNABLE and not block.reason for block in blocks_of(page))],
    ids=lambda page: page.name,
)
def test_the_blocks_of_a_page_run_in_its_order(page: Path, checkout: Path, tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    environment = {name: value for name in OWN_SHELL if (value := os.environ.get(name)) is not None}
    ended = subprocess.run(
        ["bash", "-c", script_of(page, scripts)],
        cwd=checkout,
        env=environment | {"PYTHON": "false"},  # nothing may set the environment up again
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert ended.returncode == 0 and "== all done" in ended.stdout, ended.stdout[-6000:]
