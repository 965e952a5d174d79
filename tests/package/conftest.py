"""The client on the real workflows: simulators, gateway, PostgreSQL, Temporal, a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal import HttpTasks, Tasks, TemporalTasks
from store import TaskStore
from tests.workflows.platform import CALLERS, Platform, running_platform

CALLER = ("tenant-demo", "user-demo")
STRANGER = ("tenant-other", "user-other")


@pytest_asyncio.fixture(scope="session")
async def whole(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    """An image takes about a second, a training some three."""
    folder = tmp_path_factory.mktemp("package")
    async with running_platform(temporal_env, task_store, folder, speed=800) as platform, platform.worker():
        yield platform


@pytest.fixture(scope="session")
def token(whole: Platform) -> str:
    return CALLERS.made_for(*CALLER)


@pytest.fixture(params=["temporal", "http"])
def tasks(request: pytest.FixtureRequest, whole: Platform, token: str) -> Tasks:
    """The same calls by either way."""
    if request.param == "http":
        return HttpTasks(whole.gateway_url, token)
    return TemporalTasks(whole.client, task_queue=whole.task_queue)
