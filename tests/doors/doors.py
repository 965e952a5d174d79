"""The doors of a whole system, the tokens that there are, and which opens which: by contract §7, not by the code."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import jwt

from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.stack import StackDescription
from gateway.access import TOKEN_COOKIE
from local_stack.description import ACCOUNTS, page_url
from local_stack.folder import Secrets
from runtime.settings import Settings
from tests.gateway import test_permissions as gateway_routes

TENANT: Final = "tenant-demo"
EVERY_SCOPE: Final = frozenset(scope.value for scope in Scope)
PLACES: Final = ("header", "address", "cookie")
Route = tuple[str, str]

_RUNS: Final = frozenset(
    {
        ("POST", "/comfyui/v1/jobs"),
        ("GET", "/comfyui/v1/jobs/{run_id}"),
        ("POST", "/comfyui/v1/jobs/{run_id}/cancel"),
        ("GET", "/comfyui/v1/gpus"),
        ("GET", "/comfyui/v1/templates"),
        ("POST", "/comfyui/v1/training"),
        ("GET", "/comfyui/v1/training/{run_id}"),
        ("POST", "/comfyui/v1/training/{run_id}/start"),
        ("POST", "/comfyui/v1/training/{run_id}/cancel"),
    }
)
_SWITCHBOARD: Final = frozenset(
    {
        *(("GET", f"/admin/{name}") for name in ("faults", "clock", "requests")),
        *(("POST", f"/admin/{name}") for name in ("faults", "schedule", "clock", "reset")),
        *(("DELETE", path) for path in ("/admin/faults", "/admin/faults/{fault_id}")),
    }
)
SERVICE_ROUTES: Final[dict[str, frozenset[Route]]] = {
    "bridge": _RUNS,
    "comfyui": _RUNS,
    "credits": frozenset(
        {
            *(("POST", f"/api/v1/credits/{name}") for name in ("estimate", "pre-deduct", "commit", "cancel", "charge")),
            *(("GET", f"/api/v1/credits/{name}") for name in ("balance", "ledger")),
        }
    ),
}
ADMIN_ROUTES: Final[dict[str, frozenset[Route]]] = {
    "comfyui": _SWITCHBOARD
    | {
        *(("GET", f"/admin/{name}") for name in ("jobs", "gpus", "callbacks")),
        *(("POST", path) for path in ("/admin/jobs/{run_id}", "/admin/callbacks/release")),
        ("PUT", "/admin/gpus/{gpu_type}"),
    },
    "credits": _SWITCHBOARD
    | {
        *(("GET", f"/admin/{name}") for name in ("accounts", "holds", "ledger", "balance-check")),
        *(("POST", f"/admin/holds/{{pre_deduct_id}}/{act}") for act in ("expire", "cancel")),
        ("PUT", "/admin/accounts/{tenant_id}/{user_id}"),
        ("PUT", "/admin/authorizations/{tenant_id}/{template_id}"),
    },
}
OPEN_ROUTES: Final[dict[str, frozenset[Route]]] = {
    "gateway": frozenset(gateway_routes.OPEN - {("POST", "/callbacks/comfyui/{task_id}")}),
    "bridge": frozenset({("GET", "/healthz"), ("GET", "/openapi.json")}),
    "comfyui": frozenset({*(("GET", path) for path in ("/health", "/openapi.json", "/results/{run_id}/{number}.png"))}),
    "credits": frozenset({("GET", "/health"), ("GET", "/openapi.json")}),
}
SIGNED_ROUTES: Final[dict[str, frozenset[Route]]] = {
    "gateway": frozenset({("POST", "/callbacks/comfyui/{task_id}")}),
    "bridge": frozenset({(method, "/comfyui/files/{path:path}") for method in ("GET", "HEAD")}),
}
"""A signature opens them, and no token does."""


@dataclass(frozen=True)
class Token:
    """`kind`: what it is; None if it must open no closed door. `tenant`: the tenant that it names."""

    name: str
    text: str | None
    kind: str | None = None
    scopes: Collection[str] = EVERY_SCOPE
    tenant: str = TENANT


@dataclass(frozen=True)
class Door:
    """`kinds`: the tokens that open it; None: everybody may come in. `scope`: what such a token must have."""

    party: str
    method: str
    path: str
    kinds: frozenset[str] | None
    scope: str | None = None

    def __str__(self) -> str:
        return f"{self.party} {self.method} {self.path}"

    @property
    def is_stream(self) -> bool:
        return self.kinds is not None and "stream" in self.kinds

    def opens_for(self, token: Token, place: str) -> bool:
        if self.kinds is None:
            return True
        is_right = token.kind in self.kinds and (self.scope is None or self.scope in token.scopes)
        if place == "header":
            return is_right
        # Browsers open streams without headers. An address holds what opens streams and nothing else.
        return is_right and self.is_stream and (place == "cookie" or token.kind == "stream")

    def is_tried_with(self, token: Token, place: str) -> bool:
        """Every token in the header; elsewhere, where only streams look for it, the good ones are enough."""
        is_stream = self.path.endswith(("/sse", "/ws"))
        return place == "header" or (token.text is not None and (is_stream or token.kind is not None))

    def is_closed_by(self, status: int) -> bool:
        """Whether this answer says: not with this token. An unsigned result is as unknown as none."""
        return status in (401, 403) or (status == 404 and self.path.startswith("/comfyui/files/"))


def all_doors() -> Iterator[Door]:
    for (method, path), scope in gateway_routes.NEEDS.items():
        kinds = {"caller", "stream"} if (method, path) in gateway_routes.STREAMS else {"caller"}
        yield Door("gateway", method, path, frozenset(kinds), scope)
    for table, kinds in ((SERVICE_ROUTES, {"service"}), (ADMIN_ROUTES, {"admin"}), (SIGNED_ROUTES, set())):
        for party, routes in table.items():
            yield from (Door(party, *route, frozenset(kinds)) for route in sorted(routes))
    for party, routes in OPEN_ROUTES.items():
        yield from (Door(party, *route, None) for route in sorted(routes))


DOORS: Final = {str(door): door for door in all_doors()}


def all_tokens(stack: StackDescription, secrets: Secrets, stream_token: str, signature: str) -> list[Token]:
    """Each token of ours; then each that is wrong in one way; then each secret, sent as if it were a token."""

    def signed(kind: str, secret: str, *, audience: str = "", seconds: int = 300) -> str:
        claims = {
            "iss": Settings.model_fields[f"{kind}_issuer"].default,
            "aud": Settings.model_fields[f"{audience or kind}_audience"].default,
            "exp": int(time.time()) + seconds,
            **{"tenant_id": TENANT, "user_id": ACCOUNTS[TENANT], "scopes": sorted(EVERY_SCOPE)},
        }
        return jwt.encode(claims, secret, algorithm="HS256" if secret else "none")

    callers, services = secrets.caller_secret, secrets.service_secret
    another = "marked0secret that is nobody's, of 32 bytes and more"
    page = page_url(stack, TENANT, secrets).rpartition("=")[2]
    return [
        *(Token(f"a caller's of {tenant}", text, "caller", tenant=tenant) for tenant, text in stack.tokens.items()),
        *(Token(f"a service's for {one}", text, "service", tenant=one) for one, text in stack.service_tokens.items()),
        Token("the live page's", page, "caller", EVERY_SCOPE - {Scope.CREDITS_ROLLBACK.value}),
        Token("a stream's", stream_token, "stream", {Scope.TASK_READ.value}),
        Token("the switchboard's", stack.admin_token, "admin"),
        Token("none", None),
        Token("an expired caller's", signed("caller", callers, seconds=-60)),
        Token("an expired service's", signed("service", services, seconds=-60)),
        Token("a caller's for the services' audience", signed("caller", callers, audience="service")),
        Token("a service's for the callers' audience", signed("service", services, audience="caller")),
        Token("a caller's of another key", signed("caller", another)),
        Token("a caller's of the services' key", signed("caller", services)),
        Token("a service's of another key", signed("service", another)),
        Token("a service's of the callers' key", signed("service", callers)),
        Token("an unsigned caller's", signed("caller", "")),
        Token("an unsigned service's", signed("service", "")),
        *(Token(f"the secret {name}", value) for name, value in secrets.model_dump().items() if name != "admin_token"),
        Token("a callback's signature", signature),
    ]


def sent_with(token: Token, place: str) -> tuple[dict[str, str], dict[str, str]]:
    """Headers and query of a request with this token in this place."""
    if token.text is None:
        return {}, {}
    match place:
        case "header":
            return {"authorization": f"Bearer {token.text}"}, {}
        case "address":
            return {}, {"token": token.text}
    return {"cookie": f"{TOKEN_COOKIE}={token.text}"}, {}
