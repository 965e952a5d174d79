"""Tests against a real ComfyUI: `make test-comfyui COMFYUI=http://127.0.0.1:8188`; left out without the setting.

The server is changed: prompts run, pictures and LoRAs are saved below `conformance/`. Use one that nobody else uses.
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
    left_out = [item for item in items if item.path.is_relative_to(HERE)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


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
    """With the checkpoints that the real server has."""
    await stand_in_server.admin.reset()
    await stand_in_server.admin.set(node_seconds=0.2)
    await stand_in_server.admin.set(models={"checkpoints": (await real.get("/models/checkpoints")).json()})
    async with httpx.AsyncClient(base_url=stand_in_server.url, timeout=30) as http:
        yield http
