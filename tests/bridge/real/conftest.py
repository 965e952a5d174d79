"""Tests against a real ComfyUI: `make test-comfyui COMFYUI=http://127.0.0.1:8188`; skipped without the setting.

The tests run prompts on the server, and save pictures and LoRAs below `conformance/`. Use a server without other users.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.bridge.native import NativeServer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("COMFYUI"):
        return
    deselected = [item for item in items if item.path.is_relative_to(HERE)]
    if deselected:
        items[:] = [item for item in items if item not in deselected]
        config.hook.pytest_deselected(items=deselected)


@pytest.fixture(scope="session")
def comfyui_url() -> str:
    return os.environ["COMFYUI"].rstrip("/")


@pytest_asyncio.fixture
async def real(comfyui_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=comfyui_url, timeout=30) as http:
        yield http


@pytest_asyncio.fixture(scope="session")
async def stand_in_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NativeServer]:
    async with NativeServer(tmp_path_factory.mktemp("native")) as server:
        yield server


@pytest_asyncio.fixture
async def stand_in(stand_in_server: NativeServer, real: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """The stand-in, with the real server's checkpoints."""
    await stand_in_server.admin.reset()
    await stand_in_server.admin.set(node_seconds=0.2)
    await stand_in_server.admin.set(models={"checkpoints": (await real.get("/models/checkpoints")).json()})
    async with httpx.AsyncClient(base_url=stand_in_server.url, timeout=30) as http:
        yield http
