"""Both simulators, once for all tests here; each test starts from their first state."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from proof.conformance.receiver import receiving
from proof.simulators.serving import TEST_CALLBACK_SECRET, Simulators, running_simulators
from tests.simulators.platform import Caller, Receiver

SPEED = 4_800.0
"""A standard image takes 0.1 s, a standard training 0.6 s."""


@pytest_asyncio.fixture(scope="session")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Simulators]:
    async with running_simulators(tmp_path_factory.mktemp("simulators"), speed=SPEED) as simulators:
        yield simulators


@pytest_asyncio.fixture
async def simulators(served: Simulators) -> Simulators:
    await served.admin.reset()
    await served.admin.set_speed(SPEED)
    return served


@pytest_asyncio.fixture(scope="session")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving(Receiver(TEST_CALLBACK_SECRET)) as receiver:
        yield receiver


@pytest_asyncio.fixture(scope="session")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=5) as http:
        yield http


@pytest_asyncio.fixture
async def caller(simulators: Simulators, receiver: Receiver, http: httpx.AsyncClient) -> Caller:
    return Caller(simulators, receiver, http)
