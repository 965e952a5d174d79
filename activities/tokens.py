"""Bearer tokens for our calls (contract §7): made for each call, or one static service token."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Protocol

import jwt

from comfyui_temporal.contracts.permissions import Scope

LIFETIME_SECONDS: Final = 300
CLOCK_SKEW_SECONDS: Final = 30
MIN_SECRET_BYTES: Final = 32


class TokenMaker(Protocol):
    """Returns the bearer token of one call: it names a tenant, a user and the one scope that the call needs."""

    def __call__(self, *, tenant_id: str, user_id: str, scope: Scope) -> str: ...


@dataclass(frozen=True)
class SignedTokens:
    """HS256 JWTs, valid 5 minutes. Raises ValueError for a secret of fewer than 32 bytes.

    `iat` is set 30 s back, so that a service whose clock is a little slow accepts the token.
    """

    secret: str = field(repr=False)
    issuer: str
    audience: str

    def __post_init__(self) -> None:
        if len(self.secret.encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"the token secret must be at least {MIN_SECRET_BYTES} bytes long")

    def __call__(self, *, tenant_id: str, user_id: str, scope: Scope) -> str:
        return self.with_scopes(tenant_id=tenant_id, user_id=user_id, scopes=(scope,))

    def with_scopes(self, *, tenant_id: str, user_id: str, scopes: Collection[Scope]) -> str:
        """A token with several scopes, or with none."""
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": self.audience,
            "iat": now - CLOCK_SKEW_SECONDS,
            "exp": now + LIFETIME_SECONDS,
            "tenant_id": tenant_id,
            "user_id": user_id,
            "scopes": [scope.value for scope in scopes],
        }
        return jwt.encode(claims, self.secret, algorithm="HS256")


@dataclass(frozen=True)
class ServiceToken:
    """One static token for every call, if a service accepts only that. Raises ValueError if no header can hold it."""

    token: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.token or not all("\x21" <= character <= "\x7e" for character in self.token):
            raise ValueError("the service token must be printable ASCII without blanks")

    def __call__(self, *, tenant_id: str, user_id: str, scope: Scope) -> str:
        return self.token
