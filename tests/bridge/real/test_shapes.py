"""The same requests to the stand-in and the real server: answers and messages must have the same shape."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

from tests.bridge.native.graphs import new_prompt_id, plain, training

Json = dict[str, Any]
Exchange = Callable[[httpx.AsyncClient], Awaitable[Any]]
LIMIT_SECONDS = 110.0
FIRST_BLUR = "3"
"""The first of eight nodes that each take a while."""


def shape(value: Any, names: dict[str, str]) -> Any:
    """Keys and types without values. `names` replaces keys and texts that always differ, such as a prompt id."""
    if isinstance(value, dict):
        return {names.get(key, key): shape(item, names) for key, item in sorted(value.items()) if key != "tooltip"}
    if isinstance(value, list):
        return [shape(item, names) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    # A whole number may be written either way in Python and in JSON.
    return "number" if isinstance(value, int | float) else names.get(value, "text")


def color() -> int:
    """A colour that was not drawn before, so that the cache does not answer."""
    return time.time_ns() % 0x1000000


async def ended(http: httpx.AsyncClient, prompt_id: str) -> Json:
    ends = time.monotonic() + LIMIT_SECONDS
    while not (entry := (await http.get(f"/history/{prompt_id}")).json().get(prompt_id)):
        assert time.monotonic() < ends, "the prompt did not end"
        await asyncio.sleep(0.05)
    found: Json = entry
    return found


async def submitted(http: httpx.AsyncClient, graph: Json, **more: Any) -> tuple[httpx.Response, str]:
    prompt_id = new_prompt_id()
    answer = await http.post("/prompt", json={"prompt": graph, "prompt_id": prompt_id, "client_id": "shapes"} | more)
    return answer, prompt_id


async def submit_and_history(http: httpx.AsyncClient) -> Any:
    answer, prompt_id = await submitted(http, plain(color(), prefix="conformance/p"))
    entry = await ended(http, prompt_id)
    return shape([answer.status_code, answer.json(), entry], {prompt_id: "<prompt>"})


async def a_cached_rerun(http: httpx.AsyncClient) -> Any:
    graph = plain(color(), prefix="conformance/p")
    await ended(http, (await submitted(http, graph))[1])
    prompt_id = (await submitted(http, graph))[1]
    return shape(await ended(http, prompt_id), {prompt_id: "<prompt>"})


async def a_cached_rerun_without_client_id(http: httpx.AsyncClient) -> Any:
    graph = plain(color(), prefix="conformance/p")
    await ended(http, (await submitted(http, graph))[1])
    prompt_id = new_prompt_id()
    await http.post("/prompt", json={"prompt": graph, "prompt_id": prompt_id})
    return (await ended(http, prompt_id))["outputs"]


async def refusals(http: httpx.AsyncClient) -> Any:
    bad = plain(color()) | {"3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    linked = {"1": plain()["1"], "2": {"class_type": "SaveImage", "inputs": {"images": ["1"], "filename_prefix": "x"}}}
    mismatched = plain() | {
        "1": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}},
    }
    scaled = {"upscale_method": "magic", "width": 8, "height": 8, "crop": "disabled", "image": ["1", 0]}
    unlisted = plain() | {
        "3": {"class_type": "ImageScale", "inputs": scaled},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
    }
    no_picture = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "no-such.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    model = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no-such.safetensors"}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }
    typed = plain(width="wide")  # type: ignore[arg-type]
    graphs: list[Json] = [{}, {"1": {"inputs": {}}}, {"1": {"class_type": "Unheard", "inputs": {}}}, plain(width=0)]
    graphs += [plain(width=99999), bad, linked, mismatched, unlisted, no_picture, model, typed]
    found = []
    for graph in graphs:
        answer, prompt_id = await submitted(http, graph)
        body = answer.json()
        found.append([answer.status_code, _refusal(body), shape(body, {prompt_id: "<prompt>"})])
    answer = await http.post("/prompt", json={})
    return [*found, answer.status_code, answer.json()]


def _refusal(body: Json) -> Any:
    """The fields that decide what a refusal means."""
    errors = {
        node: [(error["type"], error["extra_info"].get("input_name")) for error in found["errors"]]
        for node, found in (body.get("node_errors") or {}).items()
    }
    return [body.get("error", {}).get("type"), errors]


async def jobs_of_a_run(http: httpx.AsyncClient) -> Any:
    prompt_id = (await submitted(http, plain(color(), prefix="conformance/p")))[1]
    await ended(http, prompt_id)
    one = await http.get(f"/api/jobs/{prompt_id}")
    many = await http.get("/api/jobs", params={"limit": 1})
    unknown = await http.get("/api/jobs/unknown")
    cancel = await http.post(f"/api/jobs/{prompt_id}/cancel")
    bad = await http.get("/api/jobs", params={"status": "sleeping"})
    whole = many.json()
    # The number of jobs depends on the server's history.
    whole["pagination"].pop("has_more")
    answers = [(answer.status_code, whole if answer is many else answer.json()) for answer in (one, many, unknown, bad)]
    return [shape(json.loads(json.dumps(answers)), {prompt_id: "<prompt>"}), cancel.status_code]


async def the_messages_of_a_run(http: httpx.AsyncClient) -> Any:
    client_id = new_prompt_id()
    messages: list[Json] = []
    async with connect(socket_address(http, client_id), origin=None) as ws:
        graph = plain(color(), prefix="conformance/p")
        _, prompt_id = await submitted(http, graph, client_id=client_id)
        async with asyncio.timeout(LIMIT_SECONDS):
            while not messages or messages[-1]["data"].get("node", "") is not None:
                messages.append(json.loads(await ws.recv()))
    names = {prompt_id: "<prompt>", client_id: "<client>"}
    events = [message for message in messages if message["type"] != "status"]
    return [[message["type"], shape(message["data"], names)] for message in events]


async def the_status_message(http: httpx.AsyncClient) -> Any:
    address = f"{str(http.base_url).rstrip('/').replace('http', 'ws', 1)}/ws?clientId=status"
    async with connect(address, origin=None) as ws:
        first = json.loads(await ws.recv())
        await ws.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        second = json.loads(await ws.recv())
    return [first["type"], shape(first["data"], {}), second]


async def a_reconnected_socket(http: httpx.AsyncClient) -> Any:
    """Two sockets under one client id: what the newer one still receives after the older one closes."""
    client_id = new_prompt_id()
    address = socket_address(http, client_id)
    async with connect(address, origin=None) as old, connect(address, origin=None) as new:
        for ws in (old, new):
            await ws.recv()
        await old.close()
        # Both servers take a moment to notice that it is closed.
        await asyncio.sleep(0.5)
        _, prompt_id = await submitted(http, plain(color(), prefix="conformance/p"), client_id=client_id)
        await ended(http, prompt_id)
        return await kinds_received(new)


async def another_client_listens(http: httpx.AsyncClient) -> Any:
    """What a socket receives about a prompt of another client id, and of one without a client id."""
    async with connect(socket_address(http, new_prompt_id()), origin=None) as ws:
        await ws.recv()
        await ended(http, (await submitted(http, plain(color(), prefix="conformance/p")))[1])
        of_another = await kinds_received(ws)
        prompt_id = new_prompt_id()
        graph = plain(color(), prefix="conformance/p")
        await http.post("/prompt", json={"prompt": graph, "prompt_id": prompt_id})
        await ended(http, prompt_id)
        return [of_another, await kinds_received(ws)]


async def a_prompt_id_that_is_sent_twice(http: httpx.AsyncClient) -> Any:
    """It is queued and runs again."""
    prompt_id = new_prompt_id()
    name = f"conformance/{prompt_id}"
    for _ in range(2):
        body = {"prompt": plain(color(), prefix=name), "prompt_id": prompt_id, "client_id": "shapes"}
        answer = await http.post("/prompt", json=body)
        assert answer.status_code == 200
    ends = time.monotonic() + LIMIT_SECONDS
    second = {"filename": f"{prompt_id}_00002_.png", "subfolder": "conformance"}
    while (found := await http.get("/view", params=second)).status_code != 200:
        assert time.monotonic() < ends, "it ran once"
        await asyncio.sleep(0.1)
    return found.status_code


async def an_interrupted_prompt(http: httpx.AsyncClient) -> Any:
    """A prompt deleted while pending leaves no trace. One interrupted while running ends with an error."""
    client_id, graph = new_prompt_id(), blurred()
    async with connect(socket_address(http, client_id), origin=None) as ws:
        _, running_id = await submitted(http, graph, client_id=client_id)
        _, pending_id = await submitted(http, plain(color(), prefix="conformance/p"))
        # Nodes take different times on the two servers: both are interrupted in the row of blurs, at its beginning.
        await until_executing(ws, FIRST_BLUR)
        queue = (await http.get("/queue")).json()
        shapes = [shape(item, {running_id: "<running>", pending_id: "<pending>"}) for item in queue["queue_pending"]]
        await http.post("/queue", json={"delete": [pending_id]})
        await http.post("/interrupt", json={"prompt_id": running_id})
        entry = await ended(http, running_id)
    name, found = entry["status"]["messages"][-1]
    gone = (await http.get(f"/api/jobs/{pending_id}")).status_code
    is_named = graph[found["node_id"]]["class_type"] == found["node_type"]
    has_run = "1" in found["executed"] and found["node_id"] not in found["executed"]
    status = [entry["status"]["status_str"], entry["status"]["completed"], entry["outputs"]]
    return [shapes, status, name, sorted(found), found["node_type"], is_named, has_run, gone]


async def until_executing(ws: ClientConnection, node: str) -> None:
    """Wait until the server begins this node."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while True:
            message = await ws.recv()
            found: Json = json.loads(message) if isinstance(message, str) else {"type": "preview"}
            if found["type"] == "executing" and found["data"]["node"] == node:
                return


def blurred() -> Json:
    """Some seconds of work on a CPU."""
    graph = plain(color(), width=512, height=512, prefix="conformance/p")
    above = "1"
    for number in range(int(FIRST_BLUR), 11):
        inputs = {"image": [above, 0], "blur_radius": 31, "sigma": 10.0}
        above = str(number)
        graph[above] = {"class_type": "ImageBlur", "inputs": inputs}
    graph["2"]["inputs"]["images"] = [above, 0]
    return graph


def socket_address(http: httpx.AsyncClient, client_id: str) -> str:
    return f"{str(http.base_url).rstrip('/').replace('http', 'ws', 1)}/ws?clientId={client_id}"


async def kinds_received(ws: ClientConnection) -> list[str]:
    """The types of messages that arrived, without `status`, which goes to everyone."""
    kinds: set[str] = set()
    while True:
        try:
            async with asyncio.timeout(1.0):
                kinds.add(json.loads(await ws.recv())["type"])
        except TimeoutError:
            return sorted(kinds - {"status"})


async def a_failing_node(http: httpx.AsyncClient) -> Any:
    """Saving outside the output folder fails while it runs."""
    _, prompt_id = await submitted(http, plain(color(), prefix="../../outside"))
    entry = await ended(http, prompt_id)
    found = dict(entry["status"]["messages"])["execution_error"]
    whole = [entry["status"]["status_str"], entry["status"]["completed"], sorted(entry["outputs"]), sorted(found)]
    return [whole, found["node_id"], found["node_type"]]


async def uploads_and_views(http: httpx.AsyncClient) -> Any:
    name = f"{new_prompt_id()}.png"
    found: list[Any] = []
    for tint in (1, 1, 2):
        with BytesIO() as file:
            Image.new("RGB", (8, 8), (tint, 0, 0)).save(file, "PNG")
            files = {"image": (name, file.getvalue(), "image/png")}
        answer = await http.post("/upload/image", files=files, data={"subfolder": "conformance"})
        found.append([answer.status_code, shape(answer.json(), {name: "<name>"})])
    view = await http.get("/view", params={"filename": name, "subfolder": "conformance", "type": "input"})
    found.append([view.status_code, view.headers["content-type"], len(view.content) > 0])
    for query in ({}, {"filename": "no-such.png"}, {"filename": "../x.png"}, {"filename": "x", "type": "no-such"}):
        found.append((await http.get("/view", params=query)).status_code)
    outside = await http.get("/view", params={"filename": "x.png", "subfolder": "../.."})
    return [*found, outside.status_code]


async def reads(http: httpx.AsyncClient) -> Any:
    found: list[Any] = []
    for path in (
        "/queue",
        "/prompt",
        "/features",
        "/history/unknown",
        "/object_info/Unheard",
        "/models/no-such-folder",
    ):
        for prefix in ("", "/api"):
            answer = await http.get(prefix + path)
            found.append([path, answer.status_code, answer.json() if answer.status_code == 200 else None])
    stats = (await http.get("/system_stats")).json()
    return [found, sorted(stats), sorted(stats["system"]), sorted(stats["devices"][0])]


async def what_answers_without_a_body(http: httpx.AsyncClient) -> Any:
    found = []
    for path, body in (
        ("/interrupt", {"prompt_id": "unknown"}),
        ("/queue", {"delete": ["unknown"]}),
        ("/history", {"delete": ["unknown"]}),
    ):
        answer = await http.post(path, json=body)
        found.append([path, answer.status_code, answer.content])
    answer = await http.get("/queue", headers={"origin": "http://elsewhere.example"})
    return [*found, answer.status_code]


async def the_same_nodes(http: httpx.AsyncClient) -> Any:
    """Inputs and outputs of the node classes that the shipped templates may use."""
    info = (await http.get("/object_info")).json()
    return {
        name: [_kinds(info[name]["input"]), info[name]["output"], info[name]["output_node"]]
        for name in ("EmptyImage", "SaveImage", "LoadImage", "ImageScale", "KSampler", "TrainLoraNode", "SaveLoRA")
    }


def _kinds(inputs: Json) -> Json:
    return {
        group: {name: "choices" if isinstance(given[0], list) else given[0] for name, given in named.items()}
        for group, named in inputs.items()
        if group != "hidden"
    }


async def a_training_in_two_chunks(http: httpx.AsyncClient) -> Any:
    """What is saved, sent and logged. The second chunk continues from the first one's LoRA."""
    name = f"t{time.time_ns()}"
    for file, content in (("1.png", png(64)), ("1.txt", b"a cat")):
        files = {"image": (file, content, "application/octet-stream")}
        assert (await http.post("/upload/image", files=files, data={"subfolder": name})).status_code == 200
    found: list[Any] = []
    existing = "[None]"
    for _ in range(2):
        graph = training(existing, 2, folder=name, checkpoint=TINY, prefix=f"loras/{name}")
        graph["7"] = {"class_type": "LossGraphNode", "inputs": {"loss": ["5", 2], "filename_prefix": "loss"}}
        answer, prompt_id = await submitted(http, graph)
        assert answer.status_code == 200, answer.text
        entry = await ended(http, prompt_id)
        assert entry["status"]["completed"], entry["status"]
        saved = [lora for lora in (await http.get("/models/loras")).json() if lora.startswith(name)]
        existing = max(saved, key=lambda lora: int(lora.split("_steps_")[0].rsplit("_", maxsplit=1)[-1]))
        view = await http.get("/view", params={"filename": existing, "subfolder": "loras", "type": "output"})
        found += [shape(entry["outputs"], {}), existing.replace(name, "<name>"), view.status_code]
    entries = (await http.get("/internal/logs/raw")).json()["entries"]
    last = [entry["m"] for entry in entries if "loss=" in entry["m"]][-1]
    return [*found, re.sub(r"\|.*\| ", "|<bar>| ", last.split("[")[0]), re.sub(r"[\d.]+\]", "<loss>]", last)[-14:]]


def png(side: int) -> bytes:
    with BytesIO() as file:
        Image.new("RGB", (side, side), (200, 40, 40)).save(file, "PNG")
        return file.getvalue()


EXCHANGES: list[Exchange] = [
    submit_and_history,
    a_cached_rerun,
    a_cached_rerun_without_client_id,
    refusals,
    jobs_of_a_run,
    the_messages_of_a_run,
    the_status_message,
    a_reconnected_socket,
    another_client_listens,
    a_prompt_id_that_is_sent_twice,
    an_interrupted_prompt,
    a_failing_node,
    uploads_and_views,
    reads,
    what_answers_without_a_body,
    the_same_nodes,
]
TINY = "tiny.safetensors"
"""Made by `tiny_checkpoint.py`."""


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.__name__)
async def test_both_give_the_same_answers(
    real: httpx.AsyncClient, stand_in: httpx.AsyncClient, exchange: Exchange
) -> None:
    assert await exchange(stand_in) == await exchange(real)


@pytest.mark.timeout(300)
async def test_both_train_the_same_way(real: httpx.AsyncClient, stand_in: httpx.AsyncClient) -> None:
    if TINY not in (await real.get("/models/checkpoints")).json():
        pytest.skip(f"this server has no {TINY}; tests/bridge/real/tiny_checkpoint.py makes it")
    assert await a_training_in_two_chunks(stand_in) == await a_training_in_two_chunks(real)
