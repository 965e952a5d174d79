"""`doctor` on real services: what is fine, what is wrong, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.reconcile import ReconcileResult, reconcile_id_of
from comfyui_temporal.contracts.tasks import workflow_id_of
from comfyui_temporal.encryption import encryption_of
from doctor.finding import Finding, Verdict
from proof.simulators.serving import TEST_TOKEN_SECRET, Simulators, running_simulators
from proof.simulators.tokens import Tokens
from runtime import temporal_connection
from runtime.reconciler_schedule import ensure_reconciler
from runtime.settings import Settings
from store import StoreHome, TaskStore, UnseenTask, migrate
from store.namespace_check import home_of
from tests.cli.conftest import USED, Ended, run_command
from tests.conftest import NewDatabase, unique
from tests.store.facts import claim_of, new_task_id


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
    USED.comfyui_url, USED.credits_url = simulators.comfyui_url, simulators.credits_url
    services = {
        "COMFYUI_TEMPORAL_COMFYUI_URL": simulators.comfyui_url,
        "COMFYUI_TEMPORAL_CREDITS_URL": simulators.credits_url,
        "COMFYUI_TEMPORAL_SERVICE_SECRET": TEST_TOKEN_SECRET,
    }
    ended = await run_command("doctor", "--json", *arguments, connection=opened, environment=services | environment)
    findings = [Finding.model_validate(one) for one in json.loads(ended.out)]
    return ended, {finding.what: finding for finding in findings}


def wrong_checks(findings: dict[str, Finding]) -> set[str]:
    return {what for what, finding in findings.items() if finding.verdict is Verdict.WRONG}


async def test_only_the_short_retention_of_this_server_is_wrong(opened: Connection, simulators: Simulators) -> None:
    ended, findings = await examined(opened, simulators)
    assert wrong_checks(findings) == {"namespace"}
    assert ended.exit_code == 1
    assert "--retention 30d" in findings["namespace"].advice
    assert "8 exist" in findings["search attributes"].says
    assert findings["reconciler"].verdict is Verdict.NOTE, "no worker of this queue has made its schedule"
    assert findings["ComfyUI: POST /comfyui/v1/jobs/{job_id}/cancel"].says == "as the contract says"
    admin = simulators.admin
    assert await admin.comfyui.jobs() == []
    assert await admin.credits.holds() == []


async def test_the_encryption_keys_are_named(opened: Connection, simulators: Simulators) -> None:
    """Command line and services read one setting."""
    keys = f"2031:{'B' * 43}=,2030:{'A' * 43}="
    for given, verdict, says in (
        (keys, Verdict.OK, "what Temporal holds is encrypted with the key 2031; 2030 can be read"),
        (f"plain,{keys}", Verdict.NOTE, "what Temporal holds is not encrypted; 2031, 2030 can be read"),
        ("", Verdict.NOTE, "what Temporal holds is not encrypted"),
    ):
        _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_ENCRYPTION_KEYS=given)
        assert (findings["encryption"].verdict, findings["encryption"].says) == (verdict, says)
        settings = Settings(_env_file=None, temporal_address=opened.server.address, encryption_keys=given)
        of_services = encryption_of(await temporal_connection.connect(settings))
        assert (of_services.key_ids[:1], of_services.encrypts) == (("2031",) if given else (), verdict is Verdict.OK)


async def test_the_reconcilers_schedule_is_reported(opened: Connection, simulators: Simulators) -> None:
    settings = Settings(_env_file=None, task_queue=opened.task_queue)
    await ensure_reconciler(opened.client, settings)
    schedule = opened.client.get_schedule_handle(reconcile_id_of(opened.task_queue))
    try:
        _, findings = await examined(opened, simulators)
        assert findings["reconciler"].says == "checks every 0:05:00 for tasks whose run has ended"
        await schedule.pause()
        _, findings = await examined(opened, simulators)
        assert f"--unpause -s {schedule.id}" in findings["reconciler"].advice
    finally:
        await schedule.delete()


async def test_missing_search_attributes_and_worker_are_reported_with_the_fix(
    opened: Connection, simulators: Simulators, kept_namespace: str
) -> None:
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE=kept_namespace)
    assert findings["namespace"].verdict is Verdict.OK
    assert wrong_checks(findings) == {"search attributes", "worker"}
    assert "--name TaskStage --type Keyword" in findings["search attributes"].advice
    assert "python worker.py" in findings["worker"].advice


async def test_an_unknown_namespace_is_named(opened: Connection, simulators: Simulators) -> None:
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE="nowhere")
    assert "nowhere" in findings["namespace"].says
    assert "temporal operator namespace create --namespace nowhere" in findings["namespace"].advice


async def test_unreachable_services_are_each_named(
    opened: Connection, simulators: Simulators, unused_tcp_port: int
) -> None:
    away = f"http://127.0.0.1:{unused_tcp_port}"
    ended, findings = await examined(
        opened, simulators, COMFYUI_TEMPORAL_COMFYUI_URL=away, COMFYUI_TEMPORAL_CREDITS_URL=away
    )
    assert ended.exit_code == 1
    assert {"credits: balance", "ComfyUI", "worker's services"} <= wrong_checks(findings)
    assert away in findings["ComfyUI"].says
    assert away in findings["credits: balance"].says


async def test_a_rejected_token_is_reported(opened: Connection, simulators: Simulators) -> None:
    _, findings = await examined(
        opened, simulators, COMFYUI_TEMPORAL_SERVICE_SECRET="another-secret-of-32-bytes-at-least"
    )
    assert {"credits: balance", "ComfyUI"} <= wrong_checks(findings)
    assert "token" in findings["credits: balance"].says


async def test_routes_that_are_not_offered_are_notes(opened: Connection, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("not_offered", times=None)
    _, findings = await examined(opened, simulators)
    notes = {
        what for what, finding in findings.items() if finding.verdict is Verdict.NOTE and "not offered" in finding.says
    }
    assert notes == {
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


async def test_a_service_that_ignores_keys_is_detected_and_both_holds_given_back(
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
    assert "COMFYUI_TEMPORAL_SERVICE_SECRET" in ended.out


async def test_a_store_whose_tables_this_version_refuses_is_wrong(
    opened: Connection, simulators: Simulators, new_database: NewDatabase
) -> None:
    dsn = await new_database(migrated=False)
    await migrate(dsn, revision="0010")
    store = TaskStore(dsn)
    await store.bind(await home_of(opened.client))
    await store.close()
    ended, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_DATABASE_DSN=dsn)
    assert ended.exit_code == 1
    assert "task store" in wrong_checks(findings)
    assert "revision 0010" in findings["task store"].says and "store migrate" in findings["task store"].says


async def test_the_task_store_and_what_could_not_be_looked_at_are_shown(
    opened: Connection, simulators: Simulators, new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    task_id = new_task_id()
    await store.claim(claim_of(task_id))
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_DATABASE_DSN=dsn)
    assert findings["task store"].verdict is Verdict.NOTE
    await store.bind(await home_of(opened.client))
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_DATABASE_DSN=dsn)
    assert (findings["task store"].verdict, findings["open tasks"].verdict) == (Verdict.OK, Verdict.NOTE)
    assert "no pass of the reconciler is known" in findings["open tasks"].says

    async def a_pass(_connection: Connection) -> bool:
        return True

    monkeypatch.setattr("doctor.task_store._has_looked", a_pass)
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_DATABASE_DSN=dsn)
    assert findings["task store"].verdict is findings["open tasks"].verdict is Verdict.OK
    await store.note_looks(unseen_tasks=[UnseenTask(task_id=task_id, reason="Its run is paused.")])
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_DATABASE_DSN=dsn)
    assert findings["open tasks"].verdict is Verdict.NOTE
    assert task_id in findings["open tasks"].advice and "Its run is paused." in findings["open tasks"].advice
    await store.rebind(StoreHome(namespace="elsewhere"))
    _, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_DATABASE_DSN=dsn)
    assert "task store" in wrong_checks(findings) and "elsewhere" in findings["task store"].says
    started = await run_command(
        *("generate", "a cat", "--tenant", "tenant-a", "--user", "ann", "--task-id", task_id, "--no-wait"),
        connection=opened,
        environment={"COMFYUI_TEMPORAL_DATABASE_DSN": dsn},
    )
    assert started.exit_code != 0 and "elsewhere" in started.out + started.err
    with pytest.raises(RPCError, match="not found"):
        await opened.client.get_workflow_handle(workflow_id_of(task_id)).describe()
    await store.close()


async def test_give_backs_that_could_not_be_started_are_reported(
    opened: Connection, simulators: Simulators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def last(*_: object) -> ReconcileResult:
        return ReconcileResult(given_back=1, task_ids=["a"], not_started=2)

    await ensure_reconciler(opened.client, Settings(_env_file=None, task_queue=opened.task_queue))
    schedule = opened.client.get_schedule_handle(reconcile_id_of(opened.task_queue))
    try:
        monkeypatch.setattr("doctor.temporal.last_pass", last)
        _, findings = await examined(opened, simulators)
        assert findings["reconciler"].verdict is Verdict.NOTE and "2 give-backs" in findings["reconciler"].says
    finally:
        await schedule.delete()


async def test_services_that_the_worker_does_not_call_are_not_ok(
    opened: Connection, simulators: Simulators, tmp_path: Path
) -> None:
    """What is set here is fine, and no task uses it: only the worker knows what it calls."""
    async with running_simulators(tmp_path) as others:
        _, findings = await examined(opened, simulators)
        assert findings["worker's services"].verdict is Verdict.OK
        assert simulators.credits_url in findings["worker's services"].says
        ended, findings = await examined(opened, simulators, COMFYUI_TEMPORAL_CREDITS_URL=others.credits_url)
    assert findings["credits: balance"].verdict is not Verdict.WRONG, "the service that is set here answers"
    finding = findings["worker's services"]
    assert ended.exit_code == 1 and finding.verdict is Verdict.WRONG
    assert simulators.credits_url in finding.says and others.credits_url in finding.says


async def test_without_settings_the_services_of_the_worker_are_examined(
    opened: Connection, simulators: Simulators
) -> None:
    USED.comfyui_url, USED.credits_url = simulators.comfyui_url, simulators.credits_url
    secret = {"COMFYUI_TEMPORAL_SERVICE_SECRET": TEST_TOKEN_SECRET}
    ended = await run_command("doctor", connection=opened, environment=secret)
    assert f"{simulators.comfyui_url} answers" in ended.out and f"{simulators.credits_url} answers" in ended.out


async def test_what_a_token_may_do_here_is_said_and_why_not(opened: Connection) -> None:
    secret = "the gateway's secret for callers, long enough"
    tokens = Tokens(secret, "comfyui-temporal", "comfyui-platform")
    here = {"COMFYUI_TEMPORAL_CALLER_SECRET": secret}

    async def said(token: str) -> tuple[int, str]:
        ended = await run_command("doctor", "--token", token, connection=opened, environment=here)
        return ended.exit_code, ended.out

    code, out = await said(tokens.made_for("tenant-a", "ann", scopes=["task.read"]))
    assert code == 0 and "as tenant-a / ann" in out
    assert re.search(r"^ok +token: read tasks, events and streams +allowed", out, re.MULTILINE)
    assert re.search(r"^note +token: start images +not allowed: it lacks the scope comfyui.image.generate", out, re.M)
    foreign = Tokens(secret, "comfyui-temporal", "comfyui-services").made_for("tenant-a", "ann")
    code, out = await said(foreign)
    assert code == 1 and "Audience doesn't match" in out and "CALLER_AUDIENCE" in out
    assert (await said("no token"))[0] == 1


async def test_without_the_gateways_settings_the_gateway_is_asked(opened: Connection, unused_tcp_port: int) -> None:
    token = Tokens("s" * 32, "i", "a").made_for("tenant-a", "ann")
    away = {"COMFYUI_TEMPORAL_GATEWAY_URL": f"http://127.0.0.1:{unused_tcp_port}"}
    ended = await run_command("doctor", "--token", token, connection=opened, environment=away)
    assert ended.exit_code == 1 and f"127.0.0.1:{unused_tcp_port} does not answer" in ended.out
    assert "neither the gateway's address" in (await run_command("doctor", "--token", token, connection=opened)).out
