"""Jobs and trainings that an operator resets or terminates in Temporal: what was delivered stays, nothing runs on."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from bridge.calls import COPY_RESULTS, RUN_GRAPH, TAKE_SERVER, workflow_of
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json
from tests.bridge.resets import reset_before
from tests.bridge.test_cleaning import history_of, is_closed
from tests.bridge.test_servers import until_running
from tests.bridge.test_trainings import MODELS, created, ended, file_of, post_action, state_of


async def test_a_delivered_job_that_is_reset_to_its_copy_keeps_its_picture(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native):
        job = await bridge.submit()
        (url,) = (await bridge.ended(job["job_id"]))["result_urls"]
        await bridge.until(lambda: is_closed(bridge, job["job_id"]))
        delivered = (await bridge.http.get(url)).content
        assert delivered
        await reset_before(bridge, job["job_id"], COPY_RESULTS)
        state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None, state
    assert (await bridge.http.get(url)).content == delivered
    (again,) = state["result_urls"]
    assert (await bridge.http.get(again)).content == delivered


async def test_a_training_that_is_reset_to_its_first_copy_keeps_its_checkpoint_and_is_trained_to_the_end(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        training_id = (await created(bridge))["training_id"]
        await post_action(bridge, training_id, "start")

        async def first_checkpoint() -> Json | None:
            checkpoint: Json | None = (await state_of(bridge, training_id))["checkpoint"]
            return checkpoint

        checkpoint = await bridge.until(first_checkpoint)
        assert checkpoint is not None
        first = file_of(checkpoint["uri"])
        trained = first.read_bytes()
        assert trained
        assert (await ended(bridge, training_id))["error_details"] is None
        await bridge.until(lambda: is_closed(bridge, training_id))
        await reset_before(bridge, training_id, COPY_RESULTS)
        state = await ended(bridge, training_id)
    assert state["error_details"] is None, state
    assert first.read_bytes() == trained
    assert state["checkpoint"]["step"] == 6
    assert file_of(state["checkpoint"]["uri"]).stat().st_size
    assert file_of(state["output"]["model_path"]).stat().st_size


async def test_what_a_terminated_job_runs_is_stopped_and_removed(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        job = await bridge.submit()
        await until_running(bridge, native)
        await bridge.client.get_workflow_handle(workflow_of(job["job_id"])).terminate("by a test")

        async def is_removed() -> bool:
            is_stopped = [run.outcome for run in await native.admin.runs()] == ["interrupted"]
            return is_stopped and await history_of(bridge, native) == {}

        await bridge.until(is_removed)
        await native.admin.set(hold=False)
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None, "the server is free"


@pytest.mark.parametrize("call", [TAKE_SERVER, RUN_GRAPH])
async def test_a_running_job_that_is_reset_is_delivered_and_leaves_nothing_running(
    bridge: BridgePlatform, native: NativeServer, call: str
) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        job = await bridge.submit()
        await until_running(bridge, native)
        await reset_before(bridge, job["job_id"], call)
        if call == TAKE_SERVER:
            await until_running(bridge, native, runs_before=1)
        await native.admin.set(hold=False)
        state = await bridge.ended(job["job_id"])
        await bridge.until(lambda: is_closed(bridge, job["job_id"]))
    assert state["error_details"] is None, state
    outcomes = [run.outcome for run in await native.admin.runs()]
    assert outcomes == (["interrupted", "success"] if call == TAKE_SERVER else ["success"])
    assert await history_of(bridge, native) == {}


async def test_a_chunk_that_runs_while_its_training_is_reset_counts_with_all_its_time(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS, hold=True)
    async with bridge.gpu(native):
        training_id = (await created(bridge))["training_id"]
        await post_action(bridge, training_id, "start")
        await until_running(bridge, native)
        began = time.monotonic()
        await asyncio.sleep(5)  # Of the run's own time.
        held_seconds = time.monotonic() - began
        await reset_before(bridge, training_id, RUN_GRAPH)
        await native.admin.set(hold=False)
        state = await ended(bridge, training_id)
    assert state["error_details"] is None, state
    assert len(await native.admin.runs()) == 3
    assert state["gpu_hours_used"] * 3600 >= held_seconds - 0.1


@pytest.mark.parametrize("kind", ["job", "training"])
async def test_what_is_cancelled_in_temporal_while_it_cleans_up_ends_as_it_did(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer], kind: str
) -> None:
    """One of its servers is away, and may still run it."""
    first, second = servers
    for server in servers:
        await server.admin.set(models=MODELS)
    await first.admin.set(hold=True)
    try:
        async with bridge.gpu(first):
            if kind == "job":
                run_id = (await bridge.submit())["job_id"]
            else:
                run_id = (await created(bridge))["training_id"]
                await post_action(bridge, run_id, "start")
            await until_running(bridge, first)
            await first.kill()
            async with bridge.gpu(second):
                read, status, over = (bridge.ended, "job_status", "delivery")
                if kind == "training":
                    read, status, over = (partial(ended, bridge), "training_status", "completed")
                assert (await read(run_id))[status] == over
                assert not await is_closed(bridge, run_id)
                await bridge.client.get_workflow_handle(workflow_of(run_id)).cancel()
                await bridge.until(lambda: is_closed(bridge, run_id))
                state = await read(run_id)
        assert (state[status], state["error_details"]) == (over, None)
    finally:
        await first.restart()
