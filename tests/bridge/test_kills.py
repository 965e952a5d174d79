"""Processes that are killed or stopped during a run: the prompt runs once and the job is delivered."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from bridge import placement, training_workflow
from bridge.calls import CLEAN_SERVER, TAKE_SERVER, workflow_of
from tests.bridge.native import NativeServer
from tests.bridge.platform import CALLBACK_SECRET, SECRET, BridgePlatform
from tests.bridge.test_cleaning import is_closed
from tests.bridge.test_servers import until_running
from tests.bridge.test_trainings import MODELS, created, ended, post_action
from tests.conftest import unique

PROJECT = Path(__file__).parents[2]


@asynccontextmanager
async def gpu_process(
    bridge: BridgePlatform, native: NativeServer, name: str, grace_seconds: float = 20.0
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m bridge.gpu_worker` as a process of its own, killed at the end."""
    settings = {
        "TEMPORAL_ADDRESS": bridge.client.service_client.config.target_host,
        "TEMPORAL_NAMESPACE": bridge.client.namespace,
        "BRIDGE_TASK_QUEUE": bridge.settings.bridge_task_queue,
        "BRIDGE_STORE_URL": bridge.settings.bridge_store_url,
        "CALLBACK_SECRETS": CALLBACK_SECRET,
        "SERVICE_SECRET": SECRET,
        "GPU_GRACE_SECONDS": str(grace_seconds),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bridge.gpu_worker", "--server", native.url, "--name", name),
        env={**os.environ, **{f"COMFYUI_TEMPORAL_{key}": value for key, value in settings.items()}},
        cwd=PROJECT,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_killed_workers_prompt_is_found_again_and_runs_once(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    name = unique("gpu")
    await native.admin.set(hold=True)
    async with gpu_process(bridge, native, name) as process:
        accepted = await bridge.submit()
        prompt_id = await until_running(bridge, native)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    async with gpu_process(bridge, native, name):
        await native.admin.set(hold=False)
        state = await bridge.ended(accepted["job_id"], seconds=60)
    assert state["error_details"] is None, state
    assert await native.admin.submissions() == [prompt_id]
    assert await native.admin.runs_of(prompt_id) == 1


async def test_what_a_cancelled_job_runs_is_stopped_however_late_its_worker_comes_back(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "SERVER_AWAY", timedelta(seconds=1))
    name = unique("gpu")
    await native.admin.set(hold=True)
    async with gpu_process(bridge, native, name) as process:
        job = await bridge.submit()
        await until_running(bridge, native)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await bridge.cancel(job["job_id"])
    assert (await bridge.ended(job["job_id"]))["error_details"]["code"] == "cancelled"
    await bridge.until(partial(is_being_cleaned_up, bridge, job["job_id"]))
    await asyncio.sleep(3)
    assert [run.outcome for run in await native.admin.runs()] == ["running"]
    async with bridge.gpu(native, name=name):
        await bridge.until(partial(has_outcomes, native, "interrupted"))
        await bridge.until(partial(is_closed, bridge, job["job_id"]))


async def test_a_chunk_that_a_training_has_left_is_stopped_when_its_worker_comes_back(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (placement, training_workflow):
        monkeypatch.setattr(module, "SERVER_AWAY", timedelta(seconds=1))
    first, second = servers
    name = unique("gpu")
    for server in servers:
        await server.admin.set(models=MODELS)
    await first.admin.set(hold=True)
    async with gpu_process(bridge, first, name) as process:
        training = await created(bridge)
        await post_action(bridge, training["training_id"], "start")
        await until_running(bridge, first)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    async with bridge.gpu(second):
        assert (await ended(bridge, training["training_id"]))["error_details"] is None
    assert [run.outcome for run in await first.admin.runs()] == ["running"]
    async with bridge.gpu(first, name=name):
        await bridge.until(partial(has_outcomes, first, "interrupted"))
        await bridge.until(partial(is_closed, bridge, training["training_id"]))


async def test_a_chunk_that_ended_while_its_worker_was_away_counts_with_all_its_time(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (placement, training_workflow):
        monkeypatch.setattr(module, "SERVER_AWAY", timedelta(seconds=1))
    name = unique("gpu")
    await native.admin.set(models=MODELS, hold=True)
    async with gpu_process(bridge, native, name) as process:
        training = (await created(bridge))["training_id"]
        await post_action(bridge, training, "start")
        await until_running(bridge, native)
        began = time.monotonic()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await bridge.until(partial(waits_for_a_server, bridge, training), seconds=60)
    held_seconds = time.monotonic() - began
    await native.admin.set(hold=False)
    await bridge.until(partial(has_outcomes, native, "success"))
    async with bridge.gpu(native, name=name):
        state = await ended(bridge, training)
    assert state["error_details"] is None, state
    assert state["gpu_hours_used"] * 3600 >= held_seconds - 0.1


async def waits_for_a_server(bridge: BridgePlatform, run_id: str) -> bool:
    described = await bridge.client.get_workflow_handle(workflow_of(run_id)).describe()
    return any(each.activity_type.name == TAKE_SERVER for each in described.raw_description.pending_activities)


async def is_being_cleaned_up(bridge: BridgePlatform, job_id: str) -> bool:
    history = await bridge.client.get_workflow_handle(workflow_of(job_id)).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    return CLEAN_SERVER in scheduled


async def has_outcomes(native: NativeServer, *outcomes: str) -> bool:
    return [run.outcome for run in await native.admin.runs()] == list(outcomes)


@pytest.mark.slow
async def test_a_stopped_worker_finishes_its_graph_first(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    async with gpu_process(bridge, native, unique("gpu")) as process:
        accepted = await bridge.submit()
        await until_running(bridge, native)
        process.send_signal(signal.SIGTERM)
        waiting = await bridge.submit()
        await native.admin.set(hold=False)
        state = await bridge.ended(accepted["job_id"])
        assert await asyncio.wait_for(process.wait(), 30) == 0
    assert state["error_details"] is None
    assert len(await native.admin.submissions()) == 1
    assert (await bridge.job(waiting["job_id"]))["job_status"] == "queued"
    await bridge.cancel(waiting["job_id"])


@pytest.mark.slow
async def test_after_its_grace_period_a_worker_cancels_its_prompt_and_hands_the_job_back(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer]
) -> None:
    first, second = servers
    await first.admin.set(hold=True)
    async with gpu_process(bridge, first, unique("gpu"), grace_seconds=0.2) as process:
        accepted = await bridge.submit()
        await until_running(bridge, first)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    assert [run.outcome for run in await first.admin.runs()] == ["interrupted"]
    async with bridge.gpu(second):
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None
    assert [run.outcome for run in await second.admin.runs()] == ["success"]


async def test_a_run_that_its_own_worker_stopped_is_nobodys_failure(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    """The worker of the only server is restarted three times during one run."""
    name = unique("gpu")
    await native.admin.set(hold=True)
    accepted = await bridge.submit()
    for runs_before in range(3):
        async with bridge.gpu(native, name=name, grace_seconds=0.1):
            await until_running(bridge, native, runs_before)
    await native.admin.set(hold=False)
    async with bridge.gpu(native, name=name):
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None, state
    assert [run.outcome for run in await native.admin.runs()] == ["interrupted"] * 3 + ["success"]


@pytest.mark.slow
async def test_killing_a_worker_at_any_moment_causes_no_second_run(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    """The worker is killed repeatedly, a little later each time, while jobs run."""
    name = unique("gpu")
    await native.admin.set(node_seconds=0.1)
    jobs = [await bridge.submit() for _ in range(12)]
    for n in range(6):
        async with gpu_process(bridge, native, name) as process:
            before = len(await native.admin.submissions())
            await bridge.until(partial(has_submitted, native, before), seconds=60)
            await asyncio.sleep(0.11 * n)
            process.send_signal(signal.SIGKILL)
            await process.wait()
    async with gpu_process(bridge, native, name):
        states = [await bridge.ended(job["job_id"], seconds=90) for job in jobs]
    assert [state["error_details"] for state in states] == [None] * len(jobs)
    submissions = await native.admin.submissions()
    assert len(submissions) == len(set(submissions)) == len(jobs)


async def has_submitted(native: NativeServer, more_than: int) -> bool:
    return len(await native.admin.submissions()) > more_than
