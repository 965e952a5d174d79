"""The edge of both services: token, key, faults and the log of requests around each route's own act.

A request passes: faults that stop it before the service acts → token → idempotency key → the act → faults that change
its answer. Acts are synchronous, so that an effect and the answer kept for it are one transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import structlog
from fastapi import APIRouter, Request, Response

from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.permissions import TokenClaims
from proof.simulators.admin_wire import EDGE_KINDS, Fault, FaultKind, RequestSeen
from proof.simulators.clock import Clock
from proof.simulators.connections import cut
from proof.simulators.faults import Faults, Occasion
from proof.simulators.idempotency import IdempotencyKeys, fingerprint
from proof.simulators.replies import Refused, Reply, Unauthenticated, checked
from proof.simulators.requests_seen import RequestsSeen
from proof.simulators.state_file import StateFile
from proof.simulators.tokens import ALL_SCOPES, Tokens

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
MAX_KEY_CHARACTERS: Final = 256
MAX_SHOWN_CHARACTERS: Final = 64
"""Of each part of a path: ids are shorter, and a token where an id should be is not kept."""
_WAITING = frozenset({FaultKind.DELAY, FaultKind.ACT_LATE, FaultKind.ALTER})
_RATE_LIMIT_MESSAGES = {"estimate": "estimate_rate_limited", "charge": "charge_rate_limited"}
_OUTAGE_MESSAGES = {"estimate": "pricing_unavailable", "charge": "ledger_unavailable"}
_HTML = "<!doctype html><html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
_GARBAGE = b'{"job_id": "job-\xff\xfe", "pre_deduct_id": [[[[ 1e999, NaN'

log = structlog.get_logger(__name__)


@dataclass
class Call:
    """One request as an act sees it."""

    request: Request
    route: str
    body: Any
    claims: TokenClaims
    base_url: str


Act = Callable[[Call], Reply]
Outcome = Literal["acted", "repeated", "refused", "not_acted"]


@dataclass
class _Exchange:
    request: Request
    route: str
    raw: bytes
    body: Any
    key: str | None
    occasion: Occasion
    faults: list[Fault] = field(default_factory=list)

    def waits(self, kind: FaultKind, when: str) -> float:
        """Seconds that faults of this kind make it wait, before or after the act."""
        hits = [fault.parameters for fault in self.faults if fault.kind is kind]
        return sum(hit.seconds or 0 for hit in hits if (hit.when or "before") == when)

    def spoiler(self, when: str) -> Fault | None:
        """The fault that answers in the service's place, if one does."""
        return next((fault for fault in self.faults if fault.kind not in _WAITING and _when(fault) == when), None)


class Edge:
    """`task_of` finds the task of an id in a path or body, for requests that do not name it themselves.

    Without `keeps_keys` every request acts, even with a known key. Without `asks_for_tokens` the caller is the user
    that the body or the query names, with every scope (contract §4, field).
    `public_url` is the base of addresses in answers; else the request's own is.
    `before_act` runs outside of the act's transaction: a refusal does not undo it.
    """

    def __init__(
        self,
        state: StateFile,
        clock: Clock,
        tokens: Tokens,
        faults: Faults,
        task_of: Callable[[str], str | None],
        *,
        before_act: Callable[[], None] = lambda: None,
        keeps_keys: bool = True,
        asks_for_tokens: bool = True,
        public_url: str | None = None,
    ) -> None:
        self.faults = faults
        self.keys = IdempotencyKeys(state, clock)
        self.requests_seen = RequestsSeen(state)
        self._clock = clock
        self._tokens = tokens
        self._task_of = task_of
        self._before_act = before_act
        self._keeps_keys = keeps_keys
        self._asks_for_tokens = asks_for_tokens
        self._public_url = public_url

    def add_route(
        self, router: APIRouter, method: str, path: str, name: str, act: Act, *, is_ours: bool = False
    ) -> None:
        """`is_ours`: a route that contract §2 marks (ours), which a server may not offer."""

        async def answered(request: Request) -> Response:
            return await self._handle(request, name, act, is_ours=is_ours)

        router.add_api_route(path, answered, methods=[method], response_model=None)

    async def _handle(self, request: Request, route: str, act: Act, *, is_ours: bool) -> Response:
        exchange = await self._read(request, route)
        kinds = EDGE_KINDS if is_ours else EDGE_KINDS - {FaultKind.NOT_OFFERED}
        exchange.faults = self.faults.hit(exchange.occasion, kinds)
        await asyncio.sleep(exchange.waits(FaultKind.DELAY, "before"))
        if spoiler := exchange.spoiler("before"):
            return self._spoiled(exchange, spoiler, Reply(0, None), "not_acted")
        reply, outcome = await self._acted(exchange, act)
        await asyncio.sleep(exchange.waits(FaultKind.DELAY, "after"))
        for fault in exchange.faults:
            if fault.kind is FaultKind.ALTER and isinstance(reply.body, dict) and reply.status < 300:
                reply = Reply(reply.status, reply.body | fault.parameters.fields)
        if spoiler := exchange.spoiler("after"):
            return self._spoiled(exchange, spoiler, reply, outcome)
        self._note(exchange, reply.status, outcome)
        return _json(reply)

    async def _read(self, request: Request, route: str) -> _Exchange:
        raw = await _bounded(request)
        body: Any = {}
        try:
            body = read_json(raw, max_bytes=MAX_BODY_BYTES) if raw else {}
        except UnreadableJson as error:
            body = error
        key = request.headers.get("x-idempotency-key")
        task_id = self._task_named(request, body, key)
        occasion = Occasion(route, request.method, task_id, self._tenant_named(request, body))
        return _Exchange(request, route, raw, body, key, occasion)

    def _task_named(self, request: Request, body: Any, key: str | None) -> str | None:
        fields = body if isinstance(body, dict) else {}
        for named in (fields.get("task_id"), request.query_params.get("task_id"), (key or "").partition(":")[0]):
            if isinstance(named, str) and named:
                return named
        for held in (*request.path_params.values(), fields.get("pre_deduct_id")):
            if isinstance(held, str) and (task_id := self._task_of(held)):
                return task_id
        return None

    def _tenant_named(self, request: Request, body: Any) -> str | None:
        try:
            return self._claims(request, body).tenant_id
        except (Refused, Unauthenticated):
            return None

    def _claims(self, request: Request, body: Any) -> TokenClaims:
        """The caller. Raises Unauthenticated, or Refused where no token is required and no user is named."""
        if self._asks_for_tokens:
            return self._tokens.read(request.headers.get("authorization"))
        named = body if request.method == "POST" and isinstance(body, dict) else request.query_params
        who = {name: named.get(name) for name in ("tenant_id", "user_id")}
        return checked(TokenClaims, who | {"scopes": list(ALL_SCOPES)})

    async def _acted(self, exchange: _Exchange, act: Act) -> tuple[Reply, Outcome]:
        late = exchange.waits(FaultKind.ACT_LATE, "before")
        try:
            call = self._call(exchange)
        except (Refused, Unauthenticated) as refusal:
            return refusal.reply(), "refused"
        if not self._looks_at_key(exchange):
            await asyncio.sleep(late)
            self._before_act()
            reply, is_repeat = self.keys.tried(lambda: act(call)), False
        else:
            async with self.keys.only_one(call.claims.tenant_id, exchange.key or ""):
                await asyncio.sleep(late)
                self._before_act()
                print_ = fingerprint(exchange.request.method, exchange.request.url.path, exchange.body)
                reply, is_repeat = self.keys.answer(
                    call.claims.tenant_id, exchange.key or "", print_, lambda: act(call)
                )
        if is_repeat:
            return reply, "repeated"
        return reply, "acted" if reply.status < 400 else "refused"

    def _looks_at_key(self, exchange: _Exchange) -> bool:
        if exchange.request.method == "GET" or not self._keeps_keys:
            return False
        return not self.faults.hit(exchange.occasion, {FaultKind.IGNORE_KEYS})

    def _call(self, exchange: _Exchange) -> Call:
        claims = self._claims(exchange.request, exchange.body)
        if isinstance(exchange.body, UnreadableJson):
            raise Refused("payload_invalid", fields=[f"body: {exchange.body}"])
        wants_key = exchange.request.method == "POST" and self._keeps_keys
        if wants_key and not 0 < len(exchange.key or "") <= MAX_KEY_CHARACTERS:
            raise Refused("payload_invalid", fields=["X-Idempotency-Key: Field required"])
        base_url = self._public_url or str(exchange.request.base_url).rstrip("/")
        return Call(exchange.request, exchange.route, exchange.body, claims, base_url)

    def _spoiled(self, exchange: _Exchange, fault: Fault, reply: Reply, outcome: Outcome) -> Response:
        response = _response_of(fault, exchange.route, reply)
        self._note(exchange, None if fault.kind is FaultKind.DROP else response.status_code, outcome)
        if fault.kind is FaultKind.DROP:
            cut(exchange.request)
        return response

    def _note(self, exchange: _Exchange, status: int | None, outcome: Outcome) -> None:
        kinds = [fault.kind for fault in exchange.faults]
        seen = RequestSeen(
            at=self._clock.now(),
            route=exchange.route,
            method=exchange.request.method,
            path="/".join(part[:MAX_SHOWN_CHARACTERS] for part in exchange.request.url.path.split("/")),
            key=exchange.key,
            tenant_id=exchange.occasion.tenant_id,
            task_id=exchange.occasion.task_id,
            body_sha256=hashlib.sha256(exchange.raw).hexdigest(),
            status=status,
            outcome=outcome,
            faults=kinds,
        )
        self.requests_seen.note(seen)
        log.debug("request", route=seen.route, task_id=seen.task_id, status=status, outcome=outcome, faults=kinds)


async def _bounded(request: Request) -> bytes:
    """The body; of one that is too large only as much as shows it."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk[: MAX_BODY_BYTES + 1 - len(body)]
    return bytes(body)


def _when(fault: Fault) -> str:
    return fault.parameters.when or ("after" if fault.kind is FaultKind.DROP else "before")


def _json(reply: Reply, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(reply.body), reply.status, headers, media_type="application/json")


def _response_of(fault: Fault, route: str, reply: Reply) -> Response:
    """What a fault answers in the service's place; `reply` is what the service had said."""
    given = fault.parameters
    if fault.kind is FaultKind.HTML:
        return Response(_HTML, given.status or 502, given.headers, media_type="text/html")
    if fault.kind is FaultKind.GARBAGE:
        return Response(_GARBAGE, given.status or reply.status or 200, given.headers, media_type="application/json")
    if fault.kind is FaultKind.NOT_OFFERED:
        return _json(Reply(given.status or 404, {"detail": "Not Found"}))
    if fault.kind is FaultKind.RATE_LIMIT:
        body = given.body or Refused(_RATE_LIMIT_MESSAGES.get(route, "rate_limited")).reply().body
        return _json(Reply(429, body), {"Retry-After": f"{given.seconds or 0:.0f}"} | given.headers)
    if fault.kind is FaultKind.ERROR:
        named = _OUTAGE_MESSAGES.get(route) if given.status in (None, 503) else None
        body = given.body or (Refused(named).reply().body if named else {"detail": "Service Unavailable"})
        return _json(Reply(given.status or 503, body), given.headers)
    if isinstance(given.body, str):
        return Response(given.body, given.status or 200, given.headers, media_type="application/json")
    return _json(Reply(given.status or reply.status or 200, given.body), given.headers)
