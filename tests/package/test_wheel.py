"""The wheel, installed into an empty environment outside the checkout, does what the README shows."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import TASK_QUEUE
from store import TaskStore
from tests.conftest import environment_for_downloads
from tests.workflows.platform import Platform, running_platform

PROJECT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
NOT_FOR_CALLERS = {"typer", "rich", "pydantic-settings", "fastapi", "sqlalchemy", "structlog", "uvicorn", "pytest"}


def uv(*arguments: str | Path) -> str:
    environment = environment_for_downloads()
    ended = subprocess.run([UV, *arguments], capture_output=True, text=True, check=False, cwd=PROJECT, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is no checkout."""
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, PROJECT)
    [built] = folder.glob("*.whl")
    return built


def installed(folder: Path, requirement: str) -> Path:
    """The programs of a new environment that holds the requirement, at locked versions, and nothing else."""
    environment = folder / "venv"
    uv("venv", "--python", sys.executable, environment)
    programs = environment / "bin"
    command = ("pip", "install", "--python", programs / "python", "--constraint", PROJECT / "requirements.lock")
    try:
        uv(*command, "--offline", requirement)
    except AssertionError:  # not all of it is in the cache
        uv(*command, requirement)
    return programs


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("library"), str(wheel))


@pytest.fixture(scope="module")
def command_line(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("command-line"), f"comfyui-temporal[cli] @ {wheel.as_uri()}")


@pytest_asyncio.fixture(scope="module")
async def stack(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory, outside: Path
) -> AsyncIterator[Platform]:
    """A running stack that describes itself in the folder outside the checkout, as the local stack does in its own."""
    running = running_platform(
        temporal_env, task_store, tmp_path_factory.mktemp("stack"), speed=800, task_queue=TASK_QUEUE
    )
    async with running as platform, platform.worker():
        (outside / ".run").mkdir()
        (outside / ".run" / "stack.json").write_text(platform.description().model_dump_json())
        yield platform


async def run(program: Path, *arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output; nothing of this test's environment leads to the checkout."""
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env={"PATH": os.defpath, "HOME": str(cwd), "COLUMNS": "200"} | environment,
    )
    out, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    # temporalio/sdk-python issue 300: a script that ends normally may be aborted in the interpreter's shutdown.
    is_aborted = process.returncode == -signal.SIGABRT and b"Python runtime state: finalizing" in out
    return 0 if is_aborted else process.returncode or 0, out.decode()


def example(name: str) -> str:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"<!-- example: python {name} -->\n```python\n(.*?)```", readme, re.DOTALL)
    return str(found)


def test_the_wheel_holds_one_typed_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"comfyui_temporal", "comfyui_temporal-0.2.0.dist-info"}
    assert "comfyui_temporal/py.typed" in names
    ours = {str(path.relative_to(PROJECT)) for path in (PROJECT / "comfyui_temporal").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours


def test_a_caller_gets_what_callers_need(library: Path) -> None:
    listed = uv("pip", "list", "--python", library / "python", "--format", "freeze").splitlines()
    names = {line.partition("==")[0] for line in listed}
    assert {"comfyui-temporal", "temporalio", "httpx", "pydantic"} <= names
    assert names & NOT_FOR_CALLERS == set()


async def test_nothing_else_of_the_tree_can_be_imported(library: Path, outside: Path) -> None:
    code = (
        "import importlib.util, comfyui_temporal, comfyui_temporal.plugin, comfyui_temporal.runs\n"
        "for name in comfyui_temporal.__all__: getattr(comfyui_temporal, name)\n"
        "rooms = 'workflows activities store gateway bridge doctor runtime local_stack proof tests starter worker'\n"
        "print([name for name in rooms.split() if importlib.util.find_spec(name)], comfyui_temporal.__file__)"
    )
    exit_code, said = await run(library / "python", "-c", code, cwd=outside)
    assert exit_code == 0, said
    assert said.startswith("[] ") and f"{PROJECT}/" not in said


@pytest.mark.parametrize("name", ["by temporal", "over http", "without async"])
async def test_the_readmes_example_runs_anywhere(library: Path, tmp_path: Path, stack: Platform, name: str) -> None:
    """In an empty folder, by what `make env` gives to a shell."""
    described = stack.description()
    given = {
        "TEMPORAL_ADDRESS": described.temporal_address,
        "GATEWAY": described.gateway_url,
        "TOKEN": described.tokens["tenant-demo"],
    }
    exit_code, said = await run(library / "python", "-c", example(name), cwd=tmp_path, **given)
    # The SDK's threads may crash an interpreter that shuts down, once everything is done and said.
    assert exit_code == 0 or (exit_code == -signal.SIGSEGV and name == "by temporal"), said
    assert "completed delivery 100.0" in said, "the last update"
    if name == "over http":
        assert re.search(r"lighthouse-3 completed \S+", said)
    else:
        assert f"{stack.simulators.comfyui_url}/results/" in said


async def test_without_its_extra_the_command_line_names_it(library: Path, outside: Path) -> None:
    exit_code, said = await run(library / "comfyui-tasks", "--help", cwd=outside)
    assert exit_code == 1
    assert "comfyui-temporal[cli]" in said


async def test_without_its_extra_encryption_names_it(library: Path, outside: Path) -> None:
    code = f"from comfyui_temporal import PayloadEncryption; PayloadEncryption.parse('k1:{'A' * 43}=')"
    exit_code, said = await run(library / "python", "-c", code, cwd=outside)
    assert exit_code == 1 and "comfyui-temporal[encryption]" in said


@pytest.mark.slow
async def test_the_command_line_finds_the_stack_and_follows_a_task(
    command_line: Path, outside: Path, stack: Platform
) -> None:
    program = command_line / "comfyui-tasks"
    exit_code, said = await run(program, "generate", "a cat", "--tenant", "tenant-demo", cwd=outside)
    assert exit_code == 0, said
    assert re.search(r"^status +completed$", said, re.MULTILINE)
    exit_code, said = await run(program, "show", "never-started", cwd=outside)
    assert exit_code == 6 and "never-started" in said
    _, said = await run(program, "--help", cwd=outside)
    assert "generate" in said and "doctor" not in said, "doctor needs the services' code"
