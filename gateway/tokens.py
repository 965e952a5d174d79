"""Short-lived stream tokens of our own, beside the platform's (contract §7, runtime/caller_tokens.py)."""

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
    """Makes and reads tokens that open streams and nothing else, valid 10 minutes and never longer than their maker.

    They may stand in an address, where tokens end up in logs and histories.
    """

    def __init__(self, secret: str) -> None:
        """`secret` is shared by every gateway process; the key is derived from it for this one purpose."""
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
        }
        return jwt.encode(claims, self._key, algorithm="HS256")

    def read(self, token: str) -> Caller | None:
        """Who the token names; None where it is no stream token of ours, or no longer one."""
        try:
            check_size(token)
            claims = decoded(token, self._key, ["HS256"], STREAM_ISSUER, STREAM_AUDIENCE)
        except Exception:
            return None
        return caller_of(claims, is_for_streams=True)
