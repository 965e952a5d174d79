"""What simulator tests talk through: a caller with a token, and a receiver of signed callbacks on a real port."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from proof.conformance.receiver import CallbackReceiver
from proof.simulators.serving import Simulators
from proof.simulators.tokens import ALL_SCOPES
from tests.conftest import unique

TENANT, USER = "tenant-demo", "user-demo"
Json = dict[str, Any]


class Receiver(CallbackReceiver):
    """With what these tests read of the arrivals that have a valid signature."""

    def genuine(self, task_id: str) -> list[Json]:
        return [arrival.body for arrival in self.of(task_id) if not arrival.flaw]

    def statuses(self, task_id: str) -> list[str]:
        return [body.get("job_status") or body["training_status"] for body in self.genuine(task_id)]


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
