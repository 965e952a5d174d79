"""A receiver of signed callbacks on a real port of this machine; a case sets its answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from standardwebhooks import Webhook

HEADERS: Final = ("webhook-id", "webhook-timestamp", "webhook-signature")


@dataclass(frozen=True)
class Arrival:
    """One callback as it arrived. `flaw`: why it is not genuine, else empty."""

    webhook_id: str
    timestamp: str
    signature: str
    raw: bytes
    flaw: str

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.raw)
        return body


@dataclass
class CallbackReceiver:
    """Takes callbacks below `/callbacks/comfyui/{task_id}`; answers 202, or what was set for a task, in turn.

    `secret`: `whsec_…`, as the server has it.
    """

    secret: str
    url: str = ""
    arrivals: dict[str, list[Arrival]] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)

    def of(self, task_id: str) -> list[Arrival]:
        return self.arrivals.get(task_id, [])

    async def take(self, request: Request, task_id: str) -> Response:
        raw = await request.body()
        headers = {name: request.headers.get(name, "") for name in HEADERS}
        webhook_id, timestamp, signature = (headers[name] for name in HEADERS)
        arrival = Arrival(webhook_id, timestamp, signature, raw, self._flaw(raw, headers))
        self.arrivals.setdefault(task_id, []).append(arrival)
        answers = self.answers.get(task_id)
        return Response(status_code=answers.pop(0) if answers else 202)

    def _flaw(self, raw: bytes, headers: dict[str, str]) -> str:
        missing = [name for name in HEADERS if not headers[name]]
        if missing:
            return f"it lacks {', '.join(missing)}"
        try:
            Webhook(self.secret).verify(raw, headers, json_parse=False)
        except Exception as error:
            # standardwebhooks raises many exceptions for malformed signatures; any of them means a refusal.
            return f"its signature does not verify ({error})"
        return ""


Receiver = TypeVar("Receiver", bound=CallbackReceiver)


class _QuietServer(uvicorn.Server):
    """Leaves the process's signals to its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def receiving(receiver: Receiver, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Receiver]:
    """Serve it at this address, on a free port unless one is named."""
    app = FastAPI(openapi_url=None)
    app.post("/callbacks/comfyui/{task_id}")(receiver.take)
    # Without a named protocol asyncio does not set TCP_NODELAY, and every answer takes 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind((host, port))
    listening.listen()
    receiver.url = f"http://{host}:{listening.getsockname()[1]}"
    server = _QuietServer(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield receiver
    finally:
        server.should_exit = True
        await serving
