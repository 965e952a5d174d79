"""One log line for each request: route, task, tenant, answer, time. Never an address: it may hold a token or any text.

Health pages, metrics and the files of the live page are logged at DEBUG. A stream has one line at its end.
"""

from __future__ import annotations

import re
import time
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.audit import caller_in
from gateway.problems import PROBLEM_STATE

log = structlog.get_logger(__name__)

QUIET: Final = frozenset({"/", "/healthz", "/readyz", "/metrics", "/openapi.json"})
QUIET_PREFIX: Final = "/page/"
CALLBACK_OUTCOME: Final = "callback_outcome"
"""Under this name a request's state holds what became of a callback."""
_TASK_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_STARTS: Final = ("http.response.start", "websocket.http.response.start", "websocket.accept")


class RequestLog:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        began, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] in _STARTS:
                status = message.get("status", 101)
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            _log(scope, status, round((time.perf_counter() - began) * 1000))


def _log(scope: Scope, status: int, milliseconds: int) -> None:
    route = getattr(scope.get("route"), "path", None)
    is_quiet = route in QUIET or (route or "").startswith(QUIET_PREFIX)
    state, caller = scope["state"], caller_in(scope)
    task_id = str(scope.get("path_params", {}).get("task_id", ""))
    fields = {
        "task_id": task_id if _TASK_ID.fullmatch(task_id) else None,
        "tenant_id": caller.tenant_id if caller else None,
        "code": state.get(PROBLEM_STATE),
        "outcome": state.get(CALLBACK_OUTCOME),
    }
    (log.debug if is_quiet else log.info)(
        "request",
        method=scope.get("method", "WS"),
        route=route or "unknown",
        status=status,
        milliseconds=milliseconds,
        **{name: str(value) for name, value in fields.items() if value is not None},
    )
