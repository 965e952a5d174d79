"""What bridge and GPU worker show of their pools and servers: figures that a pool can be scaled by."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from bridge import pool_gauges, server_gauges
from bridge.forecast import Forecast
from bridge.native import NativeServer as NativeClient
from bridge.pool_gauges import BACKLOG, BUSY, DEMAND, FIT, FREE, SERVERS, SICK
from bridge.server_gauges import ServerGauges
from bridge.server_health import ServerHealth
from bridge.slot import Slot
from local_stack.ports import any_free_port
from tests.bridge.native import NativeServer
from tests.bridge.platform import CALLBACK_SECRET, SECRET, BridgePlatform
from tests.bridge.test_servers import until_running
from tests.metrics_page import MetricsPage, names_in, value_in


@pytest.fixture
def page() -> Iterator[MetricsPage]:
    yield MetricsPage()


@pytest.mark.slow
async def test_a_pool_s_demand_is_what_waits_and_what_runs(
    bridge: BridgePlatform, native: NativeServer, page: MetricsPage
) -> None:
    await native.admin.set(hold=True)
    gauges = bridge.bridge.pool_gauges(page.runtime.metric_meter)
    async with gauges.shown():
        jobs = [await bridge.submit(priority=priority) for priority in ("standard", "standard", "accelerated")]

        async def shows(servers: int, busy: int, waiting: int) -> bool:
            await gauges.read()
            text = page.text
            by_priority = [value_in(text, BACKLOG, pool="default", priority=p) for p in ("accelerated", "standard")]
            return [value_in(text, name, pool="default") for name in (SERVERS, BUSY, DEMAND)] == [
                *(servers, busy),
                busy + waiting,
            ] and sum(number or 0 for number in by_priority) == waiting

        await bridge.until(lambda: shows(0, 0, 3), seconds=60)
        async with bridge.gpu(native):
            await until_running(bridge, native)
            await bridge.until(lambda: shows(1, 1, 2), seconds=60)
            await native.admin.set(hold=False)
            for job in jobs:
                await bridge.ended(job["job_id"])
            await bridge.until(lambda: shows(1, 0, 0), seconds=60)
    assert names_in(page.text) >= set(pool_gauges.GAUGES)


async def test_sick_free_and_fit_servers_are_counted(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer], page: MetricsPage
) -> None:
    first, second = servers
    await first.admin.set(models={"checkpoints": ["a.safetensors"]})
    gauges = bridge.bridge.pool_gauges(page.runtime.metric_meter)

    async def shows(sick: int, free: int, fit: int) -> bool:
        await gauges.read()
        by_pool = [value_in(page.text, name, pool="default") for name in (SICK, FREE)]
        return [*by_pool, value_in(page.text, FIT, pool="default", template="text-to-image")] == [sick, free, fit]

    async with bridge.gpu(first) as ill, bridge.gpu(second):
        await bridge.until(lambda: shows(0, 2, 1), seconds=30)
        await first.admin.set(fail_nodes={"ImageBlur": "CUDA error: broken"})
        ill.health.fell_sick("for the test")
        await bridge.until(lambda: shows(1, 1, 0), seconds=30)
        await first.admin.set(fail_nodes={})
        await bridge.until(lambda: shows(0, 2, 1), seconds=30)


async def test_figures_stay_while_temporal_does_not_answer(
    bridge: BridgePlatform, page: MetricsPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros would take servers away in an outage."""
    gauges = bridge.bridge.pool_gauges(page.runtime.metric_meter)
    await bridge.submit()

    async def waits() -> bool:
        await gauges.read()
        return page.value(DEMAND, pool="default") == 1

    await bridge.until(waits, seconds=60)
    monkeypatch.setattr(Forecast, "_describe", _unreachable)
    with pytest.raises(TimeoutError):
        await gauges.read()
    assert page.value(DEMAND, pool="default") == 1


async def _unreachable(*_: object, **__: object) -> None:
    raise TimeoutError


async def test_a_server_is_usable_while_it_answers_and_runs_what_it_is_given(
    native: NativeServer, page: MetricsPage
) -> None:
    async with NativeClient(native.url, read_seconds=1.0) as server:
        gauges, slot = (
            ServerGauges(page.runtime.metric_meter, server, name="gpu-1", pool="default"),
            Slot(server, ServerHealth(server)),
        )

        async def usable() -> float:
            await gauges.look(slot)
            return page.value(server_gauges.USABLE, server="gpu-1", pool="default")

        assert value_in(page.text, server_gauges.USABLE) == 0, "it has not answered yet"
        assert await usable() == 1
        slot.begin("job-1")
        assert (await usable(), page.value(server_gauges.BUSY)) == (1, 1)
        slot.end()
        slot.health.fell_sick("it runs nothing")
        assert (await usable(), page.value(server_gauges.BUSY)) == (0, 0)
    async with NativeClient(f"http://127.0.0.1:{any_free_port()}", read_seconds=1.0) as nobody:
        gauges = ServerGauges(page.runtime.metric_meter, nobody, name="gpu-2", pool="default")
        await gauges.look(Slot(nobody, ServerHealth(nobody)))
        assert value_in(page.text, server_gauges.USABLE, server="gpu-2") == 0
    assert names_in(page.text) == set(server_gauges.GAUGES)


@asynccontextmanager
async def process_of(bridge: BridgePlatform, *command: str, **settings: str) -> AsyncIterator[None]:
    """`python -m …` as a process of its own, killed at the end."""
    given: dict[str, str] = {
        "TEMPORAL_ADDRESS": bridge.client.service_client.config.target_host,
        "BRIDGE_TASK_QUEUE": bridge.settings.bridge_task_queue,
        "BRIDGE_STORE_URL": bridge.settings.bridge_store_url,
        "SERVICE_SECRET": SECRET,
        "CALLBACK_SECRETS": CALLBACK_SECRET,
        **settings,
    }
    environment = {**os.environ, **{f"COMFYUI_TEMPORAL_{name}": value for name, value in given.items()}}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", *command, env=environment)
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
async def test_both_processes_serve_their_page_with_temporals_metrics_beside_ours(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    ports = {"bridge": any_free_port(), "gpu": any_free_port()}

    async def page_of(process: str) -> str:
        try:
            return (await bridge.http.get(f"http://127.0.0.1:{ports[process]}/metrics")).text
        except httpx.TransportError:
            return ""

    async def both_show() -> bool:
        of_bridge, of_gpu = await page_of("bridge"), await page_of("gpu")
        return (
            value_in(of_bridge, SERVERS, pool="default") == 1
            and value_in(of_gpu, server_gauges.USABLE, server="gpu-1", pool="default") == 1
            and {"temporal_num_pollers", *pool_gauges.GAUGES} <= names_in(of_bridge)
            and {"temporal_num_pollers", *server_gauges.GAUGES} <= names_in(of_gpu)
        )

    async def is_warm() -> bool:
        return bool(await native.admin.submissions()) and value_in(await page_of("gpu"), server_gauges.COLD) == 0

    async with (
        process_of(bridge, "bridge", BRIDGE_PORT="0", BRIDGE_METRICS_PORT=str(ports["bridge"])),
        process_of(
            *(bridge, "bridge.gpu_worker", "--server", native.url, "--name", "gpu-1"),
            GPU_METRICS_PORT=str(ports["gpu"]),
            BRIDGE_WARM_UP="test-pattern",
        ),
    ):
        await bridge.until(both_show, seconds=60)
        await bridge.until(is_warm, seconds=60)
