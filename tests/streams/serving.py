"""Streams served on a free port, readers of the streams, and a writer of tasks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt
from fastapi import Depends, FastAPI, Request, Response

from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import TaskWrite
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from gateway.access import Access
from gateway.draining import Draining
from gateway.problems import answer_with_problems
from gateway.streams import stream_routes, task_event_stream
from gateway.streams_hub import EventHub
from gateway.tenant_limits import TenantDoor
from gateway.tokens import StreamTokens
from runtime.caller_tokens import Caller, CallerTokens, SharedSecret
from store import TaskStore
from tests.conftest import unique
from tests.served_app import served_app
from tests.store.facts import claim_of, end, fact, new_task_id, write_of
from tests.waiting import comes_true

SECRET = "a secret of the tests, long enough for HS256"
ISSUER, AUDIENCE = "tests", "gateway"


def token_for(tenant_id: str, *, scopes: Sequence[str] = (Scope.TASK_READ,), seconds: float = 600) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + seconds, "tenant_id": tenant_id, "user_id": "user"}
    return jwt.encode({**claims, "scopes": list(scopes)}, SECRET, algorithm="HS256")


def stream_token_for(tenant_id: str, *, scopes: Sequence[Scope] = (Scope.TASK_READ,)) -> str:
    """A token that opens streams and nothing else: the only kind that an address may hold."""
    caller = Caller(tenant_id=tenant_id, user_id="user", scopes=list(scopes), expires_at=time.time() + 600)
    return StreamTokens(SECRET).made_for(caller)


def access() -> Access:
    return Access(CallerTokens(SharedSecret(SECRET), issuer=ISSUER, audience=AUDIENCE), StreamTokens(SECRET))


@dataclass
class Streams:
    """A served process of streams, and how tests open them."""

    hub: EventHub
    http: httpx.AsyncClient
    port: int
    draining: Draining

    @asynccontextmanager
    async def opened(
        self, tenant_id: str, query: str, *, headers: dict[str, str] | None = None, token: str | None = None
    ) -> AsyncIterator[Reader]:
        sent = {"authorization": f"Bearer {token or token_for(tenant_id)}", **(headers or {})}
        path = query if query.startswith("/") else f"/api/v1/tasks/stream/sse?{query}"
        async with self.http.stream("GET", path, headers=sent) as response:
            assert response.status_code == 200, await response.aread()
            reader = Reader(response)
            reading = asyncio.create_task(reader.read())
            try:
                yield reader
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def status(self, tenant_id: str, query: str, **headers: str) -> int:
        """The status that a stream's request is answered with; for those that are not opened."""
        sent = {"authorization": f"Bearer {token_for(tenant_id)}", **headers}
        async with self.http.stream("GET", f"/api/v1/tasks/stream/sse?{query}", headers=sent) as response:
            return response.status_code


@dataclass
class Reader:
    """Reads a stream as a browser's EventSource does."""

    response: httpx.Response
    frames: list[dict[str, str]] = field(default_factory=list)
    has_ended: bool = False

    async def read(self) -> None:
        frame: dict[str, str] = {}
        async for line in self.response.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                frame[name] = value
            elif frame:
                self.frames.append(frame)
                frame = {}
        self.has_ended = True

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events received, without heartbeats."""
        received = [json.loads(frame["data"]) for frame in self.frames if "data" in frame]
        return [event for event in received if event["event"] != EventType.HEARTBEAT]

    def seqs(self, task_id: str) -> list[int]:
        return [event["seq"] for event in self.events if event["task_id"] == task_id]

    @property
    def last_id(self) -> str:
        return next(frame["id"] for frame in reversed(self.frames) if "id" in frame)

    async def until(self, condition: Callable[[Reader], Any], *, within: float = 10.0) -> None:
        await comes_true(lambda: bool(condition(self)), within_seconds=within)

    async def until_received(self, task_id: str, seq: int, *, within: float = 10.0) -> None:
        await self.until(lambda reader: seq in reader.seqs(task_id), within=within)

    async def until_ended(self, *, within: float = 10.0) -> None:
        await self.until(lambda reader: reader.has_ended, within=within)


@dataclass
class Writer:
    """Writes tasks as a workflow would."""

    store: TaskStore
    tenant_id: str
    _versions: dict[str, int] = field(default_factory=dict)

    async def begun(self) -> str:
        task_id = new_task_id()
        await self.store.claim(claim_of(task_id, tenant_id=self.tenant_id))
        return task_id

    async def write(self, task_id: str, count: int = 1, **fields: Any) -> None:
        """`count` events in one write."""
        await self.store.write(self.writing(task_id, count, **fields))

    async def end(self, task_id: str) -> None:
        await self.store.write(self.ending(task_id))

    def writing(self, task_id: str, count: int = 1, **fields: Any) -> TaskWrite:
        facts = [fact(unique("fact"), **fields) for _ in range(count)]
        return write_of(task_id, *facts, version=self._version(task_id))

    def ending(self, task_id: str) -> TaskWrite:
        return write_of(task_id, end(), version=self._version(task_id), status=TaskStatus.COMPLETED)

    def _version(self, task_id: str) -> int:
        self._versions[task_id] = self._versions.get(task_id, 0) + 1
        return self._versions[task_id]


@asynccontextmanager
async def streams_on(
    store: TaskStore, *, heartbeat_seconds: int = 15, limits: TenantLimits = NO_LIMITS, **options: Any
) -> AsyncIterator[Streams]:
    draining = Draining()
    door = TenantDoor(store, lambda _tenant_id: limits)
    hub = EventHub(store, draining, heartbeat_seconds=heartbeat_seconds, **options)
    callers = access()
    watcher = Depends(callers.requires_for_stream())
    app = FastAPI()
    answer_with_problems(app)
    app.include_router(stream_routes(hub, door, callers))

    async def events(request: Request, task_id: str, caller: Caller = watcher) -> Response:
        return await task_event_stream(hub, door)(request, caller, task_id)

    app.add_api_route("/api/v1/tasks/{task_id}/events", events, response_model=None)

    async with hub.running(), door.reporting(), served_app(app) as port:
        await comes_true(lambda: hub.is_listening)
        pool = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, limits=pool) as http:
            yield Streams(hub, http, port, draining)
        draining.begin()
