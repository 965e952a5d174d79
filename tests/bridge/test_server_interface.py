"""The bridge needs nothing from a server but `bridge.server.Server`: jobs run on one that is not ComfyUI."""

from __future__ import annotations

import httpx

from bridge.server import Server
from comfyui_temporal.contracts.errors import ErrorDetails
from tests.bridge.memory_server import MemoryServer
from tests.bridge.platform import BridgePlatform


async def test_a_job_is_delivered_by_a_server_of_another_kind(bridge: BridgePlatform) -> None:
    memory = MemoryServer(content=b"not from ComfyUI")
    server: Server = memory
    async with bridge.gpu_of(server), httpx.AsyncClient() as web:
        state = await bridge.ended((await bridge.submit())["job_id"])
        assert state["error_details"] is None, state
        pictures = [(await web.get(url)).content for url in state["result_urls"]]
    assert pictures == [b"not from ComfyUI"]
    assert len(memory.submitted) == 1
    assert memory.cancelled == []


async def test_a_servers_error_is_the_jobs_error(bridge: BridgePlatform) -> None:
    failure = ErrorDetails(code="gpu_out_of_memory", message="No memory left.", retryable=False)
    server: Server = MemoryServer(failure=failure)
    async with bridge.gpu_of(server):
        state = await bridge.ended((await bridge.submit())["job_id"])
    assert (state["error_details"]["code"], state["result_urls"]) == ("gpu_out_of_memory", [])
