"""One process of streams, on the real servers of the session, for all tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from store import TaskStore
from tests.conftest import unique
from tests.streams.serving import Streams, Writer, streams_on


@pytest_asyncio.fixture(scope="session")
async def streams(task_store: TaskStore) -> AsyncIterator[Streams]:
    async with streams_on(task_store) as streams:
        yield streams


@pytest.fixture
def writer(task_store: TaskStore) -> Writer:
    """Writes tasks of its own tenant."""
    return Writer(task_store, unique("tenant"))
