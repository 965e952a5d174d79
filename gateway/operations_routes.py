"""Health, readiness and metrics for operators. They need no token and show no tenant's data."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import timedelta
from typing import Final, Literal

from fastapi import APIRouter, Response
from temporalio.client import Client

from comfyui_temporal.contracts.fields import OwnModel
from gateway.draining import Draining
from gateway.metrics import CONTENT_TYPE, MetricsPage
from store import TaskStore

CHECK_SECONDS: Final = 2.0
State = Literal["ok", "unavailable"]


class Readiness(OwnModel):
    """Whether requests can be answered, and what prevents it."""

    status: Literal["ready", "not_ready", "draining"]
    postgresql: State
    temporal: State


def health_routes(temporal: Client, store: TaskStore, draining: Draining) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive. It says nothing about its dependencies."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready"}})
    async def readyz(response: Response) -> Readiness:
        """PostgreSQL and Temporal answer, and the process is not shutting down."""
        postgresql, server = await asyncio.gather(
            _state(store.check()),
            _state(temporal.service_client.check_health(timeout=timedelta(seconds=CHECK_SECONDS))),
        )
        is_ready = postgresql == server == "ok" and not draining.has_begun
        response.status_code = 200 if is_ready else 503
        status: Literal["ready", "not_ready", "draining"] = "ready" if is_ready else "not_ready"
        return Readiness(status="draining" if draining.has_begun else status, postgresql=postgresql, temporal=server)

    return router


def metrics_routes(metrics: MetricsPage) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read_metrics() -> Response:
        """Counters of this process, for Prometheus."""
        return Response(await metrics.text(), media_type=CONTENT_TYPE)

    return router


async def _state(check: Awaitable[object]) -> State:
    try:
        await asyncio.wait_for(check, CHECK_SECONDS)
    except Exception:  # any failure means not ready
        return "unavailable"
    return "ok"
