"""The codec server as a process: Temporal's protocol over HTTP, authentication, and Temporal's own command line."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from google.protobuf import json_format
from temporalio import workflow
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from codec_server import MAX_BODY_BYTES
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from comfyui_temporal.plugin import TasksPlugin
from local_stack.ports import any_free_port
from tests.conftest import temporal_binary, unique

PROJECT = Path(__file__).parents[1]
OLD, NEW = EncryptionKey("2030", b"o" * 32), EncryptionKey("2031", b"n" * 32)
KEYS = ",".join(f"{key.key_id}:{base64.b64encode(key.secret).decode()}" for key in (NEW, OLD))
TOKEN = "a token of these tests that is long enough"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
UI = "https://temporal.example"
MARK = "a lighthouse that only this prompt names"
PAYLOAD = Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(MARK).encode())
SETTINGS = {"ENCRYPTION_KEYS": KEYS, "CODEC_SERVER_TOKEN": TOKEN, "CODEC_SERVER_ORIGINS": UI}


async def process(settings: Mapping[str, str]) -> asyncio.subprocess.Process:
    environment = {f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "codec_server.py",
        cwd=PROJECT,
        env={"PATH": os.defpath, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


@asynccontextmanager
async def serving(settings: Mapping[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a codec server of its own. What the process wrote must hold no secret."""
    port = any_free_port()
    running = await process({**settings, "CODEC_SERVER_PORT": str(port), "LOG_LEVEL": "DEBUG"})
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        async with asyncio.timeout(30):
            while not await answers(client):  # noqa: ASYNC110 - a port has no event
                await asyncio.sleep(0.05)
        yield client
    running.terminate()
    written, _ = await running.communicate()
    assert b"codec_server_serves" in written and running.returncode == 0, written.decode()
    secrets = (TOKEN, MARK, base64.b64encode(TOKEN.encode()).decode(), *KEYS.replace(":", ",").split(",")[1::2])
    assert [secret for secret in secrets if secret.encode() in written] == []


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a codec server with the keys NEW and OLD."""
    async with serving(SETTINGS) as client:
        yield client


async def answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/healthz")).status_code == 200
    except httpx.TransportError:
        return False


def body(*payloads: Payload) -> dict[str, Any]:
    return json_format.MessageToDict(Payloads(payloads=payloads))


async def sent(server: httpx.AsyncClient, path: str, *payloads: Payload) -> list[Payload]:
    answer = await server.post(path, json=body(*payloads), headers={**AUTHORIZATION, "X-Namespace": "default"})
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store"), answer.text
    return list(json_format.Parse(answer.text, Payloads()).payloads)


async def test_it_decodes_every_key_and_leaves_the_rest_as_it_is(server: httpx.AsyncClient) -> None:
    [old] = await PayloadEncryption([OLD]).encode([PAYLOAD])
    [new] = await PayloadEncryption([NEW]).encode([Payload(metadata=PAYLOAD.metadata, data=b"2")])
    third = Payload(metadata=PAYLOAD.metadata, data=b"3")
    decoded = await sent(server, "/decode", new, old, third)
    assert [payload.data for payload in decoded] == [b"2", PAYLOAD.data, b"3"]


async def test_what_it_encodes_the_workers_read(server: httpx.AsyncClient) -> None:
    [encoded] = await sent(server, "/encode", PAYLOAD)
    assert encoded.metadata["encryption-key-id"] == b"2031" and MARK.encode() not in encoded.data
    assert await PayloadEncryption([NEW]).decode([encoded]) == [PAYLOAD]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic %%%"},
        {"Authorization": f"Basic {base64.b64encode(f'{TOKEN}:'.encode()).decode()}"},
        {"Authorization": "Bearer \u00e9"},
    ],
    ids=range(8),
)
async def test_without_the_token_nothing_is_decoded(server: httpx.AsyncClient, headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("POST", "/decode"), ("POST", "/encode"), ("GET", "/")):
        answer = await server.request(method, path, json=body(PAYLOAD), headers=raw)
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic ")


async def test_a_browser_sends_the_token_as_a_password(server: httpx.AsyncClient) -> None:
    answer = await server.post("/decode", json=body(PAYLOAD), auth=("any name", TOKEN))
    assert answer.status_code == 200
    assert "signed in" in (await server.get("/", auth=("", TOKEN))).text


async def test_only_the_uis_origin_may_read_answers_in_a_browser(server: httpx.AsyncClient) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-namespace"}
    for origin, allowed in ((UI, UI), ("https://elsewhere.example", None), ("null", None)):
        asking = await server.options("/decode", headers={"Origin": origin, **asked})
        assert (asking.status_code == 200) is (allowed is not None)
        answer = await server.post("/decode", json=body(PAYLOAD), headers={"Origin": origin, **AUTHORIZATION})
        for each in (asking, answer):
            assert each.headers.get("access-control-allow-origin") == allowed


async def test_bad_bodies_are_refused_with_a_sentence(server: httpx.AsyncClient) -> None:
    [foreign] = await PayloadEncryption([EncryptionKey("2029", b"x" * 32)]).encode([PAYLOAD])
    [forged] = await PayloadEncryption([EncryptionKey("2030", b"x" * 32)]).encode([PAYLOAD])
    for payload, code in ((foreign, "encryption_key_missing"), (forged, "payload_rejected")):
        answer = await server.post("/decode", json=body(PAYLOAD, payload), headers=AUTHORIZATION)
        assert (answer.status_code, answer.json()["code"]) == (400, code)
        assert payload.metadata["encryption-key-id"].decode() in answer.json()["message"]
        assert MARK not in answer.text
    for content in (b"", b"{", b'{"payloads": 1}', b'{"payloads": [{"data": 1}]}', b"\xff", b"[" * 100_000):
        answer = await server.post("/decode", content=content, headers=AUTHORIZATION)
        assert answer.status_code == 400 and "proto3 JSON" in answer.text, content[:20]
    assert (await server.get("/decode", headers=AUTHORIZATION)).status_code == 405
    assert (await server.post("/other", headers=AUTHORIZATION)).status_code == 404


async def test_a_body_is_bounded_and_the_largest_of_temporals_fits(server: httpx.AsyncClient) -> None:
    largest = Payload(metadata=PAYLOAD.metadata, data=b"x" * (4 * 1024 * 1024))
    [encrypted] = await sent(server, "/encode", largest)
    assert await sent(server, "/decode", encrypted) == [largest]
    answer = await server.post("/decode", content=b" " * (MAX_BODY_BYTES + 1), headers=AUTHORIZATION)
    assert answer.status_code == 413


@pytest.mark.parametrize("missing", ["ENCRYPTION_KEYS", "CODEC_SERVER_TOKEN"])
async def test_it_starts_with_keys_and_token_only(missing: str) -> None:
    ended = await process({name: value for name, value in SETTINGS.items() if name != missing})
    written, _ = await ended.communicate()
    assert (ended.returncode, f"COMFYUI_TEMPORAL_{missing}" in written.decode()) == (2, True)


@workflow.defn
class Echo:
    @workflow.run
    async def run(self, prompt: str) -> str:
        return f"drawn: {prompt}"


async def temporal(*arguments: str) -> str:
    """What the `temporal` command line prints."""
    ended = await asyncio.create_subprocess_exec(
        temporal_binary(), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    written, _ = await asyncio.wait_for(ended.communicate(), 30)
    assert ended.returncode == 0, written.decode()
    return written.decode()


async def test_temporals_command_line_starts_and_shows_encrypted_runs(
    server: httpx.AsyncClient, temporal_env: WorkflowEnvironment
) -> None:
    address = temporal_env.client.service_client.config.target_host
    client = await Client.connect(address, plugins=[TasksPlugin(PayloadEncryption([NEW]))])
    workflow_id, queue = unique("echo"), unique("queue")
    by_codec = ("--codec-endpoint", str(server.base_url), "--codec-auth", f"Bearer {TOKEN}")
    run = ("--address", address, "--workflow-id", workflow_id)
    order = ("--type", "Echo", "--task-queue", queue, "--input", json.dumps(MARK), "--static-summary", MARK)
    await temporal("workflow", "start", *run, *order, *by_codec)
    async with Worker(client, task_queue=queue, workflows=[Echo]):
        assert await client.get_workflow_handle(workflow_id).result() == f"drawn: {MARK}"
    assert MARK not in await temporal("workflow", "show", *run, "--output", "json")
    assert f"drawn: {MARK}" in await temporal("workflow", "show", *run, *by_codec)
