"""`/comfyui/v1` over HTTP (contract §2, §3), result files, and `/healthz`.

A request is checked in this order: stated size → token → scope → its body → idempotency key → the action (service.py,
training_service.py). Nothing is read for a stranger; nothing is stored or started for a token that lacks the scope.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Final
from urllib.parse import quote

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from bridge.file_types import type_of
from bridge.replies import Action, Call, Refused, Unanswered, Unauthenticated
from bridge.runs import Keys
from bridge.service import ImageService
from bridge.storage import RESULTS_PATH, STORAGE_ERRORS, SignedAddresses, Storage
from bridge.training_service import TrainingService
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.paths import is_plain
from comfyui_temporal.contracts.permissions import Operation, TokenClaims
from comfyui_temporal.encryption_keys import EncryptionError
from runtime.caller_tokens import CallerTokens, TokenRefused, TokensUnverifiable
from runtime.stated_size import is_stated_above
from runtime.trace_context import REQUEST_SPANS

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""A training's list of files may be long."""
BODY_SECONDS: Final = 15.0
MAX_KEY_CHARACTERS: Final = 256
SHOWN_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif", "video/mp4", "video/webm"})
"""Browsers may show these. All other results are downloads."""
UNSATISFIABLE: Final = (0, 0)
"""The part that a `Range` asks for when the result has no such bytes."""

log = structlog.get_logger(__name__)


class Edge:
    """Body limits, authentication, idempotency and logging around an action."""

    def __init__(self, tokens: CallerTokens, keys: Keys) -> None:
        self._tokens = tokens
        self._keys = keys

    def add_route(
        self,
        router: APIRouter,
        method: str,
        path: str,
        operation: Operation,
        action: Action,
        *,
        begins: bool = False,
    ) -> None:
        """`begins`: the action starts a workflow under the request's idempotency key."""

        async def answered(request: Request) -> Response:
            return await self._handle(request, operation, action, begins=begins)

        router.add_api_route(path, answered, methods=[method], response_model=None)

    async def _handle(self, request: Request, operation: Operation, action: Action, *, begins: bool) -> Response:
        try:
            if is_stated_above(request.headers.get("content-length"), MAX_BODY_BYTES):
                raise _too_large()
            claims = await self._claims(request.headers.get("authorization"))
            if not claims.allows(operation):
                raise Refused("authorization_missing")
            call = await self._call(request, claims)
            if request.method == "GET":
                reply = await action(call)
            else:
                reply = await (self._keys.once(call, action) if begins else self._keys.claimed(call, action))
        except (Refused, Unanswered, Unauthenticated) as refusal:
            reply = refusal.reply()
        except EncryptionError as error:
            log.error("temporal_data_undecryptable", code=error.code, detail=str(error))
            reply = Unanswered(503, "the bridge lacks the key that this job is encrypted with").reply()
        log.info("request", method=request.method, route=request.scope["route"].path, status=reply.status)
        return Response(json.dumps(reply.body), reply.status, reply.headers, media_type="application/json")

    async def _call(self, request: Request, claims: TokenClaims) -> Call:
        raw = await _body(request)
        try:
            body = read_json(raw, max_bytes=MAX_BODY_BYTES) if raw else {}
        except UnreadableJson as error:
            raise Refused("payload_invalid", fields=[f"body: {error}"]) from None
        key = request.headers.get("x-idempotency-key") or ""
        if request.method == "POST" and not 0 < len(key) <= MAX_KEY_CHARACTERS:
            raise Refused("payload_invalid", fields=["X-Idempotency-Key: Field required"])
        return Call(request.url.path, body, claims, key, request.path_params.get("run_id", ""))

    async def _claims(self, authorization: str | None) -> TokenClaims:
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("a bearer token is missing")
        try:
            return await self._tokens.read(token.strip())
        except TokenRefused as refused:
            raise Unauthenticated(str(refused)) from None
        except TokensUnverifiable:
            raise Unanswered(503, "the keys for tokens cannot be read now") from None


def _too_large() -> Refused:
    return Refused("payload_invalid", fields=[f"body: larger than {MAX_BODY_BYTES} bytes"])


async def _body(request: Request) -> bytes:
    """The whole body. Raises Refused if it is too large, Unanswered if it is too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise Unanswered(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    return bytes(body)


def bridge_app(
    edge: Edge, images: ImageService, trainings: TrainingService, storage: Storage, signed: SignedAddresses
) -> FastAPI:
    app = FastAPI(title="ComfyUI bridge", docs_url=None, redoc_url=None, telemetry=REQUEST_SPANS)
    app.include_router(_job_routes(edge, images))
    app.include_router(_training_routes(edge, trainings))
    app.include_router(_result_routes(storage, signed))

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    return app


def _job_routes(edge: Edge, images: ImageService) -> APIRouter:
    router = APIRouter(prefix="/comfyui/v1")
    edge.add_route(router, "POST", "/jobs", Operation.CREATE_JOB, images.submit, begins=True)
    edge.add_route(router, "GET", "/jobs/{run_id}", Operation.READ_COMFYUI, images.get)
    edge.add_route(router, "POST", "/jobs/{run_id}/cancel", Operation.CANCEL_JOB, images.cancel)
    edge.add_route(router, "GET", "/gpus", Operation.READ_COMFYUI, images.gpus)
    edge.add_route(router, "GET", "/templates", Operation.READ_COMFYUI, images.templates)
    return router


def _training_routes(edge: Edge, trainings: TrainingService) -> APIRouter:
    router = APIRouter(prefix="/comfyui/v1")
    edge.add_route(router, "POST", "/training", Operation.CREATE_TRAINING, trainings.create, begins=True)
    edge.add_route(router, "GET", "/training/{run_id}", Operation.READ_COMFYUI, trainings.get)
    edge.add_route(router, "POST", "/training/{run_id}/start", Operation.START_TRAINING, trainings.start)
    edge.add_route(router, "POST", "/training/{run_id}/cancel", Operation.CANCEL_JOB, trainings.cancel)
    return router


def _result_routes(storage: Storage, signed: SignedAddresses) -> APIRouter:
    router = APIRouter()

    @router.api_route(RESULTS_PATH + "/{path:path}", methods=["GET", "HEAD"])
    async def result(request: Request, path: str, expires: int = 0, signature: str = "") -> Response:
        """A result, whole or in part, if its signed address has not expired. Otherwise 404, as for an unknown one."""
        if not is_plain(path) or not signed.is_valid(path, expires=expires, signature=signature):
            return _detail(404, "There is no such result, or its address has expired.")
        try:
            size = await storage.size_bytes(path)
        except FileNotFoundError:
            return _detail(404, "There is no such result, or its address has expired.")
        except STORAGE_ERRORS:
            return _detail(503, "The storage of results cannot be read now.")
        headers = _result_headers(path)
        part = asked_part(request.headers.get("range") if request.method == "GET" else None, size)
        if part == UNSATISFIABLE:
            headers["Content-Range"] = f"bytes */{size}"
            return Response(status_code=416, headers=headers)
        start, end = part or (0, size)
        headers["Content-Length"] = str(end - start)
        if part is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        kind, status = type_of(path, ""), 200 if part is None else 206
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=kind)
        content = storage.read(path) if part is None else storage.read_part(path, start, end)
        return StreamingResponse(content, status, headers=headers, media_type=kind)

    return router


def _result_headers(path: str) -> dict[str, str]:
    """A result's file name, and what keeps a browser from running what is in it."""
    name = path.rpartition("/")[2]
    shown = "inline" if type_of(path, "") in SHOWN_TYPES else "attachment"
    plain = "".join(character if character.isascii() else "_" for character in name)
    return {
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=3600",
        "Content-Disposition": f"{shown}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
    }


def asked_part(header: str | None, size: int) -> tuple[int, int] | None:
    """The part [start, end) that a `Range` asks for; None for the whole.

    Several parts in one request and other units are answered with the whole, as RFC 9110 allows.
    """
    found = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", header or "")
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    return (start, end) if start < end else UNSATISFIABLE


def _detail(status: int, sentence: str) -> Response:
    return Response(json.dumps({"detail": sentence}), status, media_type="application/json")
