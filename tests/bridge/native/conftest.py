"""One stand-in server for all tests here. Each test starts without traps and prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.bridge.native import NativeServer


@pytest_asyncio.fixture(scope="session")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NativeServer]:
    async with NativeServer(tmp_path_factory.mktemp("native")) as server:
        yield server


@pytest_asyncio.fixture
async def native(running: NativeServer) -> NativeServer:
    await running.admin.reset()
    return running


@pytest_asyncio.fixture
async def http(running: NativeServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.url, timeout=3) as http:
        yield http
