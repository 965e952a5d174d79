"""Routes that ComfyUI does not have: switches, and counters of what really happened."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from tests.bridge.native.prompt_queue import Json
from tests.bridge.native.state import Native
from tests.bridge.native.traps import Traps


def admin_router(native: Native) -> APIRouter:
    """Routes below `/admin`. No trap affects them."""
    router = APIRouter(prefix="/admin")

    @router.get("/traps")
    async def traps() -> Traps:
        return native.traps

    @router.patch("/traps")
    async def change(changes: dict[str, Any]) -> Traps:
        native.set(Traps.model_validate(native.traps.model_dump() | changes))
        return native.traps

    @router.get("/runs")
    async def runs() -> list[Json]:
        return [vars(run) for run in native.executor.runs]

    @router.get("/submissions")
    async def submissions() -> list[str]:
        return native.submissions

    @router.get("/sent")
    async def sent() -> list[Json]:
        return native.sent

    @router.get("/requests")
    async def requests() -> list[Json]:
        return native.requests

    @router.get("/sockets")
    async def sockets() -> list[dict[str, str | None]]:
        return native.sockets.seen

    @router.post("/forget", status_code=204)
    async def forget() -> None:
        native.forget()

    @router.post("/reset", status_code=204)
    async def reset() -> None:
        native.set(Traps())
        native.forget()
        native.submissions.clear()
        native.sent.clear()
        native.requests.clear()
        native.sockets.seen.clear()
        native.executor.runs.clear()

    return router
