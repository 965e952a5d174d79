"""Servers that fail in every known way, and what happens to the job that they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bridge.placement import prompt_id_of
from tests.bridge.native import NativeServer
from tests.bridge.platform import QUICK, BridgePlatform, Json

Servers = tuple[NativeServer, NativeServer]


async def until_running(bridge: BridgePlatform, native: NativeServer, runs_before: int = 0) -> str:
    """Wait until the server runs a prompt after `runs_before` others. Returns its id."""

    async def running() -> str | None:
        runs = await native.admin.runs()
        return runs[-1].prompt_id if len(runs) > runs_before and runs[-1].outcome == "running" else None

    # A worker in a process of its own takes a while to start.
    prompt_id = await bridge.until(running, seconds=60)
    assert prompt_id is not None
    return prompt_id


async def delivered(bridge: BridgePlatform, native: NativeServer, **traps: Any) -> Json:
    """Run one job on a server with these traps. It must be delivered after a single run."""
    await native.admin.set(**traps)
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit())["job_id"])
    assert state["error_details"] is None, state
    assert len(await native.admin.runs()) == 1
    return state


async def failed(bridge: BridgePlatform, native: NativeServer, **traps: Any) -> Json:
    """Run one job on a server with these traps. Returns its `error_details`."""
    await native.admin.set(**traps)
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit())["job_id"])
    details: Json = state["error_details"]
    assert details is not None
    assert state["result_urls"] == []
    return details


# Servers with odd behaviour


@pytest.mark.parametrize(
    "traps",
    [
        {"silent_websocket": True},
        {"websocket_refused": True},
        {"history_delay_seconds": 0.3},
        {"jobs_api": "none"},
        pytest.param({"node_errors_as_list": True}, marks=pytest.mark.slow),
        {"strict_prompt_ids": True},
        pytest.param({"previews": True}, marks=pytest.mark.slow),
        {"lose_prompt": {"after": 1}},
        {"lose_prompt": {"before": 1}},
        pytest.param({"lose_prompt": {"after": 1, "before": 1}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
async def test_on_an_odd_server_the_job_is_delivered_and_runs_once(
    bridge: BridgePlatform, native: NativeServer, traps: dict[str, Any]
) -> None:
    await delivered(bridge, native, **traps)


async def test_every_kind_of_file_is_a_result_and_temporary_ones_are_not(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    state = await delivered(bridge, native, extra_outputs=["temp", "gifs", "audio", "text", "subfolder"])
    paths = [url.split("?")[0].rpartition(f"/results/{state['job_id']}/")[2] for url in state["result_urls"]]
    assert len(paths) == len(set(paths)) == 5
    assert any("/" in path for path in paths), "a subfolder was lost"
    assert any(path.endswith(".txt") for path in paths)
    for url in state["result_urls"]:
        assert (await bridge.http.get(url)).status_code == 200


async def test_the_same_picture_twice_is_delivered_twice(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(empty_cached_outputs=True)
    async with bridge.gpu(native):
        for _ in range(2):
            state = await bridge.ended((await bridge.submit(extras={"seed": 5}))["job_id"])
            assert len(state["result_urls"]) == 1, state["error_details"]


async def test_no_request_has_an_origin_and_nothing_is_interrupted_without_an_id(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        await until_running(bridge, native)
        await bridge.cancel(accepted["job_id"])
    requests = await native.admin.requests()
    assert {request.origin for request in requests} == {None}
    assert {socket.origin for socket in await native.admin.sockets()} == {None}
    assert all(request.prompt_id for request in requests if request.path.endswith("/interrupt"))


# Runs that fail


@pytest.mark.parametrize(
    ("traps", "code", "text"),
    [
        ({"node_errors_on_200": True}, "workflow_invalid", "ComfyUI refused the graph"),
        ({"out_of_memory": 1}, "gpu_out_of_memory", "failed"),
        ({"fail_nodes": {"ImageInvert": "it is upside down"}}, "node_error", "it is upside down"),
    ],
    ids=str,
)
async def test_a_failure_on_the_server_ends_the_job_with_its_code_and_node(
    bridge: BridgePlatform, native: NativeServer, traps: dict[str, Any], code: str, text: str
) -> None:
    details = await failed(bridge, native, **traps)
    assert details["code"] == code
    assert text in details["message"]
    assert details["retryable"] is False
    assert details["node"]


# Servers that are lost


@pytest.mark.slow
async def test_a_restarted_server_runs_the_job_again_under_another_prompt_id(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native, patience=replace(QUICK, silent=30.0)):
        accepted = await bridge.submit()
        first = await until_running(bridge, native)
        await native.restart()
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None, state
    runs = await native.admin.runs()
    assert len(runs) == 1
    assert runs[0].prompt_id != first


async def test_a_job_in_an_emptied_queue_is_lost_and_runs_again(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        await until_running(bridge, native)
        await native.admin.forget()
        await native.admin.set(hold=False)
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None
    assert len(await native.admin.submissions()) == 2


@pytest.mark.parametrize(
    "failure",
    ["kill", *(pytest.param(failure, marks=pytest.mark.slow) for failure in ("freeze", "worker_dead", "stuck"))],
)
async def test_if_one_of_two_servers_fails_the_other_delivers(
    bridge: BridgePlatform, servers: Servers, failure: str
) -> None:
    first, second = servers
    await first.admin.set(hold=True)
    patience = replace(QUICK, stalled=2.0 if failure in ("worker_dead", "stuck") else QUICK.stalled)
    try:
        async with bridge.gpu(first, patience=patience) as failing:
            accepted = await bridge.submit()
            prompt_id = await until_running(bridge, first)
            async with bridge.gpu(second):
                if failure in ("kill", "freeze"):
                    await first.kill() if failure == "kill" else first.freeze()
                else:
                    await first.admin.set(**{failure: True})
                state = await bridge.ended(accepted["job_id"])
                assert await failing.slot.problem() is not None
        assert state["error_details"] is None, state
        assert [run.outcome for run in await second.admin.runs()] == ["success"]
        # The first server may still have the prompt. Its id stays the same in case the job returns there.
        is_withdrawn = failure == "worker_dead"
        expected = prompt_id_of(accepted["job_id"], 0, 2) if is_withdrawn else prompt_id
        assert [run.prompt_id for run in await second.admin.runs()] == [expected]
        statuses = bridge.receiver.statuses(accepted["task_id"])
        assert statuses == sorted(statuses, key=["queued", "processing", "delivery"].index)
    finally:
        await first.restart()


async def test_a_server_with_a_dead_thread_is_noticed_while_the_job_is_queued_there(
    bridge: BridgePlatform, servers: Servers
) -> None:
    first, second = servers
    await first.admin.set(worker_dead=True)
    async with bridge.gpu(first):
        accepted = await bridge.submit()
        await bridge.in_status(accepted["job_id"], "processing")
        async with bridge.gpu(second):
            state = await bridge.ended(accepted["job_id"])
            # The first server is drained: it does not get the next job either.
            another = await bridge.ended((await bridge.submit())["job_id"])
    assert state["error_details"] is another["error_details"] is None
    assert [run.prompt_id for run in await second.admin.runs()] == [
        prompt_id_of(accepted["job_id"], 0, 2),  # The first server withdrew the first one.
        prompt_id_of(another["job_id"], 0, 1),
    ]
    assert await first.admin.runs() == []


async def test_a_job_that_takes_three_servers_down_is_not_tried_again(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        for runs_before in range(3):
            await until_running(bridge, native, runs_before)
            await native.admin.forget()
        state = await bridge.ended(accepted["job_id"])
    assert (state["error_details"]["code"], state["error_details"]["retryable"]) == ("internal", False)
    assert "while they ran this job" in state["error_details"]["message"]
    assert len(await native.admin.runs()) == 3


async def test_a_busy_server_takes_nothing(bridge: BridgePlatform, servers: Servers) -> None:
    first, second = servers
    await first.admin.set(hold=True)
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "theirs"}},
    }
    await bridge.http.post(
        f"{first.url}/prompt", json={"prompt": graph, "prompt_id": "00000000-0000-4000-8000-000000000001"}
    )
    async with bridge.gpu(first), bridge.gpu(second):
        jobs = [await bridge.submit() for _ in range(3)]
        for job in jobs:
            assert (await bridge.ended(job["job_id"]))["error_details"] is None
    assert len(await first.admin.submissions()) == 1
    assert len(await second.admin.submissions()) == 3
