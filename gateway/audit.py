"""The audit log: one line and one row for each request that acts, or that a known caller is refused.

    starts, cancels, confirmations, rollbacks   every answer, refusals too
    uploads                                     their beginning and their deletion, refusals too
    reads, streams, parts of uploads            only 403: the token is known and lacks the scope
    without a usable token (401)                only the line: nobody is known, and strangers must not fill a table

`Access` notes operation and caller; the answer shows the rest. The row is written after the answer: an outage of the
store delays no request, and is logged as `audit_not_stored` with the same fields. `at` gives the order, not `id`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

import structlog
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfyui_temporal.contracts.permissions import Operation
from gateway.problems import PROBLEM_STATE, ProblemCode
from gateway.task_bodies import TASKS
from runtime.caller_tokens import Caller
from store import AuditRecord, StoreFailure, TaskStore

log = structlog.get_logger(__name__)

_OPERATION: Final = "audited_operation"
_CALLER: Final = "audited_caller"
_STARTS: Final = ("http.response.start", "websocket.http.response.start")
_TASK_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MANY: Final = frozenset({Operation.READ_TASK, Operation.CONTINUE_UPLOAD})
"""What one caller does again and again."""


def note_operation(connection: HTTPConnection, operation: Operation) -> None:
    """Call it before anything can be refused."""
    setattr(connection.state, _OPERATION, operation)


def note_caller(connection: HTTPConnection, caller: Caller) -> None:
    """Call it once the caller is known, before its scopes are checked."""
    setattr(connection.state, _CALLER, caller)


def caller_in(scope: Scope) -> Caller | None:
    """The caller of a request, once it is known."""
    caller: Caller | None = scope["state"].get(_CALLER)
    return caller


class AuditLog:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, store: TaskStore) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        status, location, answered_at = 500, "", None

        async def seen(message: Message) -> None:
            nonlocal status, location, answered_at
            if message["type"] in _STARTS:
                status, answered_at = message["status"], datetime.now(UTC)
                location = dict(message.get("headers", ())).get(b"location", b"").decode("latin-1")
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            await self._record(scope, status, location, answered_at or datetime.now(UTC))

    async def _record(self, scope: Scope, status: int, location: str, at: datetime) -> None:
        operation: Operation | None = scope["state"].get(_OPERATION)
        code: ProblemCode | None = scope["state"].get(PROBLEM_STATE)
        is_refused = code in (ProblemCode.UNAUTHENTICATED, ProblemCode.NOT_AUTHORIZED)
        if operation is None or (operation in _MANY and not is_refused):
            return
        caller = caller_in(scope)
        if caller is None:
            log.info("audit", operation=operation.value, status=status, code=code, tenant_id=None)
            return
        # A start's answer names the task.
        started = location.rpartition("/")[2] if location.startswith(TASKS) else ""
        task_id = scope.get("path_params", {}).get("task_id") or started
        record = AuditRecord(
            at=at,
            operation=operation,
            status=status,
            code=code,
            tenant_id=caller.tenant_id,
            user_id=caller.user_id,
            token_id=caller.token_id,
            task_id=task_id if _TASK_ID.fullmatch(task_id) else None,
        )
        log.info("audit", **record.model_dump(mode="json"))
        try:
            await self._store.append_audit(record)
        except StoreFailure as error:
            log.error("audit_not_stored", reason=str(error), **record.model_dump(mode="json"))
