"""A server's fault is the server's: its job goes elsewhere, and the server comes back by itself."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace
from functools import partial

import pytest
from temporalio.testing import ActivityEnvironment

from bridge.calls import workflow_of
from bridge.gpu_worker import GpuWorker
from bridge.native import NativeServer as NativeClient
from bridge.orders import CleanOrder, GraphOutcome
from bridge.placement import prompt_id_of
from bridge.probe import PATTERN
from bridge.server import QueueState
from bridge.server_health import QUICK_FAILURES, ServerHealth
from bridge.slot import Slot
from comfyui_temporal.contracts.errors import ErrorDetails
from tests.bridge.memory_server import MemoryServer
from tests.bridge.native import NativeServer
from tests.bridge.platform import QUICK, QUICK_PROBE, BridgePlatform
from tests.bridge.test_servers import until_running
from tests.conftest import unique
from tests.waiting import comes_true

Servers = tuple[NativeServer, NativeServer]
CUDA = "CUDA error: an illegal memory access was encountered"
BROKEN_GPU = {"ImageInvert": CUDA, "ImageBlur": CUDA}


async def is_well_again(worker: GpuWorker) -> None:
    await comes_true(lambda: worker.health.sickness is None, "the server is well again", within_seconds=20)


async def fell_sick(worker: GpuWorker) -> str:
    await comes_true(lambda: worker.health.sickness is not None, "the server is sick", within_seconds=20)
    assert worker.health.sickness is not None
    return worker.health.sickness.reason


@pytest.mark.parametrize("status", [503, 403, 413])
async def test_a_server_that_refuses_submits_is_left_and_comes_back(
    bridge: BridgePlatform, servers: Servers, status: int
) -> None:
    first, second = servers
    await first.admin.set(broken_routes={"/prompt": status})
    async with bridge.gpu(first) as failing:
        accepted = await bridge.submit()
        assert str(status) in await fell_sick(failing)
        submits = [request for request in await first.admin.requests() if request.path == "/prompt"]
        async with bridge.gpu(second):
            assert (await bridge.ended(accepted["job_id"]))["error_details"] is None
        assert len([request for request in submits if request.method == "POST"]) <= 2 * QUICK.submits
        await first.admin.set(broken_routes={})
        await is_well_again(failing)
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None
    assert len(await second.admin.runs()) == 1


async def test_one_broken_card_beside_a_good_one_fails_no_job(bridge: BridgePlatform, servers: Servers) -> None:
    first, second = servers
    await first.admin.set(fail_nodes=BROKEN_GPU)
    async with bridge.gpu(first) as failing:
        jobs = [await bridge.submit() for _ in range(6)]
        assert CUDA in await fell_sick(failing)
        async with bridge.gpu(second):
            for job in jobs:
                assert (await bridge.ended(job["job_id"]))["error_details"] is None
        runs = [run.outcome for run in await second.admin.runs()]
        assert runs == ["success"] * 6
        await first.admin.set(fail_nodes={})
        await is_well_again(failing)


async def test_a_graph_that_breaks_every_card_ends_with_its_error_after_three_servers(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(fail_nodes={"ImageInvert": CUDA})
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit())["job_id"])
    assert (state["error_details"]["code"], state["error_details"]["retryable"]) == ("node_error", False)
    assert CUDA in state["error_details"]["message"]
    assert len([run for run in await native.admin.runs() if run.outcome == "error"]) == 3, (
        "the pattern needs no ImageInvert"
    )


async def test_a_server_that_fails_job_after_job_at_once_is_left(bridge: BridgePlatform, servers: Servers) -> None:
    first, second = servers
    await first.admin.set(fail_nodes={"ImageInvert": "no such file", "ImageBlur": "no such file"})
    async with bridge.gpu(first) as failing:
        jobs = [await bridge.submit() for _ in range(QUICK_FAILURES + 2)]
        assert "failed faster than any run" in await fell_sick(failing)
        async with bridge.gpu(second):
            ended = [await bridge.ended(job["job_id"]) for job in jobs]
    failed = [state["error_details"]["code"] for state in ended if state["error_details"] is not None]
    assert failed == ["node_error"] * (QUICK_FAILURES - 1)


async def test_a_run_that_someone_stops_at_the_server_is_run_again(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    """ComfyUI's own Interrupt button."""
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        prompt_id = await until_running(bridge, native)
        await bridge.http.post(f"{native.url}/interrupt", json={"prompt_id": prompt_id})
        again = await until_running(bridge, native, runs_before=1)
        await native.admin.set(hold=False)
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None
    assert again != prompt_id
    assert [run.outcome for run in await native.admin.runs()] == ["interrupted", "success"]


async def test_a_job_whose_server_failed_goes_before_those_that_wait(bridge: BridgePlatform, servers: Servers) -> None:
    first, second = servers
    await first.admin.set(broken_routes={"/prompt": 403}, hold=True)
    waiting = [await bridge.submit() for _ in range(4)]
    for job in waiting:
        await bridge.until(partial(bridge.is_waiting, job))
    async with bridge.gpu(first) as failing:
        await fell_sick(failing)
    states = {job["job_id"]: (await bridge.job(job["job_id"]))["job_status"] for job in waiting}
    moved = [job_id for job_id, status in states.items() if status == "processing"]
    assert len(moved) == 1
    async with bridge.gpu(second):
        for job in waiting:
            assert (await bridge.ended(job["job_id"]))["error_details"] is None
    assert (await second.admin.runs())[0].prompt_id == prompt_id_of(moved[0], 0, 1)


async def test_a_job_that_waits_for_another_server_can_be_cancelled(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(broken_routes={"/prompt": 403})
    async with bridge.gpu(native) as failing:
        job = await bridge.submit()
        await fell_sick(failing)
        await bridge.until(partial(bridge.is_waiting, job))
        await bridge.cancel(job["job_id"])
        assert (await bridge.ended(job["job_id"]))["error_details"]["code"] == "cancelled"

        async def is_over() -> bool:
            return bool((await bridge.client.get_workflow_handle(workflow_of(job["job_id"])).describe()).close_time)

        await bridge.until(is_over, seconds=10)
    assert await native.admin.submissions() == []


async def test_a_server_that_runs_on_what_was_cancelled_is_sick(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(stuck=True)
    async with bridge.gpu(native, patience=replace(QUICK, stop=1.0)) as worker:
        job = await bridge.submit()
        await until_running(bridge, native)
        await bridge.cancel(job["job_id"])
        assert "did not stop within 1 s" in await fell_sick(worker)
        await bridge.until(partial(is_available, bridge, number=0))
        await native.admin.set(stuck=False)
        await is_well_again(worker)
        await bridge.until(partial(is_available, bridge, number=1))
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None


async def is_available(bridge: BridgePlatform, number: int) -> bool:
    bridge.bridge.forecast.forget()
    rows = (await bridge.get("/gpus")).json()
    return [(row["total"], row["available"]) for row in rows] == [(1, number)]


async def test_a_server_that_runs_on_what_a_job_left_is_sick(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(stuck=True)
    async with NativeClient(native.url) as server, bridge.gpu(native, patience=replace(QUICK, stop=1.0)) as worker:
        prompt_id = str(uuid.uuid4())
        await server.submit(PATTERN, prompt_id)
        await until_running(bridge, native)
        left = CleanOrder(job_id="job-that-moved", prompts=[prompt_id])
        await ActivityEnvironment().run(worker.activities.clean_server, left)
        assert "did not stop within 1 s" in await fell_sick(worker)
        await native.admin.set(stuck=False)
        await is_well_again(worker)


async def test_a_silent_socket_is_not_a_dead_run(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(silent_websocket=True, hold=True)
    async with bridge.gpu(native, patience=replace(QUICK, stalled=0.3)):
        accepted = await bridge.submit()
        await until_running(bridge, native)
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert (await bridge.job(accepted["job_id"]))["job_status"] == "processing"
            await asyncio.sleep(0.1)
        await native.admin.set(hold=False)
        assert (await bridge.ended(accepted["job_id"]))["error_details"] is None
    assert len(await native.admin.runs()) == 1


async def test_a_relapse_is_probed_later_and_a_delivered_job_forgives_it(native: NativeServer) -> None:
    async with NativeClient(native.url) as server:
        health = ServerHealth(server, first_pause_seconds=30.0)
        async with health.watched():
            health.fell_sick("once")
            await comes_true(lambda: health.sickness is None, within_seconds=20)
            health.fell_sick("twice")
            await asyncio.sleep(0.6)
            assert health.sickness is not None
            health.ran("task", "tenant", GraphOutcome(), 3.0)
            health.sickness = None
            health.fell_sick("another time")
            await comes_true(lambda: health.sickness is None, within_seconds=20)


async def until_well(health: ServerHealth) -> float:
    """Wait until the server is well. Returns how long that took."""
    began = time.monotonic()
    await comes_true(lambda: health.sickness is None, within_seconds=20)
    return time.monotonic() - began


def fails_at_once(health: ServerHealth, *tenants: str) -> None:
    """As many jobs fail as make the server sick, of these tenants in turn; as in `run_graph`."""
    failed = GraphOutcome(error=ErrorDetails(code="node_error", message="broken data stream when reading image file"))
    reasons = [health.ran(unique("task"), tenants[n % len(tenants)], failed, 0.2) for n in range(QUICK_FAILURES)]
    assert reasons[:-1] == [None] * (QUICK_FAILURES - 1)
    assert reasons[-1] is not None
    health.fell_sick(reasons[-1])


async def test_one_tenants_bad_inputs_keep_no_server_away_for_long(native: NativeServer) -> None:
    async with NativeClient(native.url) as server:
        health = ServerHealth(server, probe=QUICK_PROBE, first_pause_seconds=0.2)
        async with health.watched():
            for _ in range(15):
                fails_at_once(health, "tenant-a")
                assert await until_well(health) < 1.0


async def test_what_fails_at_once_for_two_tenants_is_probed_later_each_time(native: NativeServer) -> None:
    async with NativeClient(native.url) as server:
        health = ServerHealth(server, probe=QUICK_PROBE, first_pause_seconds=0.2)
        async with health.watched():
            waits = []
            for _ in range(5):
                fails_at_once(health, "tenant-a", "tenant-b")
                waits.append(await until_well(health))
            assert waits[-1] > 1.6, waits
            assert waits[0] < 0.4, "at first it is probed at once"


class SlowServer(MemoryServer):
    async def queue(self) -> QueueState:
        await asyncio.sleep(0.01)
        return await super().queue()


async def test_two_jobs_from_two_queues_never_hold_a_server_at_once() -> None:
    server = SlowServer()
    slot = Slot(server, ServerHealth(server))
    assert sorted(await asyncio.gather(slot.take("one"), slot.take("another")), key=str) == [
        None,
        "the server is held by another job",
    ]


def test_jobs_that_fail_slowly_or_one_task_again_and_again_make_no_server_sick() -> None:
    failed = GraphOutcome(error=ErrorDetails(code="node_error", message="no"))
    refused = GraphOutcome(error=ErrorDetails(code="workflow_invalid", message="no"))
    health = ServerHealth(MemoryServer())
    for number in range(10):
        assert health.ran("the same task", "tenant", failed, 0.1) is None
        assert health.ran(f"slow {number}", "tenant", failed, 20.0) is None
        assert health.ran(f"refused {number}", "tenant", refused, 0.1) is None
    assert health.problem is None


def test_a_run_that_was_found_finished_does_not_show_how_fast_a_run_can_be() -> None:
    failed = GraphOutcome(error=ErrorDetails(code="node_error", message="no"))
    health = ServerHealth(MemoryServer())
    assert health.ran("task", "tenant", GraphOutcome(), 20.0) is None
    assert health.ran("task", "tenant", GraphOutcome(was_found=True), 0.01, is_whole=False) is None
    reasons = [health.ran(unique("task"), "tenant", failed, 10.0) for _ in range(QUICK_FAILURES)]
    assert reasons[-1] is not None
