"""A store belongs to one Temporal namespace. A process of another namespace is refused at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW
from comfyui_temporal.plugin import TasksPlugin
from local_stack.temporal_server import NAMESPACE
from runtime.required_settings import CannotStart
from store import StoreHome, TaskStore
from store import namespace_check as namespace_of_store
from store.namespace_check import bound_store, check_home
from tests.cable import cable_to_postgres
from tests.conftest import NewDatabase, unique
from tests.store.facts import claim_of, new_task_id

PROJECT = Path(__file__).parents[1]
ENDS_WITHIN_SECONDS = 5.0
SECRET = "a-secret-of-32-bytes-at-the-very-least"
ENTRY_POINTS = {"worker": ["worker.py"], "gateway": ["-m", "gateway"]}


@pytest_asyncio.fixture
async def dsn(new_database: NewDatabase) -> str:
    return await new_database()


@pytest_asyncio.fixture
async def store(dsn: str) -> AsyncIterator[TaskStore]:
    store = TaskStore(dsn)
    yield store
    await store.close()


@pytest_asyncio.fixture(scope="module")
async def client(temporal_env: WorkflowEnvironment) -> Client:
    return await Client.connect(temporal_env.client.service_client.config.target_host, plugins=[TasksPlugin()])


@pytest_asyncio.fixture(scope="module")
async def stranger(client: Client) -> Client:
    """A client of another namespace on the same server."""
    name = unique("stranger")
    await client.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=name, workflow_execution_retention_period=Duration(seconds=86_400))
    )
    stranger = await Client.connect(client.service_client.config.target_host, namespace=name, plugins=[TasksPlugin()])
    async with asyncio.timeout(20):
        while True:  # a new namespace reaches the parts of the server one by one
            with contextlib.suppress(RPCError):
                await stranger.count_workflows()
                return stranger
            await asyncio.sleep(0.1)


async def run(*arguments: str, client: Client, dsn: str) -> tuple[int, str, float]:
    """Exit code, output, and the seconds from the first line of our own code."""
    settings = {
        "DATABASE_DSN": dsn,
        "TEMPORAL_ADDRESS": client.service_client.config.target_host,
        "TEMPORAL_NAMESPACE": client.namespace,
        "CALLER_SECRET": SECRET[::-1],
        "SERVICE_SECRET": SECRET,
        "CALLBACK_SECRETS": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "GATEWAY_PORT": "0",
    }
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        env={**os.environ, **{f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}},
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, (out + err).decode(), time.monotonic() - began


async def test_the_first_process_binds_the_store_and_another_namespace_is_refused(
    store: TaskStore, client: Client, stranger: Client
) -> None:
    await check_home(client, store)
    home = await store.home()
    assert home is not None and home.namespace == NAMESPACE and home.namespace_id
    await check_home(client, store)
    with pytest.raises(CannotStart) as refused:
        await check_home(stranger, store)
    assert f"python -m store bind --namespace {stranger.namespace}" in str(refused.value)
    assert store.address in str(refused.value) and repr(NAMESPACE) in str(refused.value)
    assert await store.home() == home


async def test_a_namespace_of_the_same_name_on_another_server_is_refused(store: TaskStore, client: Client) -> None:
    await store.rebind(StoreHome(namespace=client.namespace, namespace_id="another server's"))
    with pytest.raises(CannotStart, match="another server's"):
        await check_home(client, store)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
async def test_a_process_of_another_namespace_ends_with_one_sentence(
    store: TaskStore, dsn: str, client: Client, entry_point: str
) -> None:
    await store.rebind(StoreHome(namespace="elsewhere", namespace_id="1"))
    code, said, seconds = await run(*ENTRY_POINTS[entry_point], client=client, dsn=dsn)
    sentences = [line for line in said.splitlines() if "elsewhere" in line]
    assert (code, len(sentences)) == (2, 1), said
    assert "postgres:" not in said and SECRET not in said
    _, _, nothing_but_start = await run("-c", "import worker, gateway.__main__", client=client, dsn=dsn)
    assert seconds - nothing_but_start < ENDS_WITHIN_SECONDS


async def test_the_command_binds_a_bound_store_to_another_namespace(store: TaskStore, dsn: str, client: Client) -> None:
    await store.rebind(StoreHome(namespace="elsewhere", namespace_id="1"))
    code, said, _ = await run("-m", "store", "bind", "--namespace", client.namespace, client=client, dsn=dsn)
    assert code == 0 and "elsewhere" in said and client.namespace in said
    await check_home(client, store)
    home = await store.home()
    assert home is not None and home.namespace_id not in (None, "1"), "the id is that of the namespace"


async def test_open_tasks_that_the_namespace_does_not_know_keep_a_store_from_being_bound(
    store: TaskStore, client: Client, stranger: Client
) -> None:
    """A store of an older release, not bound yet: a process with wrong settings must not bind it."""
    task_id = new_task_id()
    run = await client.start_workflow(IMAGE_WORKFLOW, id=f"task-{task_id}", task_queue=unique("queue"))
    await store.claim(claim_of(new_task_id()))
    await store.claim(claim_of(task_id, run_id=run.first_execution_run_id or ""))
    with pytest.raises(CannotStart, match="knows none of them"):
        await check_home(stranger, store)
    assert await store.home() is None
    await check_home(client, store)
    assert await store.home() is not None
    await run.terminate()


async def test_a_store_that_is_away_at_the_start_is_looked_at_once_it_is_back(
    store: TaskStore, client: Client, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process works meanwhile, and ends if the store turns out to belong to another namespace."""
    monkeypatch.setattr(namespace_of_store, "FIRST_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(namespace_of_store, "AGAIN_SECONDS", 0.1)
    await store.rebind(StoreHome(namespace="elsewhere", namespace_id="1"))
    refused, known = asyncio.Event(), asyncio.Event()

    async def then() -> None:
        known.set()

    async with cable_to_postgres(dsn) as cable:
        cable.pull()
        with pytest.raises(CannotStart, match="elsewhere"):
            async with bound_store(client, cable.dsn, refused=refused.set, then=then):
                assert not refused.is_set()
                cable.plug_in()
                await asyncio.wait_for(refused.wait(), 10)
        assert not known.is_set()
        await store.rebind(StoreHome(namespace=client.namespace))
        cable.pull()
        async with bound_store(client, cable.dsn, refused=refused.set, then=then):
            cable.plug_in()
            await asyncio.wait_for(known.wait(), 10)
