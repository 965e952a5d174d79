"""What bridge and GPU worker say of themselves, for checks of containers."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import httpx
from temporalio.client import Client

from bridge.gpu_worker import serve
from bridge.manifest import DEFAULT_POOL
from local_stack.ports import any_free_port
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform
from tests.waiting import until


async def page(http: httpx.AsyncClient, url: str) -> tuple[int, str]:
    try:
        answer = await http.get(url)
    except httpx.TransportError:
        return 0, ""
    return answer.status_code, answer.text


async def test_a_bridge_is_ready_while_temporal_sees_it_poll(bridge: BridgePlatform) -> None:
    async def is_ready() -> bool:
        return (await page(bridge.http, f"{bridge.url}/readyz"))[0] == 200

    await until(is_ready)
    bridge.settings.bridge_task_queue = "of-nobody"
    status, text = await page(bridge.http, f"{bridge.url}/readyz")
    assert status == 503
    assert "does not see this bridge at task queue of-nobody" in text


async def test_a_gpu_worker_is_ready_once_its_server_answers_and_not_while_it_drains(
    bridge: BridgePlatform, temporal_client: Client, tmp_path: Path
) -> None:
    port, stop = any_free_port(), asyncio.Event()
    address = temporal_client.service_client.config.target_host
    settings = bridge.settings.model_copy(update={"gpu_health_port": port, "temporal_address": address})
    native = NativeServer(tmp_path / "server")
    options = argparse.Namespace(server=native.url, pool=DEFAULT_POOL, name=None, gpu_type=None)
    url = f"http://127.0.0.1:{port}/readyz"
    working = asyncio.create_task(serve(settings, options, stop))
    async with httpx.AsyncClient(trust_env=False) as http:

        async def is_missing_its_server() -> bool:
            status, text = await page(http, url)
            return status == 503 and "the server cannot be used" in text and native.url in text

        async def is_ready() -> bool:
            return await page(http, url) == (200, "ready\n")

        await until(is_missing_its_server)
        async with native:
            await until(is_ready, within_seconds=30)
        await until(is_missing_its_server)
        stop.set()
        await working
        assert (await page(http, url))[0] == 0
