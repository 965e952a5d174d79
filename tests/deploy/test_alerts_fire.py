"""Alerts on the real stack: our processes, their real metrics pages, a real Prometheus, and a fault for each alert."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
import yaml
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.reconcile import reconcile_id_of
from proof.simulators.serving import Simulators, running_simulators
from proof.simulators.tokens import Tokens
from tests.bridge.native import NativeServer
from tests.cable import Cable, cable_to_postgres
from tests.conftest import NewDatabase, unique
from tests.deploy.prometheus import PROMETHEUS, Alerts, quickened, running_prometheus
from tests.deploy.test_observability import RULES
from tests.our_processes import CALLBACK_SECRET, CALLER_SECRET, SERVICE_SECRET, Stack, new_stack
from tests.waiting import until

NO_PROMETHEUS: Final = "prometheus is not installed (Debian's package prometheus): alerts are not shown on a real stack"
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
AMOUNT_INVALID: Final = {"detail": {"code": "0", "message": "amount_invalid"}}
CALLERS: Final = Tokens(CALLER_SECRET, "comfyui-temporal", "comfyui-platform")


def test_quickened_rules_differ_in_their_durations_alone() -> None:
    before, after = yaml.safe_load(RULES.read_text()), yaml.safe_load(quickened(RULES.read_text()))
    assert before != after
    for old, new in zip(before["groups"], after["groups"], strict=True):
        for was, now in zip(old["rules"], new["rules"], strict=True):
            assert {**was, "for": None, "expr": None} == {**now, "for": None, "expr": None}
            assert ("for" in was) == ("for" in now)
            assert _without_ranges(was["expr"]) == _without_ranges(now["expr"])
    assert "[4s]" in quickened("rate(a[2m])")
    assert "[15s]" in quickened("rate(a[15m])")


def _without_ranges(expression: str) -> list[str]:
    return [part.partition("]")[2] if number else part for number, part in enumerate(expression.split("["))]


@dataclass
class Watched:
    alerts: Alerts
    stack: Stack
    simulators: Simulators
    native: NativeServer
    cable: Cable
    """From the gateway to PostgreSQL."""
    http: httpx.AsyncClient
    queue: str


@pytest_asyncio.fixture(scope="module")
async def watched(
    temporal_env: WorkflowEnvironment, new_database: NewDatabase, tmp_path_factory: Any
) -> AsyncIterator[Watched]:
    """Worker, gateway, bridge and GPU worker; the worker's ComfyUI and credits service are simulated."""
    folder: Path = tmp_path_factory.mktemp("watched")
    dsn, queue = await new_database(), unique("queue")
    async with AsyncExitStack() as opened:
        simulators = await opened.enter_async_context(
            running_simulators(folder / "simulators", token_secret=SERVICE_SECRET, callback_secrets=[CALLBACK_SECRET])
        )
        native = await opened.enter_async_context(NativeServer(folder / "native"))
        cable = await opened.enter_async_context(cable_to_postgres(dsn))
        stack = new_stack(
            folder / "stack",
            temporal=temporal_env.client.service_client.config.target_host,
            dsn=dsn,
            queue=queue,
            COMFYUI_URL=simulators.comfyui_url,
            CREDITS_URL=simulators.credits_url,
            RECONCILE_EVERY_SECONDS="2",
            RECONCILE_PAUSE_SECONDS="1",
        )
        gateway = Stack(stack.folder, {**stack.settings, "DATABASE_DSN": cable.dsn}, stack.ports)
        await opened.enter_async_context(stack.running(native.url, "worker", "bridge", "gpu-worker"))
        await opened.enter_async_context(gateway.running(None, "gateway"))
        http = await opened.enter_async_context(httpx.AsyncClient(base_url=stack.url("gateway"), trust_env=False))
        http.headers["authorization"] = f"Bearer {CALLERS.made_for('tenant-demo', 'user-demo')}"
        pages = {
            "comfyui-worker": stack.ports["worker-metrics"],
            "comfyui-gateway": stack.ports["gateway"],
            "comfyui-bridge": stack.ports["bridge-metrics"],
            "comfyui-gpu-worker": stack.ports["gpu-metrics"],
        }
        (folder / "prometheus").mkdir()
        alerts = await opened.enter_async_context(running_prometheus(folder / "prometheus", RULES, pages))

        async def is_silent() -> bool:
            return not await alerts.firing()

        await until(is_silent, "no alert fires while all is well", within_seconds=60)
        yield Watched(alerts, stack, simulators, native, cable, http, queue)


@needs_prometheus
@pytest.mark.slow
async def test_a_dead_comfyui_server(watched: Watched) -> None:
    await watched.native.kill()
    alert = await watched.alerts.until_firing("ServerDead")
    assert alert["labels"]["pool"] == "default"
    await watched.native.start()
    await watched.alerts.until_silent("ServerDead")


@needs_prometheus
@pytest.mark.slow
async def test_a_reconciler_that_no_longer_looks(watched: Watched, temporal_env: WorkflowEnvironment) -> None:
    schedule = temporal_env.client.get_schedule_handle(reconcile_id_of(watched.queue))
    await schedule.pause(note="a test")
    alert = await watched.alerts.until_firing("ReconcilerLate")
    assert alert["labels"]["task_queue"] == watched.queue
    await schedule.unpause()
    await watched.alerts.until_silent("ReconcilerLate")


@needs_prometheus
@pytest.mark.slow
async def test_a_hold_that_cannot_be_cancelled(watched: Watched) -> None:
    """It is left to expiry, and whether the task was charged is unknown meanwhile."""
    task_id = unique("left")
    comfyui, credits = watched.simulators.admin.comfyui, watched.simulators.admin.credits
    await comfyui.fault("job_stall", task_id=task_id)
    await credits.fault("answer", route="cancel_hold", task_id=task_id, status=422, body=AMOUNT_INVALID, times=None)
    image = {"task_id": task_id, "template_id": "text-to-image", "prompt": "a lighthouse"}
    started = await watched.http.post("/api/v1/tasks/images", json=image, headers={"prefer": "wait=10"}, timeout=20)
    assert started.status_code in (200, 202), started.text

    async def is_held() -> bool:
        return any(hold.phase == "open" for hold in await credits.holds(task_id))

    await until(is_held, within_seconds=30)
    cancelled = await watched.http.post(f"/api/v1/tasks/{task_id}/cancel", json={"reason": "no longer"}, timeout=20)
    assert cancelled.status_code < 300, cancelled.text
    left = await watched.alerts.until_firing("HoldLeftToExpiry", within_seconds=60)
    assert left["labels"]["severity"] == "warning"
    await watched.alerts.until_firing("MoneyUnknown", within_seconds=60)


@needs_prometheus
@pytest.mark.slow
async def test_a_store_that_no_gateway_can_read(watched: Watched) -> None:
    watched.cable.pull()
    await watched.alerts.until_firing("StoreAway", within_seconds=60)
    watched.cable.plug_in()
    await watched.alerts.until_silent("StoreAway", within_seconds=60)
