"""`python codec_server.py`: decrypts for the Temporal UI and the `temporal` command line (docs/encryption.md).

Temporal's codec server protocol: `POST /decode` and `POST /encode` with `{"payloads": […]}` in proto3 JSON. The token
is a bearer token, or the password of Basic authentication: the UI's browser has no other way to send one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
import uvicorn
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from temporalio.api.common.v1 import Payload, Payloads

from comfyui_temporal.contracts.size_budget import KIB
from comfyui_temporal.encryption import PayloadEncryption, encryption_by
from comfyui_temporal.encryption_keys import EncryptionError
from runtime.door_limits import Door
from runtime.doors import DoorConfig, door_limits_by
from runtime.logs import configure_logs
from runtime.required_settings import CannotStart, read_settings
from runtime.settings import Settings

MAX_BODY_BYTES: Final = 8 * 1024 * KIB
"""A whole gRPC message of Temporal's (4 MiB) in base64 takes 5.4 MiB."""
BODY_SECONDS: Final = 30.0

log = structlog.get_logger("codec_server")

Transform = Callable[[Sequence[Payload]], Coroutine[Any, Any, list[Payload]]]


def create_app(encryption: PayloadEncryption, token: str, *, origins: Sequence[str] = ()) -> Starlette:
    """The ASGI application. `origins`: where the Temporal UI is served from, e.g. `https://temporal.example`."""

    def route(path: str, transform: Transform) -> Route:
        async def answer(request: Request) -> Response:
            _authenticate(request, token)
            payloads = await _payloads(request)
            try:
                transformed = Payloads(payloads=await transform(payloads.payloads))
            except EncryptionError as error:
                log.warning("payload_not_decrypted", code=error.code, reason=str(error))
                return JSONResponse({"code": error.code, "message": str(error)}, HTTPStatus.BAD_REQUEST)
            return Response(
                json_format.MessageToJson(transformed, indent=None),
                headers={"Cache-Control": "no-store"},
                media_type="application/json",
            )

        return Route(path, answer, methods=["POST"])

    async def sign_in(request: Request) -> Response:
        """Opened once in a browser, it makes the browser keep the token for the UI's requests."""
        _authenticate(request, token)
        return PlainTextResponse("This browser is signed in to the codec server.\n")

    async def healthy(_request: Request) -> Response:
        return PlainTextResponse("alive\n")

    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_credentials=True,
        allow_methods=["POST"],
        allow_headers=["Authorization", "Content-Type", "X-Namespace"],
    )
    routes = [route("/encode", encryption.encode), route("/decode", encryption.decode)]
    return Starlette(routes=[*routes, Route("/", sign_in), Route("/healthz", healthy)], middleware=[cors])


def _authenticate(request: Request, token: str) -> None:
    """Raises HTTPException 401."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            given = ""
    elif scheme.lower() != "bearer":
        given = ""
    if not hmac.compare_digest(given.encode(), token.encode()):
        challenge = {"WWW-Authenticate": 'Basic realm="codec server", charset="UTF-8"'}
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "The codec server's token is needed.", challenge)


async def _payloads(request: Request) -> Payloads:
    """Raises HTTPException 400, 408, 413."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {MAX_BODY_BYTES // KIB} KiB.")
    except (TimeoutError, ClientDisconnect):
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT) from None
    try:
        return json_format.Parse(bytes(body), Payloads())
    except (json_format.ParseError, UnicodeDecodeError, RecursionError):
        raise HTTPException(HTTPStatus.BAD_REQUEST, 'The body must be {"payloads": […]} in proto3 JSON.') from None


def app_by(settings: Settings) -> Starlette:
    """Raises CannotStart."""
    encryption = encryption_by(settings.encryption_keys)
    if not encryption.key_ids:
        raise CannotStart("No encryption key is set: set COMFYUI_TEMPORAL_ENCRYPTION_KEYS (docs/encryption.md).")
    if settings.codec_server_token is None:
        raise CannotStart("No token is set: set COMFYUI_TEMPORAL_CODEC_SERVER_TOKEN to a secret of at least 32 bytes.")
    token = settings.codec_server_token.get_secret_value()
    return create_app(encryption, token, origins=settings.codec_server_origins)


def main() -> int:
    try:
        settings = read_settings()
        configure_logs(level=settings.log_level, as_json=settings.log_json, hidden=settings.hidden_values)
        app = app_by(settings)
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again after draining: without a handler it would end us with its number.
        signal.signal(number, lambda *_: None)
    log.info("codec_server_serves", host=settings.codec_server_host, port=settings.codec_server_port)
    door = Door(door_limits_by(settings))
    uvicorn.Server(DoorConfig(app, door, host=settings.codec_server_host, port=settings.codec_server_port)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
