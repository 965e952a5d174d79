"""Authenticates by JWTs (contract §7): the gateway's callers, and the services that call the bridge.

Deliberately narrow: the algorithms depend on how the keys are configured, never on the token's header; issuer,
audience and expiry are required; any error of the JWT library is a refusal, never an error of ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import ValidationError

from comfyui_temporal.contracts.fields import repaired, shortened
from comfyui_temporal.contracts.permissions import TokenClaims
from comfyui_temporal.contracts.size_budget import MAX_NAME_BYTES
from runtime.caller_claims import CallerClaims
from runtime.http_transport import trusted_certificates

log = structlog.get_logger(__name__)

CONTRACT_CLAIMS: Final = CallerClaims()

MIN_SECRET_BYTES: Final = 32
MAX_TOKEN_BYTES: Final = 8 * 1024
ID_CHARACTERS: Final = 16
LEEWAY_SECONDS: Final = 10
MIN_RSA_BITS: Final = 2_048
JWKS_KEPT_SECONDS: Final = 300.0
JWKS_AGAIN_AFTER_SECONDS: Final = 10.0
JWKS_TIMEOUT_SECONDS: Final = 5.0
JWKS_WAIT_SECONDS: Final = 0.5
"""How long the caller that finds the keys old waits for newer ones, before it is read with those that are known."""
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


@dataclass(frozen=True)
class Key:
    """A key, and the algorithms that it may be used with: the token's header only chooses among them."""

    key: Any
    algorithms: list[str]


class Keys(Protocol):
    """Finds the key that a token must be signed with."""

    async def key_for(self, token: str) -> Key:
        """Raises TokenRefused, TokensUnverifiable."""


class SharedSecret:
    """HS256 with one secret. Raises ValueError for one of fewer than 32 bytes."""

    def __init__(self, secret: str) -> None:
        if len(secret.encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"the token secret must be at least {MIN_SECRET_BYTES} bytes long")
        self._key = Key(secret, ["HS256"])

    async def key_for(self, token: str) -> Key:
        return self._key


class KeySet:
    """The public keys at a JWKS URL, kept for 5 minutes. During an outage the known ones stay in use, and callers with
    a known key wait for nothing.

    A key is used with its own algorithm (`alg`), else with those of its kind. RSA keys of fewer than 2,048 bits,
    secrets and keys of other kinds are left out, and logged. A token with an unknown key id causes a new read, at most
    every 10 s: strangers cannot trigger more.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._fetched_at = -math.inf
        self._tried_at = -math.inf
        self._fetching = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    async def key_for(self, token: str) -> Key:
        key_id = jwt.get_unverified_header(token).get("kid")
        if not isinstance(key_id, str):
            raise TokenRefused("its header names no key (kid)")
        if key_id not in self._keys:
            await self._refresh(key_id)
        elif self._clock() - self._fetched_at > JWKS_KEPT_SECONDS:
            await self._renew(key_id)
        if key_id not in self._keys:
            if self._fetched_at == -math.inf:
                raise TokensUnverifiable(f"The keys at {self.url} could not be read.")
            raise TokenRefused("it is signed with a key that is not in the key set")
        return self._keys[key_id]

    async def _renew(self, key_id: str) -> None:
        """Read the keys again in the background: only the caller that begins it waits, and not for long."""
        if self._renewing is not None or self._clock() - self._tried_at < JWKS_AGAIN_AFTER_SECONDS:
            return
        self._renewing = asyncio.create_task(self._refresh(key_id))
        self._renewing.add_done_callback(self._renewed)
        await asyncio.wait({self._renewing}, timeout=JWKS_WAIT_SECONDS)

    def _renewed(self, _task: asyncio.Task[None]) -> None:
        self._renewing = None

    async def _refresh(self, key_id: str) -> None:
        async with self._fetching:
            is_fresh = self._clock() - self._fetched_at <= JWKS_KEPT_SECONDS
            if (key_id in self._keys and is_fresh) or self._clock() - self._tried_at < JWKS_AGAIN_AFTER_SECONDS:
                return
            self._tried_at = self._clock()
            try:
                self._keys = await self._fetched()
            except (httpx.HTTPError, jwt.PyJWTError, TimeoutError, ValueError, TypeError, AttributeError) as error:
                log.warning("jwks_not_read", url=self.url, reason=f"{type(error).__name__}: {error}"[:200])
                return
            self._fetched_at = self._clock()

    async def _fetched(self) -> dict[str, Key]:
        content = bytearray()
        async with (
            asyncio.timeout(JWKS_TIMEOUT_SECONDS),
            httpx.AsyncClient(
                timeout=JWKS_TIMEOUT_SECONDS, follow_redirects=False, verify=trusted_certificates()
            ) as http,
            http.stream("GET", self.url) as answer,
        ):
            async for chunk in answer.aiter_bytes():
                content += chunk
                if not answer.is_success or len(content) > MAX_JWKS_BYTES:
                    break
        if not answer.is_success or len(content) > MAX_JWKS_BYTES:
            raise ValueError(f"status {answer.status_code}, {len(content)} bytes or more")
        keys = dict(named for described in json.loads(content).get("keys") if (named := _named_key(described)))
        if not keys:
            raise ValueError("it has no key for callers' tokens")
        return keys


def _named_key(described: dict[str, Any]) -> tuple[str, Key] | None:
    """A key of a set by its id; None if it is not for callers' tokens. Raises AttributeError if it is no object."""
    key_id = described.get("kid")
    if not isinstance(key_id, str) or described.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK.from_dict(described).key
    except (jwt.PyJWTError, ValueError, TypeError):
        key = None
    algorithms = [name for name in _algorithms_of(key) if described.get("alg", name) == name]
    if not algorithms:
        log.warning("jwks_key_not_used", key_id=shortened(repaired(key_id), MAX_NAME_BYTES))
        return None
    return key_id, Key(key, algorithms)


def _algorithms_of(key: object) -> tuple[str, ...]:
    match key:
        case rsa.RSAPublicKey() if key.key_size >= MIN_RSA_BITS:
            return ("RS256", "PS256")
        case ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1):
            return ("ES256",)
        case ed25519.Ed25519PublicKey():
            return ("EdDSA",)
    return ()


class CallerTokens:
    """Reads the tokens of one audience: the gateway's, or that of the services."""

    def __init__(
        self,
        keys: Keys,
        *,
        issuer: str | None,
        audience: str | None,
        max_seconds: float | None = None,
        claims: CallerClaims = CONTRACT_CLAIMS,
    ) -> None:
        """`issuer`, `audience`: None: tokens need not name one, and any that they name is taken.

        `max_seconds`: the longest time from a token's `iat` to its `exp`; None: any, and `iat` is not demanded.
        """
        self._claims = claims
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._max_seconds = max_seconds

    async def read(self, token: str) -> Caller:
        """The caller that the token names. Raises TokenRefused, TokensUnverifiable."""
        try:
            check_size(token)
            key = await self._keys.key_for(token)
            claims = decoded(token, key.key, key.algorithms, self._issuer, self._audience)
            self._check_lifetime(claims)
        except (TokenRefused, TokensUnverifiable):
            raise
        except Exception as error:
            # The library lets other exceptions through too: deep nesting, an infinite `exp`, a key of another type.
            raise TokenRefused(_reason(error)) from None
        return caller_of(claims, token, is_for_streams=False, names=self._claims)

    def _check_lifetime(self, claims: dict[str, Any]) -> None:
        """Raises TokenRefused."""
        if self._max_seconds is None:
            return
        if "iat" not in claims:
            raise TokenRefused("it does not say when it was issued (iat)")
        if float(claims["exp"]) - float(claims["iat"]) > self._max_seconds:
            raise TokenRefused(f"it is valid for longer than {self._max_seconds:g} s from its iat to its exp")


def check_size(token: str) -> None:
    """Raises TokenRefused."""
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenRefused(f"it is longer than {MAX_TOKEN_BYTES} bytes")


def decoded(token: str, key: Any, algorithms: list[str], issuer: str | None, audience: str | None) -> dict[str, Any]:
    demanded = {"iss": issuer, "aud": audience}
    return jwt.decode(
        token,
        key,
        algorithms=algorithms,
        issuer=issuer,
        audience=audience,
        leeway=LEEWAY_SECONDS,
        options={
            "require": ["exp", *(name for name, value in demanded.items() if value is not None)],
            "verify_iss": issuer is not None,
            "verify_aud": audience is not None,
        },
    )


def caller_of(
    claims: dict[str, Any], token: str, *, is_for_streams: bool, names: CallerClaims = CONTRACT_CLAIMS
) -> Caller:
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
        return Caller.model_validate({**names.read(claims), "expires_at": float(claims["exp"]), **own})
    except (ValidationError, TypeError, ValueError, OverflowError):
        raise TokenRefused(f"{names.tenant}, {names.user} or {names.scopes} are missing or malformed") from None


def _reason(error: Exception) -> str:
    return str(error)[:200] if isinstance(error, jwt.PyJWTError) else "it cannot be read"
