"""A gateway served on a free port, a sender of signed callbacks, and a run that keeps what it is signalled."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import jwt
from fastapi import FastAPI
from temporalio import workflow
from temporalio.client import Client, WorkflowHandle

from activities.file_lists import FileLists
from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, TASK_QUEUE, workflow_id_of
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from gateway.access import Access
from gateway.app import create_app
from gateway.callbacks import CallbackOutcome
from gateway.draining import Draining
from gateway.tokens import StreamTokens
from gateway.uploads import UploadSettings
from proof.site.callbacks import signed_headers, signed_request
from runtime.caller_tokens import CallerTokens, SharedSecret
from store import TaskStore
from tests.served_app import served_app
from tests.waiting import until

TOKEN_SECRET = "a secret of these tests, longer than the 64 bytes that HS512 wants of one"
ISSUER = "tests"
AUDIENCE = "gateway-tests"


def new_access(**options: Any) -> Access:
    """Access by HS256 tokens of `token_for`."""
    callers = CallerTokens(SharedSecret(TOKEN_SECRET), issuer=ISSUER, audience=AUDIENCE)
    return Access(callers, StreamTokens(TOKEN_SECRET), **options)


def token_for(
    tenant_id: Any = "tenant-a",
    user_id: Any = "user-a",
    scopes: Iterable[str] = tuple(Scope),
    *,
    valid_seconds: float = 300,
    secret: str = TOKEN_SECRET,
    **changes: Any,
) -> str:
    """A caller's token, by default with every scope; `changes` overwrite claims, None removes one."""
    now = time.time()
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": int(now),
        "exp": int(now + valid_seconds),
        "tenant_id": tenant_id,
        "user_id": user_id,
        "scopes": [str(scope) for scope in scopes],
        **changes,
    }
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, secret, algorithm="HS256")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


@workflow.defn(name="KeepsSignals")
class KeepsSignals:
    """Takes the place of a task's workflow: keeps each callback until the signal `end`."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.is_told_to_end = False

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: self.is_told_to_end)

    @workflow.signal(name=CALLBACK_SIGNAL)
    def keep(self, callback: dict[str, Any]) -> None:
        self.kept.append(callback)

    @workflow.signal
    def end(self) -> None:
        self.is_told_to_end = True

    @workflow.query
    def callbacks(self) -> list[dict[str, Any]]:
        return self.kept


@dataclass
class Gateway:
    """A served gateway and how tests talk to it."""

    app: FastAPI
    http: httpx.AsyncClient
    secret: str

    async def post(
        self,
        task_id: str,
        body: dict[str, Any] | bytes,
        *,
        webhook_id: str | None = None,
        secret: str | None = None,
        at: datetime | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        raw = body if isinstance(body, bytes) else json.dumps({"task_id": task_id, **body}).encode()
        signed = signed_headers(raw, secret or self.secret, webhook_id=webhook_id, at=at)
        return await self.http.post(f"/callbacks/comfyui/{task_id}", content=raw, headers={**signed, **(headers or {})})

    def count(self, outcome: CallbackOutcome) -> int:
        return int(self.app.state.callbacks.outcomes[outcome])


@asynccontextmanager
async def served(
    client: Client,
    store: TaskStore,
    *more_secrets: str,
    task_queue: str = TASK_QUEUE,
    objects: str = "file://.run/objects",
    own_tasks_only: bool = False,
    limits_of: Callable[[str], TenantLimits] = lambda _tenant_id: NO_LIMITS,
    draining: Draining | None = None,
    uploads: UploadSettings | None = None,
) -> AsyncIterator[Gateway]:
    secret = new_secret()
    origins = ["https://app.example"]
    app = create_app(
        temporal=client,
        store=store,
        lists=FileLists.at(objects),
        callback_secrets=[secret, *more_secrets],
        access=new_access(allowed_origins=origins, own_tasks_only=own_tasks_only),
        task_queue=task_queue,
        allowed_origins=origins,
        limits_of=limits_of,
        draining=draining,
        upload_settings=uploads,
    )
    limits = httpx.Limits(max_connections=200)
    async with (
        served_app(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, limits=limits) as http,
    ):
        yield Gateway(app, http, secret)


@dataclass
class GatewayProcess:
    """`python -m gateway`, on the session's servers."""

    process: asyncio.subprocess.Process
    port: int
    secret: str

    def request(self, task_id: str, body: dict[str, Any]) -> bytes:
        """A signed callback as it goes over the wire."""
        return signed_request(task_id, body, self.secret)


@asynccontextmanager
async def gateway_process(environment: dict[str, str], *, log: Path | None = None) -> AsyncIterator[GatewayProcess]:
    """`log`: a file for what it writes."""
    secret = new_secret()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "CALLBACK_SECRETS": secret,
        "GATEWAY_PORT": str(port),
        "CALLER_SECRET": TOKEN_SECRET,
        "CALLER_ISSUER": ISSUER,
        "CALLER_AUDIENCE": AUDIENCE,
        **environment,
    }
    with log.open("ab") if log else nullcontext() as written:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway"),
            env={**os.environ, **{f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}},
            cwd=Path(__file__).parents[2],
            stderr=written,
        )

    async def is_up() -> bool:
        assert process.returncode is None, "the gateway ended at its start"
        try:
            return (await http.get("/healthz")).is_success
        except httpx.TransportError:
            return False

    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            await until(is_up, within_seconds=60)
        yield GatewayProcess(process, port, secret)
    finally:
        was_running = process.returncode is None
        if was_running:
            process.terminate()
        code = await asyncio.wait_for(process.wait(), 20)
    assert code == 0 or not was_running


async def start_run(client: Client, task_queue: str, task_id: str) -> WorkflowHandle[Any, Any]:
    return await client.start_workflow("KeepsSignals", id=workflow_id_of(task_id), task_queue=task_queue)


async def answer_to_head(http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]) -> int:
    """The status of the answer to a request whose body never comes."""
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        async with asyncio.timeout(5):
            return int((await reader.readline()).split()[1])
    finally:
        writer.close()


async def kept_by(handle: WorkflowHandle[Any, Any]) -> list[dict[str, Any]]:
    return await handle.query("callbacks")  # type: ignore[no-any-return]


def tick(sequence: int, percent: float = 0.0, **fields: Any) -> dict[str, Any]:
    """An image job's callback while it runs."""
    given = {"job_id": "job-1", "job_status": "processing", "stage_progress": percent, "sequence": sequence}
    return {**given, **fields}


def delivery(sequence: int, **fields: Any) -> dict[str, Any]:
    urls = ["https://images.example/1.png"]
    return tick(sequence, 100.0, **{"job_status": "delivery", "result_urls": urls, "actual_cost": 24, **fields})


def training_tick(sequence: int, **fields: Any) -> dict[str, Any]:
    given = {"training_id": "training-1", "training_status": "running", "training_stage": "training"}
    return {**given, "stage_progress": 1.0, "sequence": sequence, **fields}
