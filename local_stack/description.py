"""`.run/stack.json`: how the stack describes itself to programs on this machine (contract §8); the live page's link."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

import jwt

from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.stack import StackDescription
from local_stack.folder import ProcessRecord, Secrets
from local_stack.own_services import PREFIX, tokens_of_own_services
from local_stack.parts import LocalParts
from local_stack.temporal_server import NAMESPACE
from runtime.settings import Settings

ACCOUNTS: Final = {"tenant-demo": "user-demo", "tenant-other": "user-other"}
"""Tenant → user: the accounts of the simulators."""
TOKEN_SECONDS: Final = 24 * 3600
REWRITE_SECONDS: Final = 6 * 3600
"""Tokens are renewed this often, so that a stack that stays up never shows expired ones."""
PAGE_SECONDS: Final = 15 * 60
"""A link is copied, kept in histories and seen over shoulders: it lives for minutes. `make status` prints a new one."""
PAGE_SCOPES: Final = (Scope.IMAGE_GENERATE, Scope.MODEL_TRAIN, Scope.TASK_READ, Scope.TASK_CANCEL)
CLOCK_SKEW_SECONDS: Final = 30


def describe(parts: LocalParts, secrets: Secrets, processes: Mapping[str, ProcessRecord]) -> StackDescription:
    return StackDescription(
        temporal_address=parts.temporal.address,
        namespace=NAMESPACE,
        task_queue=parts.task_queue,
        ui_url=parts.temporal.ui_url,
        comfyui_url=parts.comfyui_url,
        credits_url=parts.credits_url,
        gateway_url=parts.url("gateway"),
        database_dsn=parts.database_dsn,
        callback_secret=secrets.callback_secret,
        pids={name: process.pid for name, process in processes.items()},
        tokens={tenant: caller_token(tenant, user, secrets) for tenant, user in ACCOUNTS.items()},
        service_tokens={tenant: service_token(tenant, user, secrets) for tenant, user in ACCOUNTS.items()},
        admin_token=secrets.admin_token,
    )


def page_url(stack: StackDescription, tenant: str, secrets: Secrets) -> str:
    """The tenant's live page. A token that lives for minutes is in the fragment, which browsers do not send."""
    token = caller_token(tenant, ACCOUNTS[tenant], secrets, seconds=PAGE_SECONDS, scopes=PAGE_SCOPES)
    return f"{stack.gateway_url}/#token={token}"


def caller_token(
    tenant: str, user: str, secrets: Secrets, *, seconds: int = TOKEN_SECONDS, scopes: Collection[Scope] = tuple(Scope)
) -> str:
    """Opens the gateway and nothing else (contract §7)."""
    return _token("caller", secrets.caller_secret, tenant, user, seconds, scopes)


def service_token(tenant: str, user: str, secrets: Secrets) -> str:
    """Opens ComfyUI and the credits service and nothing else, with every scope, for 24 hours (contract §7, §8)."""
    own = {name.removeprefix(PREFIX).lower(): value for name, value in tokens_of_own_services().items()}
    if "service_token" in own:
        return own["service_token"]
    secret = own.get("service_secret", secrets.service_secret)
    return _token("service", secret, tenant, user, TOKEN_SECONDS, tuple(Scope), own)


def _token(
    kind: str,
    secret: str,
    tenant: str,
    user: str,
    seconds: int,
    scopes: Collection[Scope],
    own: Mapping[str, str] = MappingProxyType({}),
) -> str:
    now = int(time.time())
    claims = {
        # Otherwise the parts run with the default issuers and audiences.
        "iss": own.get(f"{kind}_issuer", Settings.model_fields[f"{kind}_issuer"].default),
        "aud": own.get(f"{kind}_audience", Settings.model_fields[f"{kind}_audience"].default),
        "iat": now - CLOCK_SKEW_SECONDS,
        "exp": now + seconds,
        "tenant_id": tenant,
        "user_id": user,
        "scopes": [scope.value for scope in scopes],
    }
    return jwt.encode(claims, secret, algorithm="HS256")
