"""A local stack, a bridge and a GPU worker as processes; every secret is marked, and the logs say all that they can."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from standardwebhooks import Webhook
from temporalio.client import Client
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.plugin import TasksPlugin
from local_stack.background import end_stack, start_stack
from local_stack.description import ACCOUNTS
from local_stack.folder import PROJECT, RunFolder, Secrets
from local_stack.ports import any_free_port
from tests.bridge.native import NativeServer
from tests.conftest import unique
from tests.doors.doors import DOORS, PLACES, TENANT, Door, Token, all_tokens, sent_with
from tests.local_stack.folders import new_run_folder

MARK: Final = "marked0secret"
SPEED: Final = 400.0
PREFIX: Final = "COMFYUI_TEMPORAL_"
SIDE_BY_SIDE: Final = 8
LONGEST_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    head: str
    body: str


@dataclass
class WholeStack:
    folder: RunFolder
    stack: StackDescription
    secrets: Secrets
    bridge_url: str
    metrics_url: str
    client: Client
    http: httpx.AsyncClient
    tokens: dict[str, Token] = field(default_factory=dict)
    answers: dict[tuple[str, str, str], Answer] = field(default_factory=dict)
    """By door, token and place."""
    signatures: list[str] = field(default_factory=list)
    """Of every callback that was sent from here."""

    def url_of(self, party: str) -> str:
        named = {"bridge": self.bridge_url, "gateway": self.stack.gateway_url, "comfyui": self.stack.comfyui_url}
        return named.get(party, self.stack.credits_url)

    def signed(self, raw: bytes, secret: str) -> dict[str, str]:
        """The headers of a callback with this body."""
        webhook_id, at = unique("msg"), datetime.now(UTC)
        signature = Webhook(secret).sign(webhook_id, at, raw.decode())
        self.signatures.append(signature)
        return {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signature,
        }

    async def try_every_token_at_every_door(self) -> None:
        config = await self.http.get(
            f"{self.stack.gateway_url}/api/v1/tasks/stream/config",
            headers={"authorization": f"Bearer {self.stack.tokens[TENANT]}"},
        )
        signature = self.signed(b"{}", self.secrets.callback_secret)["webhook-signature"]
        for token in all_tokens(self.stack, self.secrets, config.json()["token"], signature):
            self.tokens[token.name] = token
        turns = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(door: Door, token: Token, place: str) -> None:
            async with turns:
                self.answers[str(door), token.name, place] = await self.answer(door, token, place)

        tries = itertools.product(DOORS.values(), self.tokens.values(), PLACES)
        await asyncio.gather(*(one(*each) for each in tries if each[0].is_tried_with(*each[1:])))

    async def answer(self, door: Door, token: Token, place: str) -> Answer:
        """What the door answers to a request that is empty but for the token: whatever it opens, nothing is done."""
        headers, query = sent_with(token, place)
        if door.path.endswith(("/sse", "/ws")):
            query["subscribe"] = "*"
        if door.party == "credits" and door.method == "GET":
            query |= {"tenant_id": token.tenant, "user_id": ACCOUNTS[token.tenant]}
        path = re.sub(r"\{[^}]+\}", "404", door.path)
        if door.method == "WS":
            return await _dialled(str(httpx.URL(f"{self.url_of(door.party)}{path}", params=query)), headers)
        body: dict[str, Any] | None = None if door.method == "GET" else {}
        request = self.http.build_request(
            door.method, f"{self.url_of(door.party)}{path}", params=query, headers=headers, json=body
        )
        response = await self.http.send(request, stream=True)
        try:
            is_endless = response.headers.get("content-type", "").startswith("text/event-stream")
            text = "" if is_endless else (await response.aread()).decode(errors="replace")
            return Answer(response.status_code, str(response.headers), text)
        finally:
            await response.aclose()

    async def task(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Start a task at the gateway as its caller; its end."""
        headers = {"authorization": f"Bearer {self.stack.tokens[TENANT]}"}
        url = f"{self.stack.gateway_url}/api/v1/tasks"
        started = await self.http.post(f"{url}/{kind}", json=body, headers=headers)
        assert started.status_code == 202, started.text

        async def read() -> dict[str, Any] | None:
            task: dict[str, Any] = (await self.http.get(f"{url}/{body['task_id']}", headers=headers)).json()
            return task if task["ended_at"] else None

        task: dict[str, Any] = await until(read)
        return task

    async def job(self, token: str) -> httpx.Response:
        """Order a picture at the bridge, as a worker does."""
        task_id = unique("job")
        body = {
            **{"task_id": task_id, "tenant_id": TENANT, "user_id": "user-demo", "template_id": "test-pattern"},
            **{"prompt": "a lighthouse", "controls": [], "resolution": "sd", "priority": "standard", "extras": {}},
            "callback_url": f"{self.stack.gateway_url}/callbacks/comfyui/{task_id}",
        }
        headers = {"authorization": f"Bearer {token}", "x-idempotency-key": f"{task_id}:submit:1"}
        return await self.http.post(f"{self.bridge_url}/comfyui/v1/jobs", json=body, headers=headers)


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer of `look`."""
    async with asyncio.timeout(LONGEST_SECONDS):
        while True:
            if found := await look():
                return found
            await asyncio.sleep(0.1)


async def _dialled(address: str, headers: dict[str, str]) -> Answer:
    try:
        async with connect(f"ws{address.removeprefix('http')}", additional_headers=headers, proxy=None) as socket:
            return Answer(101, str(socket.response.headers if socket.response else ""), "")
    except InvalidStatus as refused:
        body = refused.response.body or b""
        return Answer(refused.response.status_code, str(refused.response.headers), body.decode(errors="replace"))


def marked_secrets() -> Secrets:
    def marked(what: str) -> str:
        return f"{MARK}-of-{what}-of-more-than-32-bytes"

    return Secrets(
        caller_secret=marked("callers"),
        service_secret=marked("services"),
        admin_token=marked("the-switchboard"),
        database_password=marked("the-database"),
        callback_secret=f"whsec_{MARK}OfCallbacksInBase640000",
    )


@asynccontextmanager
async def running_whole_stack(path: Path) -> AsyncIterator[WholeStack]:
    folder, secrets = new_run_folder(path), marked_secrets()
    (folder.path / "secrets.json").write_text(secrets.model_dump_json())
    metrics_port, bridge_port = any_free_port(), any_free_port()
    async with AsyncExitStack() as opened:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(f"{PREFIX}LOG_LEVEL", "DEBUG")
            environment.setenv(f"{PREFIX}METRICS_PORT", str(metrics_port))
            opened.callback(end_stack, folder)
            await asyncio.to_thread(start_stack, folder, SPEED, print, has_lifeline=True)
        stack = folder.description()
        assert stack is not None
        settings = {
            "TEMPORAL_ADDRESS": stack.temporal_address,
            "SERVICE_SECRET": secrets.service_secret,
            "CALLBACK_SECRETS": secrets.callback_secret,
            "CALLBACK_BASE_URL": stack.gateway_url,
            "BRIDGE_PORT": str(bridge_port),
            "BRIDGE_STORE_URL": (folder.path / "bridge").as_uri(),
            "GPU_GRACE_SECONDS": "1",
            "LOG_LEVEL": "DEBUG",
        }
        native = await opened.enter_async_context(NativeServer(path / "native"))
        for name, command in (("bridge", ["bridge"]), ("gpu-1", ["bridge.gpu_worker", "--server", native.url])):
            await opened.enter_async_context(_process(folder, name, command, settings))
        http = await opened.enter_async_context(httpx.AsyncClient(timeout=30, trust_env=False))
        client = await Client.connect(stack.temporal_address, plugins=[TasksPlugin()])
        bridge_url, metrics_url = f"http://127.0.0.1:{bridge_port}", f"http://127.0.0.1:{metrics_port}/metrics"
        whole = WholeStack(folder, stack, secrets, bridge_url, metrics_url, client, http)

        async def serves() -> bool:
            try:
                return (await http.get(f"{bridge_url}/healthz")).is_success
            except httpx.TransportError:
                return False

        await until(serves)
        yield whole


@asynccontextmanager
async def _process(folder: RunFolder, name: str, command: list[str], settings: dict[str, str]) -> AsyncIterator[None]:
    environment = {**os.environ, **{PREFIX + setting: value for setting, value in settings.items()}}
    with folder.log(name).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *command), env=environment, cwd=PROJECT, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
