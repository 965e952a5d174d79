"""One gateway, on the real servers of the session, for all tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.upload_files import UploadFiles
from gateway.uploads import UploadSettings
from store import TaskStore
from tests.cable import Cable
from tests.conftest import unique
from tests.gateway.serving import Gateway, KeepsSignals, bearer, served, start_run, token_for
from tests.waiting import until
from tests.workflows.platform import Platform, running_platform

ALL_TESTS_SECONDS = 3_600
DEMO_TOKEN = token_for("tenant-demo", "user-demo", valid_seconds=ALL_TESTS_SECONDS)
OTHER_TOKEN = token_for("tenant-other", "user-other", valid_seconds=ALL_TESTS_SECONDS)


def uploads_below(folder: Path) -> UploadSettings:
    return UploadSettings(UploadFiles.at((folder / "uploads").as_uri()))


@dataclass
class Api:
    """A gateway in front of a whole platform."""

    platform: Platform
    gateway: Gateway

    @property
    def uploads(self) -> UploadSettings:
        """Where its uploads are kept."""
        return uploads_below(self.platform.folder)

    @property
    def http(self) -> httpx.AsyncClient:
        return self.gateway.http

    async def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, **headers: str
    ) -> httpx.Response:
        """A request to `/api/v1/tasks…` in the name of `tenant-demo`, unless another token is given."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = bearer(DEMO_TOKEN if token is None else token) | named
        return await self.http.request(method, f"/api/v1/tasks{path}", json=body, headers=sent)

    async def ended(self, task_id: str) -> dict[str, Any]:
        """The task once it has ended."""

        async def read() -> dict[str, Any] | None:
            task = (await self.call("GET", f"/{task_id}")).json()
            return task if task.get("ended_at") else None

        task: dict[str, Any] = await until(read, within_seconds=40)
        return task


NewRun = Callable[[str], Awaitable[WorkflowHandle[Any, Any]]]


@pytest_asyncio.fixture(scope="session")
async def new_run(temporal_env: WorkflowEnvironment) -> AsyncIterator[NewRun]:
    """Starts the run of a task id: one that keeps what it is signalled."""
    queue = unique("callbacks")
    worker = Worker(
        temporal_env.client, task_queue=queue, workflows=[KeepsSignals], workflow_runner=UnsandboxedWorkflowRunner()
    )
    async with worker:
        yield lambda task_id: start_run(temporal_env.client, queue, task_id)


@pytest_asyncio.fixture(scope="session")
async def gateway(temporal_env: WorkflowEnvironment, task_store: TaskStore) -> AsyncIterator[Gateway]:
    async with served(temporal_env.client, task_store) as gateway:
        yield gateway


@pytest_asyncio.fixture
async def on_a_cable(temporal_env: WorkflowEnvironment, task_store: TaskStore) -> AsyncIterator[tuple[Gateway, Cable]]:
    """A gateway whose way to Temporal can be cut."""
    host, port = temporal_env.client.service_client.config.target_host.split(":")
    async with Cable(lambda: asyncio.open_connection(host, int(port))).laid() as cable:
        client = await Client.connect(f"127.0.0.1:{cable.port}", data_converter=pydantic_data_converter, lazy=True)
        async with served(client, task_store) as gateway:
            yield gateway, cable
            cable.plug_in()


@pytest_asyncio.fixture(scope="session")
async def api(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Api]:
    """A gateway with everything behind it; an image takes a quarter of a second."""
    folder = tmp_path_factory.mktemp("gateway-platform")
    async with running_platform(temporal_env, task_store, folder, speed=2_000) as platform, platform.worker():
        platform.policy = {"deadline_factor": 1_000.0}
        objects = (platform.folder / "objects").as_uri()
        async with served(
            platform.client,
            task_store,
            task_queue=platform.task_queue,
            objects=objects,
            uploads=uploads_below(platform.folder),
        ) as gateway:
            yield Api(platform, gateway)
