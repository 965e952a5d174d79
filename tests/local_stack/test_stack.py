"""The whole stack, really started: one life of one folder, from the first start to the last."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import httpx
import jwt
import psutil
import pytest
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client

from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES, workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from doctor.examination import check_comfyui, check_credits, services
from doctor.finding import Verdict
from local_stack.background import end_stack, running_stack, start_stack
from local_stack.child import is_running
from local_stack.commands import EXIT_NOT_UP, down, status, up
from local_stack.folder import PROJECT, RunFolder, StackFailure, StackRecord
from runtime.reconciler_schedule import standing_reconciler
from runtime.settings import Settings
from tests.conftest import unique
from tests.local_stack.folders import new_run_folder
from tests.waiting import comes_true, eventually

SPEED = 200.0
PARTS = {"temporal", "postgres", "credits", "comfyui", "gateway", "worker"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A folder of its own; whatever a failed test leaves in it is ended."""
    made = new_run_folder(tmp_path_factory.mktemp("stack") / "run")
    yield made
    end_stack(made)


@pytest.fixture(scope="module")
def first_life(folder: RunFolder) -> StackRecord:
    """A stack whose command was killed, as when a terminal is closed during a demo: what it ran."""
    code = (
        "import pathlib, sys, time; from local_stack.background import start_stack; "
        "from local_stack.folder import RunFolder\n"
        f"start_stack(RunFolder(pathlib.Path(sys.argv[1])), {SPEED}, print, has_lifeline=True)\n"
        "print('all ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as demo:
        assert demo.stdout is not None
        heard = []
        for line in demo.stdout:
            heard.append(line)
            if line == "all ready\n":
                break
        record = folder.record()
        demo.kill()
    assert record is not None, heard
    assert heard[-1] == "all ready\n"
    return record


@pytest.fixture(scope="module")
def stack(folder: RunFolder, first_life: StackRecord) -> StackDescription:
    """The second life: `make up` on the folder of the first, left running."""
    eventually(lambda: not folder.is_locked(), within_seconds=30)
    assert up(folder, SPEED) == 0
    description = folder.description()
    assert description is not None
    return description


@pytest.fixture
async def client(stack: StackDescription) -> Client:
    return await Client.connect(stack.temporal_address, namespace=stack.namespace, plugins=[TasksPlugin()])


def pid_of(folder: RunFolder, part: str) -> int | None:
    description = folder.description()
    return description.pids.get(part) if description is not None else None


def restarts_of(folder: RunFolder, part: str) -> int:
    record = folder.record()
    return record.processes[part].restarts if record is not None and part in record.processes else 0


@pytest.mark.slow
def test_a_stack_ends_with_the_command_that_started_it(folder: RunFolder, first_life: StackRecord) -> None:
    assert set(first_life.processes) == PARTS
    eventually(lambda: not folder.is_locked(), within_seconds=30)
    assert not any(is_running(process) for process in first_life.processes.values())
    assert folder.description() is None


def test_it_describes_itself_to_its_owner_alone(folder: RunFolder, stack: StackDescription) -> None:
    path = folder.path / "stack.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    described = json.loads(path.read_text())
    assert set(described["pids"]) == PARTS
    assert set(described["tokens"]) == set(described["service_tokens"]) == {"tenant-demo", "tenant-other"}
    assert StackDescription.model_validate(described) == stack


async def test_its_services_use_a_database_user_that_owns_nothing(stack: StackDescription) -> None:
    connection = await asyncpg.connect(stack.database_dsn)
    owned = "SELECT count(*) FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE r.rolname = current_user"
    assert await connection.fetchval(owned) == 0
    assert await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("UPDATE audit_log SET user_id = 'somebody'")
    await connection.close()


def test_everything_listens_on_this_machine_alone(stack: StackDescription) -> None:
    addresses = {
        connection.laddr.ip
        for pid in stack.pids.values()
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


async def test_its_worker_has_scheduled_the_reconciler(client: Client, stack: StackDescription) -> None:
    standing = await standing_reconciler(client, stack.task_queue)
    assert standing is not None
    assert [interval.every for interval in standing.schedule.spec.intervals] == [timedelta(seconds=15)]


async def test_both_accounts_have_their_points_and_only_theirs(stack: StackDescription) -> None:
    async with httpx.AsyncClient(base_url=stack.credits_url, trust_env=False) as credits_service:
        for tenant, user in (("tenant-demo", "user-demo"), ("tenant-other", "user-other")):
            answer = await credits_service.get(
                "/api/v1/credits/balance",
                params={"tenant_id": tenant, "user_id": user},
                headers={"Authorization": f"Bearer {stack.service_tokens[tenant]}"},
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["balance"] == 100_000
        strange = await credits_service.get(
            "/api/v1/credits/balance",
            params={"tenant_id": "tenant-demo", "user_id": "user-demo"},
            headers={"Authorization": f"Bearer {stack.service_tokens['tenant-other']}"},
        )
    assert strange.status_code != 200


async def test_the_printed_link_lives_for_minutes(
    folder: RunFolder, stack: StackDescription, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(folder) == 0
    printed = capsys.readouterr().out
    assert not any(token in printed for token in (*stack.tokens.values(), *stack.service_tokens.values()))
    token = printed.partition("#token=")[2].split()[0]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert 0 < claims["exp"] - time.time() <= 15 * 60
    assert "credits.rollback" not in claims["scopes"]
    async with httpx.AsyncClient(base_url=stack.gateway_url, trust_env=False) as gateway:
        listed = await gateway.get("/api/v1/tasks", headers={"Authorization": f"Bearer {token}"})
    assert listed.status_code == 200, listed.text


async def test_doctor_asks_its_services_with_service_tokens(stack: StackDescription) -> None:
    async with services(Settings(_env_file=None), stack) as opened:
        findings = [*await check_credits(opened), *await check_comfyui(opened)]
    assert len(findings) > 3
    assert [finding for finding in findings if finding.verdict is Verdict.WRONG] == []


async def test_its_temporal_keeps_runs_for_30_days_and_knows_our_attributes(
    stack: StackDescription, client: Client
) -> None:
    seen = await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=stack.namespace))
    assert seen.config.workflow_execution_retention_ttl.ToTimedelta() == timedelta(days=30)
    known = await client.operator_service.list_search_attributes(ListSearchAttributesRequest(namespace=stack.namespace))
    assert set(SEARCH_ATTRIBUTES) <= set(known.custom_attributes)


def test_a_second_up_uses_the_stack_that_is_up(
    folder: RunFolder, stack: StackDescription, capsys: pytest.CaptureFixture[str]
) -> None:
    assert up(folder, None) == 0
    assert "used as it is" in capsys.readouterr().out
    after = folder.description()
    assert after is not None
    assert after.pids == stack.pids
    assert start_stack(folder, SPEED, print, has_lifeline=True) is None
    assert status(folder) == 0
    assert stack.ui_url in capsys.readouterr().out


@pytest.mark.slow
async def test_a_stopped_worker_costs_no_task(folder: RunFolder, stack: StackDescription, client: Client) -> None:
    task_id = unique("drained")
    handle = await client.start_workflow(
        "ImageGenerationWorkflow",
        {
            "task_id": task_id,
            "tenant_id": "tenant-demo",
            "user_id": "user-demo",
            "template_id": "text-to-image",
            "prompt": "a lighthouse",
        },
        id=workflow_id_of(task_id),
        task_queue=stack.task_queue,
        task_timeout=timedelta(seconds=3),
    )
    os.kill(stack.pids["worker"], signal.SIGTERM)
    await comes_true(lambda: restarts_of(folder, "worker") == 1, within_seconds=20)
    result = await handle.result()
    assert result["status"] == "completed"
    assert result["attempts"] == 1
    assert result["credits"]["charged"] == result["credits"]["held"] > 0


@pytest.mark.slow
async def test_a_part_that_is_killed_comes_back_at_its_place(folder: RunFolder, stack: StackDescription) -> None:
    os.kill(stack.pids["gateway"], signal.SIGKILL)
    await comes_true(lambda: pid_of(folder, "gateway") not in (None, stack.pids["gateway"]))
    assert restarts_of(folder, "gateway") == 1
    after = folder.description()
    assert after is not None
    assert after.gateway_url == stack.gateway_url
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=8)) as web:
        assert (await web.get(f"{stack.gateway_url}/healthz", timeout=10)).status_code == 200
    assert "gateway was ended by SIGKILL" in folder.log("stack").read_text()


def test_down_ends_all_of_it(folder: RunFolder, stack: StackDescription, capsys: pytest.CaptureFixture[str]) -> None:
    record = folder.record()
    assert record is not None
    assert down(folder) == 0
    assert "has ended" in capsys.readouterr().out
    assert not any(is_running(process) for process in record.processes.values())
    assert running_stack(folder) is None
    assert status(folder) == EXIT_NOT_UP
    assert down(folder) == 0
    assert "No stack was up" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_supervisor_leaves_nothing_running_and_no_stack_that_seems_up(
    folder: RunFolder, stack: StackDescription
) -> None:
    lines: list[str] = []
    background = start_stack(folder, SPEED, lines.append, has_lifeline=False)
    assert background is not None
    before = folder.description()
    record = folder.record()
    assert before is not None
    assert record is not None
    holder = int((folder.path / "lock").read_text())
    os.kill(holder, signal.SIGKILL)
    eventually(lambda: not folder.is_locked())
    eventually(lambda: not any(is_running(process) for process in record.processes.values()))
    assert folder.description() is not None
    assert running_stack(folder) is None
    assert down(folder) == 0
    assert folder.description() is None


def test_a_part_that_cannot_start_is_named_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_TEMPORAL_DEADLINE_FACTOR", "-1")
    folder = new_run_folder(tmp_path / "run")
    lines: list[str] = []
    with pytest.raises(StackFailure, match="did not start"):
        start_stack(folder, SPEED, lines.append, has_lifeline=False)
    said = "\n".join(lines)
    assert "while it started" in said
    assert "deadline_factor" in said
    assert not folder.is_locked()
    assert folder.description() is None
