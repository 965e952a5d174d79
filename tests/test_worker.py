"""The worker's process: what it refuses to start with, what it serves, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta

import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

import worker
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES, workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from local_stack.ports import any_free_port
from runtime.required_settings import CannotStart
from runtime.settings import Settings
from tests.conftest import unique
from tests.metrics_page import value_in

SECRET = "0123456789abcdef0123456789abcdef"
CALLS = {
    *("submit_job", "get_job", "cancel_job", "create_training", "start_training", "get_training", "cancel_training"),
    *(
        "list_gpus",
        "list_templates",
        "list_datasets",
        "estimate",
        "pre_deduct",
        "commit",
        "cancel_hold",
        "charge",
        "ledger",
    ),
    *("snapshot", "delete_snapshot", "claim", "write", "left_behind", "closed_among_open", "still_closed"),
    *("heard", "look", "told_points", "take_unsettled", "correct_settlement", "worker_settings", "unanswered_jobs"),
}
NO_DATABASE = "postgresql://unused:nothing@127.0.0.1:9/nowhere"


def settings_with(**given: object) -> Settings:
    values: dict[str, object] = {"service_secret": SECRET, "database_dsn": NO_DATABASE, **given}
    return Settings(_env_file=None, **values)  # type: ignore[arg-type]


async def test_it_offers_every_activity_that_workflows_call(temporal_env: WorkflowEnvironment) -> None:
    async with worker.opened_activities(settings_with(), temporal_env.client) as activities:
        assert {activity.__temporal_activity_definition.name for activity in activities} == CALLS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"service_secret": None}, "COMFYUI_TEMPORAL_SERVICE_SECRET"),
        ({"database_dsn": None}, "COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://"),
        ({"database_dsn": "nonsense"}, "postgresql://user:password@host:port/database"),
        ({"object_store_url": "ftp://files.example/"}, "COMFYUI_TEMPORAL_OBJECT_STORE_URL"),
        ({"service_token": "line\nbreak"}, "token"),
    ],
)
async def test_a_missing_or_wrong_setting_is_reported(given: dict[str, object], expected: str) -> None:
    with pytest.raises(CannotStart) as refused:
        async with worker.opened_activities(settings_with(**given)):
            pytest.fail("it opened")
    assert expected in str(refused.value)


def test_its_process_ends_with_2_and_a_sentence_that_shows_no_secret() -> None:
    environment = {**os.environ, "COMFYUI_TEMPORAL_SERVICE_SECRET": "too-short", "COMFYUI_TEMPORAL_COMFYUI_URL": "here"}
    done = subprocess.run(
        [sys.executable, worker.__file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == worker.EXIT_CANNOT_START
    assert "comfyui_url" in done.stderr
    assert "service_secret" in done.stderr
    assert "at least 32 bytes" in done.stderr
    assert "too-short" not in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_temporal_that_does_not_answer_is_named() -> None:
    address = f"127.0.0.1:{any_free_port()}"
    with pytest.raises(CannotStart, match=f"Temporal at {address} cannot be reached"):
        await worker.connect(settings_with(temporal_address=address))


async def test_a_namespace_without_our_search_attributes_is_refused(temporal_env: WorkflowEnvironment) -> None:
    namespace = unique("bare")
    await temporal_env.client.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=namespace, workflow_execution_retention_period=Duration(seconds=24 * 3600))
    )
    bare = await Client.connect(temporal_env.client.service_client.config.target_host, namespace=namespace)
    await worker.check_search_attributes(temporal_env.client)
    with pytest.raises(CannotStart) as refused:
        async with asyncio.timeout(20):
            # A new namespace is not known to every part of the server at once.
            while True:
                try:
                    await worker.check_search_attributes(bare)
                except CannotStart as error:
                    if "Check that the namespace exists" not in str(error):
                        raise
                    await asyncio.sleep(0.1)
    assert "temporal operator search-attribute create" in str(refused.value)
    for name in SEARCH_ATTRIBUTES:
        assert f"--name {name} --type Keyword" in str(refused.value)


async def test_a_port_that_is_taken_is_named(temporal_env: WorkflowEnvironment) -> None:
    address = temporal_env.client.service_client.config.target_host
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for setting in ("health_port", "metrics_port"):
            with pytest.raises(CannotStart, match=f"127.0.0.1:{port} .*COMFYUI_TEMPORAL_{setting.upper()}"):
                await worker.serve(settings_with(temporal_address=address, **{setting: port}), asyncio.Event())


async def test_the_smallest_worker_works(temporal_env: WorkflowEnvironment) -> None:
    slots = {"max_workflow_tasks": 2, "max_activities": 1, "max_local_activities": 1, "max_cached_workflows": 0}
    smallest = settings_with(task_queue=unique("queue"), **slots)
    client = await Client.connect(temporal_env.client.service_client.config.target_host, plugins=[TasksPlugin()])
    async with (
        worker.opened_activities(smallest) as activities,
        worker.make_worker(client, smallest, activities) as running,
    ):
        await come_true(lambda: running.is_running)


class Silence:
    """A service that takes calls and never answers. `calls` counts them."""

    def __init__(self) -> None:
        self.calls = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._hold, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        while await reader.read(1024):
            pass
        writer.close()


@contextmanager
def worker_process(**given: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **{f"COMFYUI_TEMPORAL_{name.upper()}": value for name, value in given.items()}}
    with subprocess.Popen([sys.executable, worker.__file__], env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


async def come_true(look: object, *, within_seconds: float = 20.0) -> None:
    assert callable(look)
    deadline = time.monotonic() + within_seconds
    while True:
        found = look()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() < deadline, f"not within {within_seconds} s"
        await asyncio.sleep(0.05)


async def test_it_serves_health_and_metrics_drains_at_the_first_signal_and_ends_at_the_second(
    temporal_env: WorkflowEnvironment, postgres_dsn: str
) -> None:
    health, metrics, queue = any_free_port(), any_free_port(), unique("queue")
    address = temporal_env.client.service_client.config.target_host
    silence = Silence()
    client = await Client.connect(address, plugins=[TasksPlugin()])
    async with silence.listening() as comfyui, httpx.AsyncClient(trust_env=False) as web:

        async def polls() -> bool:
            try:
                return (await web.get(f"http://127.0.0.1:{health}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        with worker_process(
            temporal_address=address,
            task_queue=queue,
            service_secret=SECRET,
            database_dsn=postgres_dsn,
            comfyui_url=comfyui,
            credits_url=comfyui,
            health_port=str(health),
            metrics_port=str(metrics),
            grace_seconds="20",
        ) as process:
            await come_true(polls)
            assert (await web.get(f"http://127.0.0.1:{health}/healthz")).text == "alive\n"
            assert (await web.get(f"http://127.0.0.1:{health}/other?q=1")).status_code == 404
            shown = (await web.get(f"http://127.0.0.1:{metrics}/metrics")).text
            assert value_in(shown, "temporal_num_pollers", task_queue=queue, poller_type="activity_task")
            assert value_in(shown, "temporal_worker_task_slots_available", worker_type="WorkflowWorker") is not None
            assert value_in(shown, worker.RECONCILE_EVERY) == Settings.model_fields["reconcile_every_seconds"].default
            task_id = unique("held")
            handle = await client.start_workflow(
                "ImageGenerationWorkflow",
                {"task_id": task_id, "tenant_id": "t", "user_id": "u", "template_id": "upscale", "prompt": "p"},
                id=workflow_id_of(task_id),
                task_queue=queue,
                execution_timeout=timedelta(minutes=2),
            )
            await come_true(lambda: silence.calls > 0)
            process.send_signal(signal.SIGTERM)
            await come_true(lambda: not_ready(web, health))
            assert process.poll() is None, "it did not wait for the call in flight"
            process.send_signal(signal.SIGTERM)
            await come_true(lambda: process.poll() is not None, within_seconds=3)
            assert process.returncode == worker.EXIT_FORCED
        await handle.terminate("the test is over")


async def not_ready(web: httpx.AsyncClient, port: int) -> bool:
    return (await web.get(f"http://127.0.0.1:{port}/readyz")).status_code == 503
