"""Admin routes that both services share: faults, clock, requests seen, reset. Their own bearer token guards them."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Header, HTTPException

from proof.simulators.admin_wire import ClockOrder, ClockSeen, Fault, FaultOrder, RequestSeen, Schedule
from proof.simulators.clock import Clock
from proof.simulators.edge import Edge


def guarded_router(admin_token: str) -> APIRouter:
    """An empty router below `/admin` that wants `Authorization: Bearer {admin_token}`."""

    def check(authorization: Annotated[str, Header()] = "") -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {admin_token}".encode()):
            raise HTTPException(401, "The admin token is missing or wrong.")

    return APIRouter(prefix="/admin", dependencies=[Depends(check)])


def health_router() -> APIRouter:
    """`GET /health`: whether the service answers."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return router


def add_shared_routes(
    router: APIRouter, edge: Edge, clock: Clock, settle: Callable[[], None], reset: Callable[[], None]
) -> None:
    """`settle` does what has come due by the clock; `reset` returns the service to its first state."""

    @router.get("/faults")
    async def list_faults() -> list[Fault]:
        return edge.faults.all()

    @router.post("/faults", status_code=201)
    async def set_fault(order: FaultOrder) -> Fault:
        return edge.faults.set(order)

    @router.post("/schedule", status_code=201)
    async def set_schedule(schedule: Schedule) -> list[Fault]:
        return edge.faults.set_schedule(schedule)

    @router.delete("/faults", status_code=204)
    async def remove_all() -> None:
        edge.faults.remove()

    @router.delete("/faults/{fault_id}", status_code=204)
    async def remove_one(fault_id: int) -> None:
        edge.faults.remove(fault_id)

    @router.get("/clock")
    async def read_clock() -> ClockSeen:
        return ClockSeen(now=clock.now(), work_seconds=clock.work(), speed=clock.speed)

    @router.post("/clock")
    async def move_clock(order: ClockOrder) -> ClockSeen:
        if order.speed is not None:
            clock.set_speed(order.speed)
        if order.advance_seconds:
            clock.advance(order.advance_seconds)
        settle()
        return await read_clock()

    @router.get("/requests")
    async def requests_seen(
        route: str | None = None, task_id: str | None = None, limit: int = 10_000
    ) -> list[RequestSeen]:
        return [RequestSeen.model_validate(row) for row in edge.requests_seen.matching(route, task_id, limit)]

    @router.post("/reset", status_code=204)
    async def reset_all() -> None:
        edge.faults.remove()
        reset()
