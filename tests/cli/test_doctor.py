"""`doctor` on real services: what is fine, what is wrong, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.testing import WorkflowEnvironment

from cli.checks import Finding, Verdict
from cli.connection import Connection
from contracts.reconcile import reconcile_id_of
from reconciler_schedule import ensure_reconciler
from settings import Settings
from simulators.serving import TEST_TOKEN_SECRET, Simulators, running_simulators
from tests.cli.conftest import Ended, run_command
from tests.conftest import unique


@pytest_asyncio.fixture
async def simulators(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Simulators]:
    async with running_simulators(tmp_path_factory.mktemp("simulators")) as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def kept_namespace(temporal_env: WorkflowEnvironment) -> str:
    """A namespace that keeps runs for 30 days and has none of our search attributes."""
    name = unique("kept")
    retention = Duration()
    retention.FromTimedelta(timedelta(days=30))
    await temporal_env.client.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=name, workflow_execution_retention_period=retention)
    )
    return name


async def examined(
    opened: Connection, simulators: Simulators, *arguments: str, **environment: str
) -> tuple[Ended, dict[str, Finding]]:
    services = {
        "COMFYUI_TEMPORAL_COMFYUI_URL": simulators.comfyui_url,
        "COMFYUI_TEMPORAL_CREDITS_URL": simulators.credits_url,
        "COMFYUI_TEMPORAL_TOKEN_SECRET": TEST_TOKEN_SECRET,
    }
    ended = await run_command("doctor", "--json", *arguments, connection=opened, environment=services | environment)
    findings = [Finding.model_validate(one) for one in json.loads(ended.out)]
    return ended, {finding.what: finding for finding in findings}


def wrongs(findings: dict[str, Finding]) -> set[str]:
    return {what for what, finding in findings.items() if finding.verdict is Verdict.WRONG}


async def test_only_the_short_retention_of_this_server_is_wrong(opened: Connection, simulators: Simulators) -> None:
    ended, findings = await examined(opened, simulators)
    assert wrongs(findings) == {"namespace"}
    assert ended.exit_code == 1
    assert "--retention 30d" in findings["namespace"].advice
    assert "8 exist" in findings["search attributes"].says
    assert findings["reconciler"].verdict is Verdict.NOTE, "no worker of this queue has made its schedule"
    assert findings["ComfyUI: POST /comfyui/v1/jobs/{job_id}/cancel"].says == "as the contract says"
    admin = simulators.admin
    assert await admin.comfyui.jobs() == []
    assert await admin.credits.holds() == []


async def test_the_reconcilers_schedule_is_told_of(opened: Connection, simulators: Simulators) -> None:
    settings = Settings(_env_file=None, task_queue=opened.task_queue)
    await ensure_reconciler(opened.client, settings)
    schedule = opened.client.get_schedule_handle(reconcile_id_of(opened.task_queue))
    try:
        _, findings = await examined(opened, simulators)
        assert findings["reconciler"].says == "looks every 0:05:00 for tasks whose run is over"
        await schedule.pause()
        _, findings = await examined(opened, simulators)
        assert f"--unpause -s {schedule.id}" in findings["reconciler"].advice
    finally:
        await schedule.delete()


async def test_a_namespace_without_search_attributes_and_worker_is_told_how_to_get_them(
    opened: Connection, simulators: Simulators, kept_namespace: str
) -> None:
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE=kept_namespace)
    assert findings["namespace"].verdict is Verdict.OK
    assert wrongs(findings) == {"search attributes", "worker"}
    assert "--name TaskStage --type Keyword" in findings["search attributes"].advice
    assert "python worker.py" in findings["worker"].advice


async def test_an_unknown_namespace_is_named(opened: Connection, simulators: Simulators) -> None:
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE="nowhere")
    assert "nowhere" in findings["namespace"].says
    assert "temporal operator namespace create --namespace nowhere" in findings["namespace"].advice


async def test_parties_that_are_away_are_each_named(
    opened: Connection, simulators: Simulators, unused_tcp_port: int
) -> None:
    away = f"http://127.0.0.1:{unused_tcp_port}"
    ended, findings = await examined(
        opened, simulators, COMFYUI_TEMPORAL_COMFYUI_URL=away, COMFYUI_TEMPORAL_CREDITS_URL=away
    )
    assert ended.exit_code == 1
    assert {"credits: balance", "ComfyUI"} <= wrongs(findings)
    assert away in findings["ComfyUI"].says
    assert away in findings["credits: balance"].says


async def test_a_token_that_is_not_taken_is_told(opened: Connection, simulators: Simulators) -> None:
    _, findings = await examined(
        opened, simulators, COMFYUI_TEMPORAL_TOKEN_SECRET="another-secret-of-32-bytes-at-least"
    )
    assert {"credits: balance", "ComfyUI"} <= wrongs(findings)
    assert "token" in findings["credits: balance"].says


async def test_routes_that_are_not_offered_are_notes(opened: Connection, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("not_offered", times=None)
    _, findings = await examined(opened, simulators)
    noted = {
        what for what, finding in findings.items() if finding.verdict is Verdict.NOTE and "not offered" in finding.says
    }
    assert noted == {
        "ComfyUI: GET /comfyui/v1/gpus",
        "ComfyUI: POST /comfyui/v1/jobs/{job_id}/cancel",
        "ComfyUI: POST /comfyui/v1/training/{job_id}/start",
        "ComfyUI: POST /comfyui/v1/training/{job_id}/cancel",
    }


async def test_one_hold_is_taken_once_and_given_back(opened: Connection, simulators: Simulators) -> None:
    _, findings = await examined(opened, simulators, "--hold", "tenant-demo", "user-demo", "text-to-image")
    assert findings["hold"].verdict is Verdict.OK
    [hold] = await simulators.admin.credits.holds()
    assert hold.phase == "cancelled"
    assert (await simulators.admin.credits.account()).balance == 100_000


async def test_a_service_that_ignores_keys_is_found_out_and_both_holds_given_back(
    opened: Connection, simulators: Simulators
) -> None:
    await simulators.admin.credits.fault("ignore_keys", times=None)
    _, findings = await examined(opened, simulators, "--hold", "tenant-demo", "user-demo", "text-to-image")
    assert findings["hold"].verdict is Verdict.WRONG
    assert "two holds" in findings["hold"].says
    assert [hold.phase for hold in await simulators.admin.credits.holds()] == ["cancelled", "cancelled"]


async def test_a_hold_whose_first_answer_was_lost_is_found_and_given_back(
    opened: Connection, simulators: Simulators
) -> None:
    await simulators.admin.credits.fault("drop", route="pre_deduct", when="after")
    await examined(opened, simulators, "--hold", "tenant-demo", "user-demo", "text-to-image")
    assert [hold.phase for hold in await simulators.admin.credits.holds()] == ["cancelled"]


async def test_without_a_token_the_setting_is_named(opened: Connection) -> None:
    ended = await run_command("doctor", connection=opened)
    assert ended.exit_code == 1
    assert "COMFYUI_TEMPORAL_TOKEN_SECRET" in ended.out
