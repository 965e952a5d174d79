"""Services of the user's own: what is set is used, what cannot be used is refused before anything starts."""

from __future__ import annotations

import asyncio
import builtins
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.stack import StackDescription
from local_stack.commands import _wait_for_enter, demo, up
from local_stack.description import describe
from local_stack.folder import PROJECT, RunFolder, StackFailure, StackRecord
from local_stack.own_services import CREDITS_URL, DATABASE_SETTING, TASK_QUEUE, sentences
from local_stack.parts import LocalParts
from local_stack.ports import any_free_port, free_ports
from store import StoreHome, TablesTooOld, TaskStore, migrate
from store.namespace_check import home_of
from tests.conftest import NewDatabase
from tests.local_stack.folders import new_run_folder
from tests.package.test_settings import STACK

OWN = "http://127.0.0.1:1"
SECRET = "of the user's own services, long enough"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return new_run_folder(tmp_path / "run")


@pytest.fixture
def running(folder: RunFolder) -> Iterator[StackDescription]:
    """A folder that looks as if a simulated stack were up in it."""
    with folder.locked():
        folder.describe(STACK)
        folder.write_record(StackRecord(speed=100))
        yield STACK


@pytest.mark.parametrize("comfyui", [["http://127.0.0.1:8188"], []])
def test_a_demo_on_another_stack_than_the_one_asked_for_is_refused(
    folder: RunFolder, running: StackDescription, comfyui: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ran on the simulator that was up, and reported success."""
    if not comfyui:
        monkeypatch.setenv(CREDITS_URL, OWN)
    asked = f"{CREDITS_URL}={OWN}" if not comfyui else "COMFYUI=http://127.0.0.1:8188"
    for command in (demo, up):
        with pytest.raises(StackFailure) as refused:
            command(folder, None, comfyui)
        assert asked in str(refused.value) and "make down" in str(refused.value)
    with pytest.raises(StackFailure, match="SPEED=7"):
        demo(folder, 7, [])


def test_a_demo_on_a_server_that_does_not_answer_ends_at_once(folder: RunFolder) -> None:
    gone = f"http://127.0.0.1:{any_free_port()}"
    began = time.monotonic()
    with pytest.raises(StackFailure) as refused:
        demo(folder, None, [gone])
    assert time.monotonic() - began < 5
    assert gone in str(refused.value) and "Nothing was started." in str(refused.value)
    assert not folder.is_locked()


def test_the_program_says_it_in_one_sentence_without_a_traceback(folder: RunFolder) -> None:
    gone = f"http://127.0.0.1:{any_free_port()}"
    command = [sys.executable, "-m", "local_stack", "demo", "--folder", str(folder.path), "--credits", gone]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False, timeout=30)
    assert ended.returncode == 1
    assert f"The credits service at {gone} does not answer" in ended.stderr and "Traceback" not in ended.stderr


def test_ctrl_d_ends_the_demo_like_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(builtins, "input", closed)
    _wait_for_enter()


def test_a_credits_service_and_a_queue_that_are_set_are_used(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CREDITS_URL, f"{OWN}/")
    monkeypatch.setenv("COMFYUI_TEMPORAL_SERVICE_SECRET", SECRET)
    monkeypatch.setenv(TASK_QUEUE, "mine")
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "elsewhere")
    parts = LocalParts(folder, free_ports(), 1.0)
    processes = {part.name: part for part in parts.processes()}
    assert "credits" not in processes and "comfyui" in processes
    worker = processes["worker"].environment
    assert (worker[CREDITS_URL], worker[TASK_QUEUE]) == (OWN, "mine")
    assert worker["COMFYUI_TEMPORAL_SERVICE_SECRET"] == SECRET
    stack = describe(parts, folder.secrets(), {})
    assert (stack.credits_url, stack.task_queue) == (OWN, "mine")
    named = jwt.decode(stack.service_tokens["tenant-demo"], SECRET, ["HS256"], options={"verify_aud": False})
    assert named["tenant_id"] == "tenant-demo", "the user's own service knows the token"
    said = " ".join(sentences())
    assert OWN in said and "TEMPORAL_NAMESPACE is set and not used" in said


def test_without_own_services_nothing_of_the_users_secrets_is_used(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_TEMPORAL_SERVICE_SECRET", SECRET)
    parts = LocalParts(folder, free_ports(), 1.0)
    assert SECRET not in [part.environment.get("COMFYUI_TEMPORAL_SERVICE_SECRET") for part in parts.processes()]
    assert list(sentences()) == []


async def test_a_database_of_another_temporal_is_named_and_stays_as_it_is(
    folder: RunFolder,
    new_database: NewDatabase,
    temporal_env: WorkflowEnvironment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dsn = await new_database(migrated=False)
    await migrate(dsn, revision="0010")
    store = TaskStore(dsn)
    await store.rebind(StoreHome(namespace="production", namespace_id="another server's"))
    monkeypatch.setenv(DATABASE_SETTING, dsn)
    address = temporal_env.client.service_client.config.target_host
    parts = LocalParts(folder, {**free_ports(), "temporal": int(address.rpartition(":")[2])}, 1.0)

    assert f"Your own PostgreSQL is used, {store.address}" in " ".join(sentences())
    with pytest.raises(StackFailure, match="belongs to Temporal namespace 'production'") as refused:
        await parts.make_tables()

    assert store.address in str(refused.value)
    with pytest.raises(TablesTooOld, match="revision 0010"):
        await store.check_tables()
    await store.rebind(await home_of(temporal_env.client))
    await parts.make_tables()
    await store.check_tables()
    await store.close()


@pytest.mark.slow
def test_an_interrupted_demo_ends_with_130_and_no_traceback(folder: RunFolder) -> None:
    """Ctrl-C while the stack starts: nothing stays, and the exit code says so."""

    async def interrupted() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "local_stack", "demo", "--folder", str(folder.path)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=PROJECT,
        )
        assert process.stdout is not None
        first = await asyncio.wait_for(process.stdout.readline(), 30)
        process.send_signal(2)
        rest, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, (first + rest).decode()

    code, said = asyncio.run(interrupted())
    assert code == 130 and "Traceback" not in said, said
    assert not folder.is_locked()
