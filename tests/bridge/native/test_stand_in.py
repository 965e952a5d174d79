"""The stand-in behaves like ComfyUI's source, and each switch works."""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests.bridge.native import NativeServer
from tests.bridge.native.graphs import new_prompt_id, plain, sampled, training
from tests.waiting import until

Json = dict[str, Any]
LIMIT_SECONDS = 10.0


async def submit(http: httpx.AsyncClient, graph: Json, client_id: str | None = None, **more: Any) -> str:
    """Submit a graph. Returns the prompt id."""
    body = {"prompt": graph, "prompt_id": new_prompt_id()} | ({"client_id": client_id} if client_id else {}) | more
    answer = await http.post("/prompt", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


async def ended(http: httpx.AsyncClient, prompt_id: str) -> Json:
    async def look() -> Any:
        return (await http.get(f"/history/{prompt_id}")).json().get(prompt_id)

    entry: Json = await until(look, "the history entry")
    return entry


async def running(http: httpx.AsyncClient, prompt_id: str) -> None:
    async def look() -> bool:
        return prompt_id in [item[1] for item in (await http.get("/queue")).json()["queue_running"]]

    await until(look, "the prompt running")


@asynccontextmanager
async def socket(native: NativeServer, client_id: str) -> AsyncIterator[ClientConnection]:
    address = f"{native.url.replace('http', 'ws')}/ws?clientId={client_id}"
    async with connect(address, origin=None) as opened:
        await opened.recv()
        yield opened


async def received(socket: ClientConnection, last: str = "execution_success") -> list[Json]:
    """All messages up to the first of this type."""
    messages: list[Json] = []
    async with asyncio.timeout(LIMIT_SECONDS):
        while not messages or messages[-1]["type"] != last:
            messages.append(json.loads(await socket.recv()))
    return messages


async def receives_nothing(socket: ClientConnection) -> bool:
    """Whether no message arrives. A ping first waits for everything that was sent before."""
    await (await socket.ping())
    try:
        async with asyncio.timeout(0.05):
            await socket.recv()
    except TimeoutError:
        return True
    return False


async def test_a_prompt_makes_a_real_picture_of_the_requested_size(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    entry = await ended(http, await submit(http, plain(width=96, height=32, prefix="sub/folder/p"), "me"))
    [file] = entry["outputs"]["2"]["images"]
    assert (file["subfolder"], file["type"]) == ("sub/folder", "output")
    assert entry["status"]["status_str"] == "success" and entry["status"]["completed"] is True
    for prefix in ("", "/api"):
        answer = await http.get(f"{prefix}/view", params=file)
        with Image.open(BytesIO(answer.content)) as picture:
            assert (picture.format, picture.size) == ("PNG", (96, 32))


async def test_the_messages_of_a_run_arrive_in_order(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(models={"checkpoints": ["sd.safetensors"]})
    async with socket(native, "me") as ws:
        prompt_id = await submit(http, sampled(steps=3), "me")
        messages = await received(ws)
    types = [message["type"] for message in messages if message["type"] not in {"status", "progress_state"}]
    assert types[:2] == ["execution_start", "execution_cached"]
    assert types[-2:] == ["executed", "execution_success"]
    steps = [message["data"] for message in messages if message["type"] == "progress"]
    assert [(step["value"], step["max"], step["node"]) for step in steps] == [(1, 3, "5"), (2, 3, "5"), (3, 3, "5")]
    assert all(message["data"]["prompt_id"] == prompt_id for message in messages if message["type"] != "status")
    state = next(message for message in messages if message["type"] == "progress_state")
    assert len(state["data"]["nodes"]) == 1, "pending nodes are left out"


async def test_events_go_only_to_the_submitting_client_or_without_one_to_all(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    async with socket(native, "me") as mine, socket(native, "other") as others:
        await submit(http, plain(1), "me")
        await received(mine)
        await submit(http, plain(2))
        received_by_others = await received(others, "progress_state")
        assert {message["type"] for message in received_by_others} == {"status", "progress_state"}


async def test_a_reconnected_socket_stops_receiving_when_the_old_one_closes(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    async with socket(native, "me") as old, socket(native, "me") as new:
        await old.close()
        entry = await ended(http, await submit(http, plain(3), "me"))
        assert entry["status"]["completed"] is True
        assert await receives_nothing(new)


async def test_a_duplicate_prompt_id_runs_twice(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    prompt_id = await submit(http, plain(4))
    await submit(http, plain(5), prompt_id=prompt_id)
    await native.admin.set(hold=False)

    async def both() -> bool:
        return await native.admin.runs_of(prompt_id) == 2

    await until(both, "the second run")


async def test_pending_prompts_are_a_heap(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    await running(http, await submit(http, plain(6)))
    for number in (9.0, 7.0, 8.0, 1.0, 5.0, 2.0):
        await submit(http, plain(7), number=number)
    pending = [item[0] for item in (await http.get("/queue")).json()["queue_pending"]]
    assert pending != sorted(pending) and pending[0] == min(pending)
    assert heapq.nsmallest(6, pending) == [1.0, 2.0, 5.0, 7.0, 8.0, 9.0]


async def test_a_cancelled_pending_prompt_leaves_no_trace_and_a_running_one_is_interrupted(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    await native.admin.set(hold=True, jobs_api="cancel")
    first, second = await submit(http, plain(8), "me"), await submit(http, plain(9), "me")
    await running(http, first)
    assert (await http.post(f"/api/jobs/{second}/cancel")).json() == {"cancelled": True}
    assert (await http.get(f"/api/jobs/{second}")).status_code == 404
    assert (await http.post(f"/api/jobs/{second}/cancel")).json() == {"cancelled": False}
    await http.post("/interrupt", json={"prompt_id": second})
    assert (await http.get(f"/api/jobs/{first}")).json()["status"] == "in_progress"
    await http.post("/interrupt", json={"prompt_id": first})
    entry = await ended(http, first)
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert (await http.get(f"/api/jobs/{first}")).json()["status"] == "failed"


async def test_a_late_interrupt_hits_the_next_prompt(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(hold=True, interrupt_delay_seconds=0.2, models={"checkpoints": ["sd.safetensors"]})
    first, second = await submit(http, plain(10)), await submit(http, sampled(steps=2000))
    await running(http, first)
    late = asyncio.create_task(http.post("/interrupt", json={"prompt_id": first}))
    await until(lambda: was_requested(native, "/interrupt"), "the request")
    await native.admin.set(hold=False)
    assert (await ended(http, first))["status"]["completed"] is True
    await late
    assert (await ended(http, second))["status"]["messages"][-1][0] == "execution_interrupted"


async def was_requested(native: NativeServer, path: str) -> bool:
    return any(request.path == path for request in await native.admin.requests())


async def test_refusals_name_node_and_input(http: httpx.AsyncClient, native: NativeServer) -> None:
    answer = await http.post("/prompt", json={"prompt": sampled("none.safetensors")})
    assert answer.status_code == 400
    data = answer.json()
    assert data["error"]["type"] == "prompt_outputs_failed_validation"
    [error] = data["node_errors"]["1"]["errors"]
    assert (error["type"], error["extra_info"]["input_name"]) == ("value_not_in_list", "ckpt_name")
    assert data["node_errors"]["1"]["dependent_outputs"] == ["7"]

    for graph, kind in (
        ({}, "prompt_no_outputs"),
        ({"1": {"inputs": {}}}, "invalid_prompt"),
        ({"1": {"class_type": "Unheard", "inputs": {}}}, "invalid_prompt"),
        (plain(width=0), "prompt_outputs_failed_validation"),
    ):
        answer = await http.post("/prompt", json={"prompt": graph})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, kind)
    assert (await http.post("/prompt", json={})).json()["error"]["type"] == "no_prompt"
    assert await native.admin.submissions() == []


async def test_a_half_valid_graph_is_queued_with_node_errors_on_200(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    graph = plain(12) | {"3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    answer = await http.post("/prompt", json={"prompt": graph})
    assert answer.status_code == 200
    assert answer.json()["node_errors"]["3"]["errors"][0]["type"] == "required_input_missing"
    await native.admin.set(node_errors_on_200=True)
    assert (await http.post("/prompt", json={"prompt": plain(13)})).json()["node_errors"]
    await native.admin.set(node_errors_on_200=False, node_errors_as_list=True)
    assert (await http.post("/prompt", json={"prompt": plain(14)})).json()["node_errors"] == []


@pytest.mark.parametrize(("when", "submitted"), [("before", 0), ("after", 1)])
async def test_an_answer_is_lost_before_or_after_the_submit(
    http: httpx.AsyncClient, native: NativeServer, when: str, submitted: int
) -> None:
    await native.admin.set(lose_prompt={when: 1})
    with pytest.raises(httpx.TransportError):
        await submit(http, plain(15))
    assert len(await native.admin.submissions()) == submitted
    await submit(http, plain(15))


async def test_a_cached_rerun_may_have_empty_outputs(http: httpx.AsyncClient, native: NativeServer) -> None:
    await ended(http, await submit(http, plain(16), "me"))
    again = await submit(http, plain(16), "me")
    assert (await ended(http, again))["outputs"]["2"]["images"]
    assert [run.nodes for run in await native.admin.runs()] == [["1", "2"], []]
    assert (await ended(http, await submit(http, plain(16))))["outputs"] == {}, "without a client id"
    await native.admin.set(empty_cached_outputs=True)
    assert (await ended(http, await submit(http, plain(16), "me")))["outputs"] == {}


async def test_every_kind_of_output(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(extra_outputs=["temp", "gifs", "audio", "text", "subfolder"])
    outputs = (await ended(http, await submit(http, plain(17), "me")))["outputs"]["2"]
    assert {file["type"] for file in outputs["images"]} == {"output", "temp"}
    assert {file["subfolder"] for file in outputs["images"]} == {"", "deep/er"}
    assert outputs["text"] == ["a text"]
    for file in (*outputs["images"], *outputs["gifs"], *outputs["audio"]):
        shown = {name: file[name] for name in ("filename", "subfolder", "type")}
        assert (await http.get("/view", params=shown)).status_code == 200


async def test_out_of_memory_and_failing_nodes(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(out_of_memory=1, fail_nodes={"EmptyImage": "boom"})
    entry = await ended(http, await submit(http, plain(18), "me"))
    name, data = entry["status"]["messages"][-1]
    assert (name, data["node_id"], data["node_type"]) == ("execution_error", "1", "EmptyImage")
    assert "boom" in data["exception_message"]
    await native.admin.set(fail_nodes={})
    data = (await ended(http, await submit(http, plain(18), "me")))["status"]["messages"][-1][1]
    assert (data["node_id"], data["exception_type"]) == ("2", "torch.OutOfMemoryError")
    assert (await ended(http, await submit(http, plain(18), "me")))["status"]["completed"] is True


async def test_a_dead_worker_answers_but_runs_nothing(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(worker_dead=True)
    prompt_id = await submit(http, plain(19))
    queue = (await http.get("/queue")).json()
    assert ([item[1] for item in queue["queue_pending"]], queue["queue_running"]) == ([prompt_id], [])
    assert await native.admin.runs() == []


async def test_a_silent_socket_and_hanging_requests(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(silent_websocket=True)
    address = f"{native.url.replace('http', 'ws')}/ws?clientId=me"
    async with connect(address) as ws:
        await ended(http, await submit(http, plain(20), "me"))
        assert await receives_nothing(ws)
    await native.admin.set(hang=True)
    waiting = asyncio.create_task(http.get("/queue"))
    await until(lambda: was_requested(native, "/queue"), "the request")
    assert not waiting.done()
    await native.admin.set(hang=False)
    assert (await waiting).status_code == 200


async def test_uploads_of_other_bytes_are_renamed_and_large_ones_refused(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    async def upload(content: bytes, **fields: str) -> httpx.Response:
        return await http.post("/upload/image", files={"image": ("a.png", content, "image/png")}, data=fields)

    assert (await upload(b"one", subfolder="s")).json() == {"name": "a.png", "subfolder": "s", "type": "input"}
    assert (await upload(b"one", subfolder="s")).json()["name"] == "a.png"
    assert (await upload(b"two", subfolder="s")).json()["name"] == "a (1).png"
    assert (await upload(b"two", subfolder="s", overwrite="true")).json()["name"] == "a.png"
    assert (await upload(b"out", subfolder="../..")).status_code == 400
    await native.admin.set(max_upload_bytes=10)
    assert (await upload(b"too much")).status_code == 413


async def test_older_servers_have_no_jobs_api(http: httpx.AsyncClient, native: NativeServer) -> None:
    prompt_id = await submit(http, plain(21), "me")
    await ended(http, prompt_id)
    job = (await http.get(f"/api/jobs/{prompt_id}")).json()
    assert (job["status"], job["outputs_count"]) == ("completed", 1)
    assert (await http.post(f"/api/jobs/{prompt_id}/cancel")).status_code == 405
    await native.admin.set(jobs_api="none")
    for path in ("/api/jobs", f"/api/jobs/{prompt_id}"):
        assert (await http.get(path)).status_code == 404


async def test_an_old_server_ignores_the_prompt_id_of_an_interrupt(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    await native.admin.set(hold=True, targeted_interrupt=False)
    prompt_id = await submit(http, plain(24))
    await running(http, prompt_id)
    await http.post("/interrupt", json={"prompt_id": new_prompt_id()})
    assert (await ended(http, prompt_id))["status"]["messages"][-1][0] == "execution_interrupted"


async def test_a_stuck_prompt_ignores_interrupts(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(stuck=True)
    prompt_id = await submit(http, plain(25))
    await running(http, prompt_id)
    await http.post("/interrupt", json={"prompt_id": prompt_id})
    await running(http, prompt_id)
    await native.admin.set(stuck=False)
    assert (await ended(http, prompt_id))["status"]["status_str"] == "error", (
        "the interrupt works once it is no longer stuck"
    )


async def test_strict_ids_broken_routes_and_refused_sockets(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(strict_prompt_ids=True, broken_routes={"/history/*": 502}, websocket_refused=True)
    answer = await http.post("/prompt", json={"prompt": plain(26), "prompt_id": "NOT-A-UUID"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_prompt_id")
    assert (await http.get("/history/x")).status_code == 502
    assert (await http.get("/history")).status_code == 200
    with pytest.raises(InvalidStatus):
        await connect(f"{native.url.replace('http', 'ws')}/ws?clientId=me")


async def test_previews_are_binary_with_metadata_only_on_request(http: httpx.AsyncClient, native: NativeServer) -> None:
    await native.admin.set(previews=True, models={"checkpoints": ["sd.safetensors"]})
    kinds: list[int] = []
    for client_id, flags in (("plain", None), ("rich", {"supports_preview_metadata": True})):
        async with socket(native, client_id) as ws:
            if flags:
                await ws.send(json.dumps({"type": "feature_flags", "data": flags}))
            await submit(http, sampled(seed=len(kinds) + 5, steps=1), client_id)
            async with asyncio.timeout(LIMIT_SECONDS):
                while isinstance(message := await ws.recv(), str):
                    continue
            kinds.append(int.from_bytes(message[:4], "big"))
            assert b"\x89PNG" in message
    assert kinds == [1, 4]


async def test_another_origin_is_refused(http: httpx.AsyncClient, native: NativeServer) -> None:
    assert (await http.get("/queue", headers={"origin": "http://elsewhere"})).status_code == 403
    assert (await native.admin.requests())[-1].origin == "http://elsewhere"


async def test_trained_loras_are_saved_by_name_and_can_be_trained_further(
    http: httpx.AsyncClient, native: NativeServer
) -> None:
    await native.admin.set(models={"checkpoints": ["sd.safetensors"]})
    picture = (native.folder / "input" / "cats" / "1.png", native.folder / "input" / "cats" / "1.txt")
    picture[0].parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(picture[0])
    entry = await ended(http, await submit(http, training("[None]", 4), "me"))
    assert entry["outputs"] == {}, "SaveLoRA lists no outputs"
    logged = [entry["m"] for entry in (await http.get("/internal/logs/raw")).json()["entries"]]
    assert [line for line in logged if "loss=" in line][-1].startswith("\rTraining LoRA: 100%|###| 4/4")
    loras = (await http.get("/models/loras")).json()
    [first] = [name for name in loras if name.startswith("mine_4_steps_")]
    entry = await ended(http, await submit(http, training(first, 4), "me"))
    assert entry["status"]["completed"] is True
    assert any(name.startswith("mine_8_steps_") for name in (await http.get("/models/loras")).json())


async def test_a_restart_empties_queue_and_keeps_files(http: httpx.AsyncClient, native: NativeServer) -> None:
    done = await submit(http, plain(22, prefix="kept"), "me")
    [file] = (await ended(http, done))["outputs"]["2"]["images"]
    await native.admin.set(hold=True)
    await submit(http, plain(23))
    native.freeze()
    with pytest.raises(httpx.TimeoutException):
        await http.get("/queue", timeout=0.2)
    native.thaw()
    await native.restart()
    assert (await http.get("/queue")).json() == {"queue_running": [], "queue_pending": []}
    assert (await http.get("/history")).json() == {}
    assert (await http.get("/view", params=file)).status_code == 200
