"""ComfyUI and credits for measurements: every call is answered at once, every job calls back.

It runs in the driver's process, costs almost nothing, and records when credits are held and when they are committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

COST: Final = 24
CALLBACK_PAUSE_SECONDS: Final = 1.5
"""Callbacks are spread: our tasks publish progress at most once a second (contract §6)."""
CALLBACKS: Final[tuple[dict[str, Any], ...]] = (
    {"job_status": "queued", "stage_progress": 0, "queue_position": 2},
    {"job_status": "processing", "stage_progress": 25},
    {"job_status": "processing", "stage_progress": 50},
    {"job_status": "processing", "stage_progress": 75},
    {"job_status": "delivery", "stage_progress": 100, "result_urls": ["https://results.example/1.png"]},
)
WAITING: Final = "waiting-"
"""Tasks whose ids begin with this get no callbacks: they stay open."""

CallBack = Callable[[str, dict[str, Any]], Awaitable[None]]


def states_of(callbacks: int) -> list[dict[str, Any]]:
    """What a job reports; all between the first and the last report are its progress."""
    steps = callbacks - 1
    at_work = [{"job_status": "processing", "stage_progress": round(100 * n / steps)} for n in range(1, steps)]
    return [CALLBACKS[0], *at_work, CALLBACKS[-1]]


class Party:
    """Both services. `call_back` brings a callback's body to a task."""

    def __init__(self, callbacks: int = len(CALLBACKS)) -> None:
        """`callbacks`: how often a job calls back: queued, at work, delivered."""
        self.callbacks = states_of(callbacks)
        self.url = ""
        self.call_back: CallBack | None = None
        self.held: dict[str, float] = {}
        """Task → when its credits were held, by `time.monotonic`."""
        self.committed: dict[str, float] = {}
        self.on_commit: Callable[[str], None] = lambda task_id: None
        self._calling_back: set[asyncio.Task[None]] = set()

    def forget(self) -> None:
        """Ready for the next measurement."""
        self.held.clear()
        self.committed.clear()
        for calling in self._calling_back:
            calling.cancel()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Party]:
        routes = {
            "/comfyui/v1/jobs": self._submit,
            "/api/v1/credits/estimate": self._estimate,
            "/api/v1/credits/pre-deduct": self._pre_deduct,
            "/api/v1/credits/commit": self._commit,
        }
        app = Starlette(
            routes=[
                *(Route(path, answer, methods=["POST"]) for path, answer in routes.items()),
                Route("/comfyui/v1/jobs/{job_id}", self._job),
            ]
        )
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self.forget()
            server.should_exit = True
            await serving

    async def _submit(self, request: Request) -> JSONResponse:
        task_id = (await request.json())["task_id"]
        if not task_id.startswith(WAITING):
            calling = asyncio.create_task(self._call_back_in_turn(task_id))
            self._calling_back.add(calling)
            calling.add_done_callback(self._calling_back.discard)
        accepted = {"job_id": f"job-{task_id}", "job_status": "queued", "estimated_time": 60, "gpu_slots": 1}
        return JSONResponse({**accepted, "estimated_cost": COST}, 202)

    async def _call_back_in_turn(self, task_id: str) -> None:
        assert self.call_back is not None
        for number, state in enumerate(self.callbacks, start=1):
            await asyncio.sleep(CALLBACK_PAUSE_SECONDS)
            now = datetime.now(UTC).isoformat()
            body = {"job_id": f"job-{task_id}", "task_id": task_id, "sequence": number, "occurred_at": now, **state}
            await self.call_back(task_id, body)

    async def _job(self, request: Request) -> JSONResponse:
        return JSONResponse({"job_id": request.path_params["job_id"], "job_status": "queued", "sequence": 0})

    async def _estimate(self, request: Request) -> JSONResponse:
        return JSONResponse({"currency": "point", "selected_cost": COST, "estimated_cost": COST})

    async def _pre_deduct(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.held.setdefault(body["task_id"], time.monotonic())
        expire_at = datetime.now(UTC) + timedelta(seconds=body["expire_in"])
        return JSONResponse({**self._hold(body["task_id"]), "expire_at": expire_at.isoformat()})

    async def _commit(self, request: Request) -> JSONResponse:
        task_id = (await request.json())["task_id"]
        if task_id not in self.committed:
            self.committed[task_id] = time.monotonic()
            self.on_commit(task_id)
        return JSONResponse(self._hold(task_id))

    def _hold(self, task_id: str) -> dict[str, Any]:
        return {"pre_deduct_id": f"hold-{task_id}", "frozen_amount": COST, "balance_after": 1_000}
