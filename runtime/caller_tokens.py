"""Authenticates by JWTs (contract §7): the gateway's callers, and the services that call the bridge.

Deliberately narrow: the algorithms depend on how the keys are configured, never on the token's header; issuer,
audience and expiry are required; any error of the JWT library is a refusal, never an error of ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import httpx
import jwt
import structlog
from pydantic import ValidationError

from comfyui_temporal.contracts.fields import repaired, shortened
from comfyui_temporal.contracts.permissions import TokenClaims
from comfyui_temporal.contracts.size_budget import MAX_NAME_BYTES

log = structlog.get_logger(__name__)

MIN_SECRET_BYTES: Final = 32
MAX_TOKEN_BYTES: Final = 8 * 1024
ID_CHARACTERS: Final = 16
LEEWAY_SECONDS: Final = 10
JWKS_ALGORITHMS: Final = ("RS256", "PS256", "ES256", "EdDSA")
JWKS_KEPT_SECONDS: Final = 300.0
JWKS_AGAIN_AFTER_SECONDS: Final = 10.0
JWKS_TIMEOUT_SECONDS: Final = 5.0
MAX_JWKS_BYTES: Final = 256 * 1024


class TokenRefused(Exception):
    """The token does not identify its owner. The text says why, without the token."""


class TokensUnverifiable(Exception):
    """The keys cannot be read now: no caller can be authenticated, and no token is to blame."""


class Caller(TokenClaims):
    """The authenticated caller. `expires_at` is when that ends, in seconds since the epoch."""

    expires_at: float
    token_id: str = ""
    """What the audit log calls the token: its `jti`, else a hash of header and claims. Never a part of the token."""
    is_for_streams: bool = False
    """A stream token: it opens streams and nothing else."""

    own_tasks_only: bool = False
    """Whether the gateway keeps the users of a tenant apart."""

    def sees(self, *, tenant_id: str, user_id: str) -> bool:
        """Whether a task of this tenant and user may be read and acted on; scopes are checked elsewhere."""
        return self.tenant_id == tenant_id and (not self.own_tasks_only or self.user_id == user_id)


class Keys(Protocol):
    """Finds the key that a token must be signed with."""

    @property
    def algorithms(self) -> list[str]: ...

    async def key_for(self, token: str) -> Any:
        """Raises TokenRefused, TokensUnverifiable."""


class SharedSecret:
    """HS256 with one secret. Raises ValueError for one of fewer than 32 bytes."""

    algorithms: Final = ["HS256"]

    def __init__(self, secret: str) -> None:
        if len(secret.encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"the token secret must be at least {MIN_SECRET_BYTES} bytes long")
        self._secret = secret

    async def key_for(self, token: str) -> str:
        return self._secret


class KeySet:
    """The public keys at a JWKS URL, kept for 5 minutes. During an outage the known ones stay in use.

    A token with an unknown key id causes a new read, at most every 10 s: strangers cannot trigger more.
    """

    algorithms: Final = list(JWKS_ALGORITHMS)

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self._clock = clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = -math.inf
        self._tried_at = -math.inf
        self._fetching = asyncio.Lock()

    async def key_for(self, token: str) -> Any:
        key_id = jwt.get_unverified_header(token).get("kid")
        if not isinstance(key_id, str):
            raise TokenRefused("its header names no key (kid)")
        if key_id not in self._keys or self._clock() - self._fetched_at > JWKS_KEPT_SECONDS:
            await self._refresh(key_id)
        if key_id not in self._keys:
            if self._fetched_at == -math.inf:
                raise TokensUnverifiable(f"The keys at {self.url} could not be read.")
            raise TokenRefused("it is signed with a key that is not in the key set")
        return self._keys[key_id].key

    async def _refresh(self, key_id: str) -> None:
        async with self._fetching:
            is_fresh = self._clock() - self._fetched_at <= JWKS_KEPT_SECONDS
            if (key_id in self._keys and is_fresh) or self._clock() - self._tried_at < JWKS_AGAIN_AFTER_SECONDS:
                return
            self._tried_at = self._clock()
            try:
                self._keys = await self._fetched()
            except (httpx.HTTPError, jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
                log.warning("jwks_not_read", url=self.url, reason=f"{type(error).__name__}: {error}"[:200])
                return
            self._fetched_at = self._clock()

    async def _fetched(self) -> dict[str, jwt.PyJWK]:
        async with httpx.AsyncClient(timeout=JWKS_TIMEOUT_SECONDS, follow_redirects=False) as http:
            answer = await http.get(self.url)
        if not answer.is_success or len(answer.content) > MAX_JWKS_BYTES:
            raise ValueError(f"status {answer.status_code}, {len(answer.content)} bytes")
        key_set = jwt.PyJWKSet.from_dict(answer.json())
        return {key.key_id: key for key in key_set.keys if key.key_id and key.public_key_use in (None, "sig")}


class CallerTokens:
    """Reads the tokens of one audience: the gateway's, or that of the services."""

    def __init__(self, keys: Keys, *, issuer: str, audience: str) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience

    async def read(self, token: str) -> Caller:
        """The caller that the token names. Raises TokenRefused, TokensUnverifiable."""
        try:
            check_size(token)
            key = await self._keys.key_for(token)
            claims = decoded(token, key, self._keys.algorithms, self._issuer, self._audience)
        except (TokenRefused, TokensUnverifiable):
            raise
        except Exception as error:
            # The library lets other exceptions through too: deep nesting, an infinite `exp`, a key of another type.
            raise TokenRefused(_reason(error)) from None
        return caller_of(claims, token, is_for_streams=False)


def check_size(token: str) -> None:
    """Raises TokenRefused."""
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenRefused(f"it is longer than {MAX_TOKEN_BYTES} bytes")


def decoded(token: str, key: Any, algorithms: list[str], issuer: str, audience: str) -> dict[str, Any]:
    return jwt.decode(
        token,
        key,
        algorithms=algorithms,
        issuer=issuer,
        audience=audience,
        leeway=LEEWAY_SECONDS,
        options={"require": ["exp", "iss", "aud"]},
    )


def caller_of(claims: dict[str, Any], token: str, *, is_for_streams: bool) -> Caller:
    """Raises TokenRefused."""
    named = claims.get("jti")
    # Without the signature: nothing that was ever signed can be made of it.
    unsigned = token.rpartition(".")[0].encode()
    token_id = named if isinstance(named, str) and named else hashlib.sha256(unsigned).hexdigest()[:ID_CHARACTERS]
    own = {
        "token_id": shortened(repaired(token_id), MAX_NAME_BYTES),
        "is_for_streams": is_for_streams,
        "own_tasks_only": False,
    }
    try:
        return Caller.model_validate({**claims, "expires_at": float(claims["exp"]), **own})
    except (ValidationError, TypeError, ValueError, OverflowError):
        raise TokenRefused("tenant_id, user_id or scopes are missing or malformed") from None


def _reason(error: Exception) -> str:
    return str(error)[:200] if isinstance(error, jwt.PyJWTError) else "it cannot be read"
