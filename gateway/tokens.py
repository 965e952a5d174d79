"""Our own short-lived stream tokens. runtime/caller_tokens.py reads the platform's tokens (contract §7)."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Final

import jwt

from comfyui_temporal.contracts.permissions import Operation, Scope
from runtime.caller_tokens import Caller, caller_of, check_size, decoded

STREAM_TOKEN_SECONDS: Final = 600
STREAM_ISSUER: Final = "comfyui-temporal-gateway"
STREAM_AUDIENCE: Final = "comfyui-temporal-streams"


class StreamTokens:
    """Makes and reads tokens that open streams and nothing else. They are valid for 10 minutes, never longer than the
    token they were made for.

    They may be part of an address, and addresses end up in logs and browser histories.
    """

    def __init__(self, secret: str) -> None:
        """All gateway processes share `secret`. The signing key is derived from it for this purpose alone."""
        self._key = hmac.new(secret.encode(), b"comfyui-temporal stream tokens", hashlib.sha256).hexdigest()

    def made_for(self, caller: Caller) -> str:
        scopes = [Scope.TASK_READ.value] if caller.allows(Operation.READ_TASK) else []
        now = int(time.time())
        claims = {
            "iss": STREAM_ISSUER,
            "aud": STREAM_AUDIENCE,
            "iat": now,
            "exp": min(now + STREAM_TOKEN_SECONDS, int(caller.expires_at)),
            "tenant_id": caller.tenant_id,
            "user_id": caller.user_id,
            "scopes": scopes,
            "jti": caller.token_id,
        }
        return jwt.encode(claims, self._key, algorithm="HS256")

    def read(self, token: str) -> Caller | None:
        """The caller that the token names; None if it is not a stream token of ours, or has expired."""
        try:
            check_size(token)
            claims = decoded(token, self._key, ["HS256"], STREAM_ISSUER, STREAM_AUDIENCE)
        except Exception:
            return None
        return caller_of(claims, token, is_for_streams=True)
