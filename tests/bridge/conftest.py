"""A bridge, and two stand-in servers that all tests share. Each test starts with servers without traps."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.plugin import TasksPlugin
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, running_bridge


@pytest_asyncio.fixture(scope="session")
async def temporal_client(temporal_env: WorkflowEnvironment) -> Client:
    """A client with the bridge's own configuration."""
    return await Client.connect(temporal_env.client.service_client.config.target_host, plugins=[TasksPlugin()])


@pytest_asyncio.fixture
async def bridge(temporal_client: Client, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BridgePlatform]:
    async with running_bridge(temporal_client, tmp_path_factory.mktemp("bridge")) as platform:
        yield platform


@pytest_asyncio.fixture(scope="session")
async def _servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[NativeServer, NativeServer]]:
    folder = tmp_path_factory.mktemp("servers")
    async with NativeServer(folder / "a") as first, NativeServer(folder / "b") as second:
        yield first, second


@pytest_asyncio.fixture
async def servers(_servers: tuple[NativeServer, NativeServer]) -> tuple[NativeServer, NativeServer]:
    for server in _servers:
        await server.admin.reset()
    return _servers


@pytest_asyncio.fixture
async def native(servers: tuple[NativeServer, NativeServer]) -> NativeServer:
    return servers[0]
