"""ComfyUI over HTTP: contract §2's and §3's routes, the result pictures, and the admin's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import FileResponse

from comfyui_temporal.contracts.prices import PriceTable
from proof.simulators.admin_routes import add_shared_routes, guarded_router, health_router
from proof.simulators.admin_wire import CallbackSeen, GpuOrder, RunOrder, RunSeen
from proof.simulators.clock import Clock
from proof.simulators.comfyui_service import ComfyUIService
from proof.simulators.edge import Edge
from proof.simulators.faults import Faults
from proof.simulators.jobs import ImageRun
from proof.simulators.pictures import picture
from proof.simulators.state_file import StateFile
from proof.simulators.tokens import Tokens
from runtime.background import running_in_background


def comfyui_app(
    *,
    folder: Path,
    tokens: Tokens,
    admin_token: str,
    callback_secrets: list[str],
    prices: PriceTable,
    speed: float,
    gpus: dict[str, int] | None = None,
    public_url: str | None = None,
) -> FastAPI:
    """The application; its state is in `folder`/comfyui.sqlite3 and is closed when the application ends.

    `public_url`: where clients fetch results; default: the address that the job's request came to.
    """
    state = StateFile(folder / "comfyui.sqlite3")
    clock = Clock(state, speed=speed)
    faults = Faults(state)
    service = ComfyUIService(
        state, clock, faults, folder=folder, prices=prices, callback_secrets=callback_secrets, gpus=gpus
    )
    edge = Edge(
        *(state, clock, tokens, faults, service.queue.task_of),
        before_act=service.queue.settle,
        public_url=public_url,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with running_in_background(service.queue.keep_time(), service.outbox.keep_sending()):
            yield
        state.close()

    app = FastAPI(title="Simulated ComfyUI service", lifespan=lifespan)
    app.include_router(_contract_routes(service, edge))
    app.include_router(_result_routes(service))
    app.include_router(health_router())
    app.include_router(_admin_routes(service, edge, admin_token))
    return app


def _contract_routes(service: ComfyUIService, edge: Edge) -> APIRouter:
    router = APIRouter(prefix="/comfyui/v1")
    add = partial(edge.add_route, router)
    add("POST", "/jobs", "submit_job", service.submit_job)
    add("GET", "/jobs/{run_id}", "get_job", service.get_job)
    add("POST", "/jobs/{run_id}/cancel", "cancel_job", service.cancel_job, is_ours=True)
    add("POST", "/training", "create_training", service.create_training)
    add("GET", "/training/{run_id}", "get_training", service.get_training)
    add("POST", "/training/{run_id}/start", "start_training", service.start_training, is_ours=True)
    add("POST", "/training/{run_id}/cancel", "cancel_training", service.cancel_training, is_ours=True)
    add("GET", "/gpus", "list_gpus", service.list_gpus, is_ours=True)
    add("GET", "/templates", "list_templates", service.list_templates, is_ours=True)
    return router


def _result_routes(service: ComfyUIService) -> APIRouter:
    router = APIRouter()

    @router.get("/results/{run_id}/{number}.png")
    async def result(run_id: str, number: int) -> FileResponse:
        run = service.queue.find(run_id)
        if not isinstance(run, ImageRun) or not run.has_finished or not 1 <= number <= run.images:
            raise HTTPException(404, "No such result.")
        path = service.folder / "results" / run.run_id / f"{number}.png"
        if not path.exists():
            await asyncio.to_thread(_draw, run, number, path)
        return FileResponse(path, media_type="image/png")

    return router


def _draw(run: ImageRun, number: int, path: Path) -> None:
    """Draw a picture when it is first read: it depends only on the job's prompt, seed, resolution and its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(picture(run.prompt, run.seed if number == 1 else f"{run.seed}/{number}", run.resolution))
    partial.replace(path)


def _admin_routes(service: ComfyUIService, edge: Edge, admin_token: str) -> APIRouter:
    router = guarded_router(admin_token)

    def reset() -> None:
        service.state.clear(keeping=["clock"])
        service.queue.load()

    add_shared_routes(router, edge, service.clock, service.queue.settle, reset)

    @router.get("/jobs")
    async def jobs(task_id: str | None = None) -> list[RunSeen]:
        service.queue.settle()
        return [service.queue.seen(run) for run in service.queue.all_runs(task_id)]

    @router.post("/jobs/{run_id}")
    async def act_on(run_id: str, order: RunOrder) -> RunSeen:
        run = service.queue.find(run_id)
        if run is None:
            raise HTTPException(404, f"There is no job or training {run_id!r}.")
        service.act_on(run, order)
        return service.queue.seen(service.queue.find(run_id) or run)

    @router.get("/gpus")
    async def gpus() -> dict[str, int]:
        return service.queue.gpus

    @router.put("/gpus/{gpu_type}", status_code=204)
    async def set_gpus(gpu_type: str, order: GpuOrder) -> None:
        service.queue.set_gpus(gpu_type, order.total)

    @router.get("/callbacks")
    async def callbacks(task_id: str | None = None) -> list[CallbackSeen]:
        return service.outbox.seen(task_id)

    @router.post("/callbacks/release", status_code=204)
    async def release() -> None:
        service.outbox.release()

    return router
