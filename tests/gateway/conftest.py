"""One gateway, on the real servers of the session, for all tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest_asyncio
from temporalio.client import WorkflowHandle
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from store import TaskStore
from tests.conftest import unique
from tests.gateway.serving import Gateway, KeepsSignals, served, start_run

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
