"""ComfyUI's routes. Each also answers below `/api`."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import sys
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse

from proof.simulators.connections import cut
from tests.bridge.native import jobs
from tests.bridge.native.definitions import model_folders
from tests.bridge.native.drawing import Saving
from tests.bridge.native.prompt_queue import Json
from tests.bridge.native.sockets import FEATURES
from tests.bridge.native.state import Native

VERSION: Final = "0.8.0"


async def _json_body(request: Request) -> Json:
    try:
        body = await request.json()
    except json.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def prompt_routes(native: Native) -> APIRouter:
    router = APIRouter()

    @router.get("/prompt")
    async def get_prompt() -> Json:
        return native.status()

    @router.post("/prompt")
    async def post_prompt(request: Request) -> Response:
        lost = native.traps.lose_prompt
        if lost.get("before", 0) > 0:
            lost["before"] -= 1
            cut(request)
            return Response(status_code=500)
        status, answer = native.submit(await _json_body(request))
        if lost.get("after", 0) > 0:
            lost["after"] -= 1
            cut(request)
        return JSONResponse(answer, status_code=status)

    @router.get("/queue")
    async def get_queue() -> Json:
        return {
            "queue_running": [list(item) for item in native.queue.running.values()],
            "queue_pending": [list(item) for item in native.queue.pending],
        }

    @router.post("/queue")
    async def post_queue(request: Request) -> Response:
        body = await _json_body(request)
        if body.get("clear"):
            native.queue.wipe()
        for prompt_id in body.get("delete", []):
            native.queue.delete(prompt_id)
        return Response()

    @router.post("/interrupt")
    async def post_interrupt(request: Request) -> Response:
        prompt_id = (await _json_body(request)).get("prompt_id")
        if prompt_id and native.traps.targeted_interrupt and not native.queue.is_running(prompt_id):
            return Response()
        await asyncio.sleep(native.traps.interrupt_delay_seconds)
        native.executor.interrupt = True
        return Response()

    @router.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        if native.traps.websocket_refused:
            await socket.close()
            return
        await native.sockets.serve(socket, native.status, native.executing)

    return router


def reading_routes(native: Native) -> APIRouter:
    router = APIRouter()

    @router.get("/history")
    async def get_history(max_items: int | None = None, offset: int = -1) -> Json:
        items = list(native.queue.history.items())
        if max_items is None:
            return dict(items)
        start = len(items) - max_items if offset < 0 else offset
        return dict(items[max(start, 0) :][:max_items])

    @router.get("/history/{prompt_id}")
    async def get_history_of(prompt_id: str) -> Json:
        found = native.queue.history.get(prompt_id)
        return {prompt_id: found} if found else {}

    @router.post("/history")
    async def post_history(request: Request) -> Response:
        body = await _json_body(request)
        if body.get("clear"):
            native.queue.history.clear()
        for prompt_id in body.get("delete", []):
            native.queue.history.pop(prompt_id, None)
        return Response()

    @router.get("/object_info")
    async def object_info() -> Json:
        return native.definitions.all(native.traps.models)

    @router.get("/node_replacements")
    async def node_replacements() -> Response:
        replaced = native.traps.replaced_nodes
        if not replaced:
            return Response(status_code=404)
        rows = {old: [{"new_node_id": new, "old_node_id": old}] for old, new in replaced.items()}
        return JSONResponse(rows)

    @router.get("/object_info/{node_class}")
    async def object_info_of(node_class: str) -> Json:
        known = native.definitions.known(node_class)
        return {node_class: native.definitions.of(node_class, native.traps.models)} if known else {}

    @router.get("/system_stats")
    async def system_stats() -> Json:
        return _system_stats()

    @router.get("/features")
    async def features() -> Json:
        return FEATURES

    @router.get("/models")
    async def models() -> list[str]:
        return model_folders()

    @router.get("/models/{folder}")
    async def models_of(folder: str) -> Response:
        if folder not in model_folders():
            return Response(status_code=404)
        return JSONResponse(native.definitions.files(folder, native.traps.models))

    @router.post("/free")
    async def free() -> Response:
        return Response()

    return router


def file_routes(native: Native) -> APIRouter:
    router = APIRouter()

    @router.post("/upload/image")
    async def upload_image(request: Request) -> Response:
        if int(request.headers.get("content-length", 0)) > native.traps.max_upload_bytes:
            return Response("Maximum request body size exceeded", status_code=413)
        filename, content, fields = _parts(request.headers.get("content-type", ""), await request.body())
        if not filename:
            return Response(status_code=400)
        return _uploaded(native.saving, filename, content, fields)

    @router.get("/view")
    async def view(filename: str = "", subfolder: str = "", type: str = "output") -> Response:
        if not filename:
            return Response(status_code=404)
        if filename[0] == "/" or ".." in filename or type not in native.saving.folders:
            return Response(status_code=400)
        try:
            path = native.saving.find(type, subfolder, filename)
        except PermissionError:
            return Response(status_code=403)
        if path is None:
            return Response(status_code=404)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, headers={"Content-Disposition": f'filename="{path.name}"'})

    return router


def _parts(content_type: str, body: bytes) -> tuple[str, bytes, dict[str, str]]:
    """A multipart form: the `image` part's file name and bytes, and the plain fields."""
    form = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    filename, content, fields = "", b"", {}
    for part in form.iter_parts():
        name = part.get_param("name", header="content-disposition")
        raw = part.get_payload(decode=True)
        assert isinstance(raw, bytes)
        if name == "image" and part.get_filename():
            filename, content = str(part.get_filename()), raw
        else:
            fields[str(name)] = raw.decode()
    return filename, content, fields


def _uploaded(saving: Saving, filename: str, content: bytes, fields: dict[str, str]) -> Response:
    """Without `overwrite`, other bytes under a known name get a new name, and the same bytes keep it."""
    kind, subfolder = fields.get("type", "input"), fields.get("subfolder", "")
    root = saving.folders.get(kind)
    if root is None:
        return Response(status_code=400)
    folder = root / subfolder
    if not (folder / filename).resolve().is_relative_to(root.resolve()):
        return Response(status_code=400)
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / filename, 1
    if fields.get("overwrite") not in {"true", "1"}:
        while path.exists() and path.read_bytes() != content:
            path = folder / f"{Path(filename).stem} ({number}){Path(filename).suffix}"
            number += 1
    path.write_bytes(content)
    return JSONResponse({"name": path.name, "subfolder": subfolder, "type": kind})


def jobs_routes(native: Native) -> APIRouter:
    """In ComfyUI these are defined as `/api/jobs` (and so also answer below `/api/api/jobs`)."""
    router = APIRouter(prefix="/api/jobs")

    @router.get("")
    async def get_jobs(request: Request) -> Response:
        if native.traps.jobs_api == "none":
            return Response(status_code=404)
        return jobs.listed(native.queue, request.query_params)

    @router.get("/{job_id}")
    async def get_job(job_id: str) -> Response:
        if native.traps.jobs_api == "none":
            return Response(status_code=404)
        job = jobs.find(native.queue, job_id)
        return JSONResponse(job) if job else JSONResponse({"error": "Job not found"}, status_code=404)

    @router.post("/{job_id}/cancel")
    async def cancel(job_id: str) -> Response:
        """Atomic, and always 200: removes a pending prompt or interrupts the running one, otherwise false."""
        if native.traps.jobs_api != "cancel":
            return Response(status_code=404 if native.traps.jobs_api == "none" else 405)
        if native.queue.delete(job_id):
            return JSONResponse({"cancelled": True})
        is_running = native.queue.is_running(job_id)
        native.executor.interrupt = native.executor.interrupt or is_running
        return JSONResponse({"cancelled": is_running})

    return router


def internal_routes(native: Native) -> APIRouter:
    """ComfyUI's own page reads these. They do not answer below `/api`."""
    router = APIRouter(prefix="/internal")

    @router.get("/logs/raw")
    async def raw_logs() -> Json:
        return {"entries": list(native.executor.logs), "size": {"cols": 80, "rows": 24}}

    return router


def _system_stats() -> Json:
    memory = 24 * 1024**3
    return {
        "system": {
            "os": "linux",
            "ram_total": memory,
            "ram_free": memory // 2,
            "comfyui_version": VERSION,
            "required_frontend_version": "1.35.9",
            "installed_templates_version": "0.7.67",
            "required_templates_version": "0.7.67",
            "python_version": sys.version,
            "pytorch_version": "2.9.1+cpu",
            "embedded_python": False,
            "argv": ["main.py", "--cpu"],
        },
        "devices": [
            {
                "name": "cpu",
                "type": "cpu",
                "index": None,
                "vram_total": memory,
                "vram_free": memory // 2,
                "torch_vram_total": memory,
                "torch_vram_free": memory // 2,
            }
        ],
    }
