"""`.run/stack.json`: how the stack describes itself to programs on this machine (contract §8)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import jwt

from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from local_stack.folder import ProcessRecord, Secrets
from local_stack.parts import LocalParts
from local_stack.temporal_server import NAMESPACE
from runtime.settings import Settings

ACCOUNTS: Final = {"tenant-demo": "user-demo", "tenant-other": "user-other"}
"""Tenant → user: the accounts of the simulators."""
TOKEN_SECONDS: Final = 24 * 3600
REWRITE_SECONDS: Final = 6 * 3600
"""Tokens are renewed this often, so that a stack that stays up never shows expired ones."""
CLOCK_SKEW_SECONDS: Final = 30


def describe(parts: LocalParts, secrets: Secrets, processes: Mapping[str, ProcessRecord]) -> StackDescription:
    return StackDescription(
        temporal_address=parts.temporal.address,
        namespace=NAMESPACE,
        task_queue=TASK_QUEUE,
        ui_url=parts.temporal.ui_url,
        comfyui_url=parts.url("comfyui"),
        credits_url=parts.url("credits"),
        gateway_url=parts.url("gateway"),
        database_dsn=parts.database_dsn,
        callback_secret=secrets.callback_secret,
        pids={name: process.pid for name, process in processes.items()},
        tokens={tenant: token_for(tenant, user, secrets) for tenant, user in ACCOUNTS.items()},
        admin_token=secrets.admin_token,
    )


def token_for(tenant: str, user: str, secrets: Secrets) -> str:
    """A JWT with every scope, valid for 24 hours (contract §7, §8)."""
    now = int(time.time())
    claims = {
        "iss": _default("token_issuer"),
        "aud": _default("token_audience"),
        "iat": now - CLOCK_SKEW_SECONDS,
        "exp": now + TOKEN_SECONDS,
        "tenant_id": tenant,
        "user_id": user,
        "scopes": [scope.value for scope in Scope],
    }
    return jwt.encode(claims, secrets.token_secret, algorithm="HS256")


def _default(setting: str) -> str:
    """The parts run with the default issuer and audience."""
    return str(Settings.model_fields[setting].default)
