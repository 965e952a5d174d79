"""What simulator tests talk through: a caller with a token, and a receiver of signed callbacks on a real port."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from standardwebhooks import Webhook, WebhookVerificationError

from proof.simulators.serving import Simulators
from proof.simulators.tokens import ALL_SCOPES
from tests.conftest import unique

TENANT, USER = "tenant-demo", "user-demo"
Json = dict[str, Any]


async def eventually(condition: Callable[[], bool], what: str, within_seconds: float = 5.0) -> None:
    """Wait until `condition` holds. Raises AssertionError naming `what` when it does not in time."""
    ends = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < ends, f"{what} did not come within {within_seconds} s"
        await asyncio.sleep(0.01)


async def until(look: Callable[[], Awaitable[bool]], what: str, within_seconds: float = 5.0) -> None:
    """As `eventually`, for a condition that is awaited."""
    ends = time.monotonic() + within_seconds
    while not await look():
        assert time.monotonic() < ends, f"{what} did not come within {within_seconds} s"
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Arrival:
    """One callback as it arrived."""

    webhook_id: str
    timestamp: int
    raw: bytes
    is_genuine: bool

    @property
    def body(self) -> Json:
        body: Json = json.loads(self.raw)
        return body


@dataclass
class Receiver:
    """Takes callbacks; answers the statuses given for a task in turn, then 202."""

    secret: str
    url: str = ""
    arrivals: list[Arrival] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)

    def of(self, task_id: str) -> list[Arrival]:
        return [arrival for arrival in self.arrivals if f'"{task_id}"'.encode() in arrival.raw]

    def genuine(self, task_id: str) -> list[Json]:
        return [arrival.body for arrival in self.of(task_id) if arrival.is_genuine]

    def statuses(self, task_id: str) -> list[str]:
        return [body.get("job_status") or body["training_status"] for body in self.genuine(task_id)]

    async def take(self, request: Request, task_id: str) -> Response:
        raw = await request.body()
        headers = dict(request.headers)
        try:
            Webhook(self.secret).verify(raw, headers, json_parse=False)
            is_genuine = True
        except WebhookVerificationError:
            is_genuine = False
        self.arrivals.append(
            Arrival(headers["webhook-id"], int(headers["webhook-timestamp"]), raw, is_genuine=is_genuine)
        )
        answers = self.answers.get(task_id) or [202]
        return Response(status_code=answers.pop(0) if task_id in self.answers else 202)


@asynccontextmanager
async def running_receiver(secret: str) -> AsyncIterator[Receiver]:
    receiver = Receiver(secret)
    app = FastAPI()
    app.post("/callbacks/comfyui/{task_id}")(receiver.take)
    # The protocol is named, or asyncio would not set TCP_NODELAY and every answer would take 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    receiver.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await eventually(lambda: server.started, "the receiver")
    yield receiver
    server.should_exit = True
    await serving


@dataclass
class Caller:
    """One tenant's user in front of both services."""

    simulators: Simulators
    receiver: Receiver
    http: httpx.AsyncClient
    tenant_id: str = TENANT
    user_id: str = USER
    steps: Counter[str] = field(default_factory=Counter)

    def headers(self, key: str | None = None, scopes: list[str] | None = None) -> dict[str, str]:
        tokens = self.simulators.tokens
        token = tokens.made_for(self.tenant_id, self.user_id, ALL_SCOPES if scopes is None else scopes)
        return {"Authorization": f"Bearer {token}"} | ({"X-Idempotency-Key": key} if key else {})

    def key(self, task_id: str, step: str) -> str:
        """A new key of the form contract §2 and §4 give."""
        self.steps[f"{task_id}:{step}"] += 1
        return f"{task_id}:{step}:{self.steps[f'{task_id}:{step}']}"

    async def comfyui(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        key: str | None = None,
        scopes: list[str] | None = None,
    ) -> httpx.Response:
        url = f"{self.simulators.comfyui_url}/comfyui/v1{path}"
        return await self.http.request(method, url, json=body, headers=self.headers(key, scopes))

    async def credits(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        key: str | None = None,
        scopes: list[str] | None = None,
    ) -> httpx.Response:
        url = f"{self.simulators.credits_url}/api/v1/credits{path}"
        return await self.http.request(method, url, json=body, headers=self.headers(key, scopes))

    def job_body(self, task_id: str, **other: Any) -> Json:
        return {
            "task_id": task_id,
            "tenant_id": self.tenant_id,
            "user_id": self.user_id,
            "template_id": "text-to-image",
            "prompt": "a lighthouse at dusk",
            "controls": [],
            "resolution": "hd",
            "priority": "standard",
            "extras": {},
            "callback_url": f"{self.receiver.url}/callbacks/comfyui/{task_id}",
        } | other

    def training_body(self, task_id: str, epochs: int = 4, **other: Any) -> Json:
        return {
            "task_id": task_id,
            "tenant_id": self.tenant_id,
            "user_id": self.user_id,
            "base_model": "base",
            "dataset": {"dataset_id": "cats", "snapshot_uri": "file:///snapshots/cats", "files": []},
            "hyperparameters": {"epochs": epochs, "batch_size": 1, "learning_rate": 0.0001},
            "priority": "standard",
            "callback_url": f"{self.receiver.url}/callbacks/comfyui/{task_id}",
        } | other

    async def submit(self, task_id: str, **other: Any) -> Json:
        """The 202's body."""
        body = self.job_body(task_id, **other)
        return _ok(await self.comfyui("POST", "/jobs", body, key=self.key(task_id, "submit")), 202)

    async def create(self, task_id: str, **other: Any) -> Json:
        body = self.training_body(task_id, **other)
        return _ok(await self.comfyui("POST", "/training", body, key=self.key(task_id, "submit")), 202)

    async def start(self, task_id: str, training_id: str) -> Json:
        path = f"/training/{training_id}/start"
        return _ok(await self.comfyui("POST", path, {}, key=self.key(task_id, "start")))

    async def job(self, job_id: str) -> Json:
        return _ok(await self.comfyui("GET", f"/jobs/{job_id}"))

    async def training(self, training_id: str) -> Json:
        return _ok(await self.comfyui("GET", f"/training/{training_id}"))

    def hold_body(self, task_id: str, points: int = 50, **other: Any) -> Json:
        return {
            "task_id": task_id,
            "template_id": "text-to-image",
            "tenant_id": self.tenant_id,
            "user_id": self.user_id,
            "scene": "image.generate",
            "estimated_cost": points,
            "currency": "point",
            "expire_in": 600,
        } | other

    def commit_body(self, task_id: str, pre_deduct_id: str, points: int) -> Json:
        return {
            "pre_deduct_id": pre_deduct_id,
            "actual_cost": points,
            "task_id": task_id,
            "tenant_id": self.tenant_id,
            "template_id": "text-to-image",
            "user_id": self.user_id,
        }

    def cancel_body(self, pre_deduct_id: str) -> Json:
        return {
            "pre_deduct_id": pre_deduct_id,
            "tenant_id": self.tenant_id,
            "user_id": self.user_id,
            "reason": "the job failed",
        }

    async def hold(self, task_id: str, points: int = 50, **other: Any) -> Json:
        body = self.hold_body(task_id, points, **other)
        return _ok(await self.credits("POST", "/pre-deduct", body, key=self.key(task_id, "hold")))

    async def commit(self, task_id: str, pre_deduct_id: str, points: int) -> httpx.Response:
        body = self.commit_body(task_id, pre_deduct_id, points)
        return await self.credits("POST", "/commit", body, key=self.key(task_id, "commit"))

    async def cancel_hold(self, task_id: str, pre_deduct_id: str) -> httpx.Response:
        return await self.credits("POST", "/cancel", self.cancel_body(pre_deduct_id), key=self.key(task_id, "cancel"))


def _ok(response: httpx.Response, status: int = 200) -> Json:
    assert response.status_code == status, response.text
    body: Json = response.json()
    return body


def refusal(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error body."""
    detail = response.json()["detail"]
    return response.status_code, detail["code"], detail["message"]


def new_task() -> str:
    return unique("task")
