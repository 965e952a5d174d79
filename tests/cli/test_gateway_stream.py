"""Following a task by the gateway's stream: everything once, over cut connections, and by query where there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.client.models import TaskUpdate
from comfyui_temporal.client.submission import start_task
from comfyui_temporal.command_line.connection import Connection, GatewayAccess
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.server import Server
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus
from store import TaskStore
from tests.cable import Cable
from tests.cli.test_tasks import Seen
from tests.workflows.platform import CALLERS, Handle, Platform, running_platform, task_id_of

TENANT = ("tenant-demo", "user-demo")
ANY_STREAM = 'method="GET",route="/api/v1/tasks/stream/sse"'
STREAM = f'{ANY_STREAM},status="200"'


@pytest_asyncio.fixture(scope="module")
async def whole(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    """An image takes some three seconds."""
    folder = tmp_path_factory.mktemp("streamed")
    async with running_platform(temporal_env, task_store, folder, speed=160) as platform, platform.worker():
        yield platform


@pytest.fixture
def opened(whole: Platform) -> Connection:
    """A connection that knows the gateway and the tenant's token, as the local stack describes them."""
    server = Server(whole.client.service_client.config.target_host, "default", "named by the test")
    tokens = {TENANT[0]: CALLERS.made_for(*TENANT)}
    return Connection(whole.client, server, whole.task_queue, GatewayAccess(whole.gateway_url, tokens=tokens))


async def streams_opened(whole: Platform) -> float:
    return await requests_counted(whole, STREAM)


async def requests_counted(whole: Platform, which: str) -> float:
    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"{whole.gateway_url}/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("gateway_requests_total") and which in line)


async def begun(whole: Platform) -> Handle:
    """A task whose id is claimed, so that the gateway knows it."""
    task = ImageTask.model_validate(whole.image())
    handle = (await start_task(whole.client, task, task_queue=whole.task_queue)).handle

    async def is_claimed() -> bool:
        return await whole.store.is_claimed(task_id_of(handle))

    await whole.until(is_claimed)
    return handle


def check_order(seen: Seen) -> None:
    steps = [(one.stage or "", one.progress) for one in seen.progress]
    order = ["", "queued", "processing", "delivery"]
    assert steps == sorted(steps, key=lambda step: (order.index(step[0]), step[1]))
    assert "processing" in {stage for stage, _ in steps}


@pytest.fixture
def no_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        pytest.fail("a task with a stream needs no query")

    monkeypatch.setattr("comfyui_temporal.client.temporal_tasks.TemporalTasks.read_update", never)


@pytest.mark.usefixtures("no_queries")
async def test_a_task_is_followed_by_its_stream_to_its_end(whole: Platform, opened: Connection) -> None:
    before = await streams_opened(whole)
    handle = await begun(whole)
    seen = Seen()
    outcome = await follow(opened, task_id_of(handle), seen)
    assert outcome.status is TaskStatus.COMPLETED
    assert await streams_opened(whole) == before + 1
    check_order(seen)
    assert seen.progress[-1].estimated_time is not None, "no event has the estimated time, so it is read"


@pytest.mark.parametrize("query", ["as fresh", "older"])
async def test_a_stream_that_is_cut_goes_on_where_it_was(
    whole: Platform, opened: Connection, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """Seen: the bar went back where the workflow's own figures were older than those of ticks."""

    async def without_ticks(_: object, __: object, newest: TaskUpdate | None) -> TaskUpdate | None:
        return newest and newest.model_copy(update={"progress": newest.progress - 10, "job_id": "job"})

    if query == "older":
        monkeypatch.setattr("comfyui_temporal.client.temporal_tasks.TemporalTasks.read_update", without_ticks)
    address = urlsplit(whole.gateway_url)
    async with Cable(lambda: asyncio.open_connection(address.hostname, address.port)).laid() as cable:
        assert opened.gateway is not None
        by_cable = replace(opened, gateway=replace(opened.gateway, url=f"http://127.0.0.1:{cable.port}"))
        handle = await begun(whole)
        seen = Seen()
        following = asyncio.create_task(follow(by_cable, task_id_of(handle), seen))
        await whole.until(lambda: _has_moved(seen))
        cable.pull()
        cable.plug_in()
        outcome = await following
    assert outcome.status is TaskStatus.COMPLETED
    check_order(seen)


async def _has_moved(seen: Seen) -> bool:
    return any(one.progress > 0 for one in seen.progress)


async def test_with_another_tenants_token_the_gateway_is_asked_once(whole: Platform, opened: Connection) -> None:
    foreign = GatewayAccess(whole.gateway_url, token=CALLERS.made_for("tenant-other", "user-other"))
    handle = await begun(whole)
    before = await requests_counted(whole, ANY_STREAM)
    outcome = await follow(replace(opened, gateway=foreign), task_id_of(handle), Seen())
    assert outcome.status is TaskStatus.COMPLETED
    assert await requests_counted(whole, ANY_STREAM) == before + 1


@pytest.mark.parametrize(
    "gateway", [GatewayAccess("http://127.0.0.1:9", token="any"), GatewayAccess("", token="nonsense")]
)
async def test_without_gateway_or_permission_the_task_is_queried(
    whole: Platform, opened: Connection, gateway: GatewayAccess
) -> None:
    known = replace(gateway, url=gateway.url or whole.gateway_url)
    handle = await begun(whole)
    seen = Seen()
    outcome = await follow(replace(opened, gateway=known), task_id_of(handle), seen)
    assert outcome.status is TaskStatus.COMPLETED
    assert any(one.job_id for one in seen.progress), "only the query shows the job's id"
