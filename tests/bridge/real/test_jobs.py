"""Jobs end to end on a real ComfyUI: bridge, GPU worker process, callbacks, pictures."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from PIL import Image
from temporalio.client import Client

from tests.bridge.platform import BridgePlatform, running_bridge
from tests.bridge.real.own_templates import BAD, SLOW, TINY, write_templates
from tests.bridge.real.sick_proxy import SickProxy
from tests.bridge.real.worker_process import WorkerProcess

LIMIT_SECONDS = 110.0
pytestmark = pytest.mark.timeout(600)


@pytest_asyncio.fixture(scope="module")
async def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    write_templates(folder)
    return folder


@asynccontextmanager
async def one_worker(
    client: Client, folder: Path, server: str, templates: Path
) -> AsyncIterator[tuple[BridgePlatform, WorkerProcess]]:
    async with (
        running_bridge(client, folder, bridge_templates=[templates]) as bridge,
        WorkerProcess(bridge, client, server, templates) as worker,
    ):
        yield bridge, worker


@pytest_asyncio.fixture
async def proxy(comfyui_url: str) -> AsyncIterator[SickProxy]:
    """It shows what the server was given. The server's history does not: the bridge removes a job's prompts from it."""
    async with SickProxy(comfyui_url) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def worked(
    temporal_client: Client, tmp_path: Path, proxy: SickProxy, templates: Path
) -> AsyncIterator[tuple[BridgePlatform, WorkerProcess]]:
    async with one_worker(temporal_client, tmp_path, proxy.url, templates) as both:
        yield both


def new_seed() -> int:
    """A seed that never ran before, so that the cache does not answer. It is small enough for a colour."""
    return secrets.randbelow(0x1000000)


async def queued_or_running(real: httpx.AsyncClient) -> list[str]:
    queue = (await real.get("/queue")).json()
    return [item[1] for item in queue["queue_running"] + queue["queue_pending"]]


async def until_running(bridge: BridgePlatform, real: httpx.AsyncClient) -> str:
    """Wait until the server runs a prompt. Returns its id."""

    async def look() -> str | None:
        running = (await real.get("/queue")).json()["queue_running"]
        return str(running[0][1]) if running else None

    prompt_id = await bridge.until(look, seconds=LIMIT_SECONDS)
    assert prompt_id is not None
    return prompt_id


async def test_a_test_pattern_is_delivered(worked: tuple[BridgePlatform, WorkerProcess]) -> None:
    bridge, _ = worked
    accepted = await bridge.submit(extras={"seed": new_seed()})
    state = await bridge.ended(accepted["job_id"], seconds=LIMIT_SECONDS)
    assert state["error_details"] is None, state
    [url] = state["result_urls"]
    answer = await bridge.http.get(url)
    with Image.open(BytesIO(answer.content)) as picture:
        assert (picture.format, picture.size) == ("PNG", (512, 512))

    async def published() -> list[str]:
        statuses = bridge.receiver.statuses(accepted["task_id"])
        return statuses if "delivery" in statuses else []

    assert "processing" in await bridge.until(published)


async def test_progress_is_published_node_by_node(worked: tuple[BridgePlatform, WorkerProcess]) -> None:
    bridge, _ = worked
    job_id = (await bridge.submit(template_id=SLOW, resolution="hd", extras={"seed": new_seed()}))["job_id"]
    seen: list[float] = []

    async def over() -> bool:
        state = await bridge.job(job_id)
        assert state["error_details"] is None, state
        if state["job_status"] == "processing":
            seen.append(state["stage_progress"] or 0)
        return bool(state["job_status"] == "delivery")

    await bridge.until(over, seconds=LIMIT_SECONDS)
    assert seen == sorted(seen)
    assert len({percent for percent in seen if 0 < percent < 100}) >= 3, f"seen: {sorted(set(seen))}"


async def test_a_running_job_is_cancelled_and_the_server_is_free(
    worked: tuple[BridgePlatform, WorkerProcess], real: httpx.AsyncClient
) -> None:
    bridge, _ = worked
    job_id = (await bridge.submit(template_id=SLOW, resolution="hd", extras={"seed": new_seed()}))["job_id"]
    prompt_id = await until_running(bridge, real)
    await bridge.cancel(job_id)
    state = await bridge.ended(job_id, seconds=LIMIT_SECONDS)
    assert state["error_details"]["code"] == "cancelled"

    async def is_free() -> bool:
        return prompt_id not in await queued_or_running(real)

    await bridge.until(is_free, seconds=LIMIT_SECONDS)
    after = await bridge.ended((await bridge.submit(extras={"seed": new_seed()}))["job_id"], seconds=LIMIT_SECONDS)
    assert after["error_details"] is None, "the server takes no more jobs"


async def test_a_graph_that_comfyui_refuses_is_refused_with_node_and_input(
    worked: tuple[BridgePlatform, WorkerProcess],
) -> None:
    bridge, _ = worked
    state = await bridge.ended((await bridge.submit(template_id=BAD))["job_id"], seconds=LIMIT_SECONDS)
    details = state["error_details"]
    assert details["code"] == "workflow_invalid"
    assert details["retryable"] is False
    assert "ground" in (details.get("node") or "") + details["message"]
    assert "width" in details["message"]


async def test_a_killed_workers_run_is_found_again_and_runs_once(
    worked: tuple[BridgePlatform, WorkerProcess], real: httpx.AsyncClient, proxy: SickProxy
) -> None:
    bridge, worker = worked
    job_id = (await bridge.submit(template_id=SLOW, resolution="hd", extras={"seed": new_seed()}))["job_id"]
    prompt_id = await until_running(bridge, real)
    await worker.end(signal.SIGKILL)
    assert prompt_id in await queued_or_running(real), "killed too late for this test: make the template slower"
    await worker.start()
    state = await bridge.ended(job_id, seconds=LIMIT_SECONDS)
    assert state["error_details"] is None, state
    assert len(state["result_urls"]) == 1
    assert [body["prompt_id"] for body in proxy.submitted] == [prompt_id], "it ran twice"


async def test_a_prompt_becomes_a_picture_if_there_is_a_checkpoint(
    worked: tuple[BridgePlatform, WorkerProcess], real: httpx.AsyncClient
) -> None:
    """Without a checkpoint the job must end as `model_missing`. `tiny_checkpoint.py` makes one."""
    bridge, _ = worked
    has_checkpoint = bool((await real.get("/models/checkpoints")).json())
    accepted = await bridge.submit(template_id=TINY, extras={"seed": new_seed()})
    state = await bridge.ended(accepted["job_id"], seconds=LIMIT_SECONDS)
    if not has_checkpoint:
        assert state["error_details"]["code"] == "model_missing"
        return
    assert state["error_details"] is None, state
    answer = await bridge.http.get(state["result_urls"][0])
    with Image.open(BytesIO(answer.content)) as picture:
        assert picture.size == (64, 64)


async def test_several_images_are_one_run_in_the_size_and_with_the_steps_that_were_asked_for(
    worked: tuple[BridgePlatform, WorkerProcess], real: httpx.AsyncClient
) -> None:
    bridge, _ = worked
    if not (await real.get("/models/checkpoints")).json():
        pytest.skip("this server has no checkpoint; tests/bridge/real/tiny_checkpoint.py makes one")
    extras = {"seed": 2**64 - 1 - new_seed(), "aspect_ratio": "4:1", "steps": 1}
    accepted = await bridge.submit(template_id=TINY, images=3, extras=extras)
    state = await bridge.ended(accepted["job_id"], seconds=LIMIT_SECONDS)
    assert state["error_details"] is None, state
    pictures = [(await bridge.http.get(url)).content for url in state["result_urls"]]
    assert len(set(pictures)) == 3
    for content in pictures:
        with Image.open(BytesIO(content)) as picture:
            assert picture.size == (128, 32)


async def test_a_job_survives_a_restart_of_its_server(
    worked: tuple[BridgePlatform, WorkerProcess], real: httpx.AsyncClient, proxy: SickProxy
) -> None:
    """With `RESTART`, a shell command that kills the server and starts it again without waiting for it."""
    command = os.environ.get("RESTART")
    if not command:
        pytest.skip("needs a command: make test-comfyui COMFYUI=… RESTART='…'")
    bridge, _ = worked
    job_id = (await bridge.submit(template_id=SLOW, resolution="hd", extras={"seed": new_seed()}))["job_id"]
    prompt_id = await until_running(bridge, real)
    restart = await asyncio.create_subprocess_shell(command)
    assert await restart.wait() == 0
    state = await bridge.ended(job_id, seconds=4 * LIMIT_SECONDS)
    assert state["error_details"] is None, state
    first, second = [body["prompt_id"] for body in proxy.submitted]
    assert first == prompt_id != second, "the second run is another prompt"
