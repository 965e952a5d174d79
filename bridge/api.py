"""`/comfyui/v1` over HTTP (contract §2, §3) and `/healthz`; result files are in result_routes.py.

A request is checked in this order: stated size → token → scope → its body → idempotency key → the action (service.py,
training_service.py). Nothing is read for a stranger; nothing is stored or started for a token that lacks the scope.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

import structlog
from fastapi import APIRouter, FastAPI, Request, Response

from bridge.replies import Action, Call, Refused, Unanswered, Unauthenticated
from bridge.result_routes import result_routes
from bridge.runs import Keys
from bridge.service import ImageService
from bridge.storage import SignedAddresses, Storage
from bridge.training_service import TrainingService
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.permissions import Operation, TokenClaims
from comfyui_temporal.encryption_keys import EncryptionError
from runtime.caller_tokens import CallerTokens, TokenRefused, TokensUnverifiable
from runtime.stated_size import is_stated_above
from runtime.trace_context import REQUEST_SPANS

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""A training's list of files may be long."""
BODY_SECONDS: Final = 15.0
MAX_KEY_CHARACTERS: Final = 256

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
    app.include_router(result_routes(storage, signed))

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
