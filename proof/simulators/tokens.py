"""Service tokens (contract §7): HS256, with `iss`, `aud` and `exp`; they name `tenant_id`, `user_id` and `scopes`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import jwt
from pydantic import ValidationError

from comfyui_temporal.contracts.permissions import Operation, Scene, Scope, TokenClaims
from comfyui_temporal.contracts.scenes import allows_scene
from proof.simulators.replies import Refused, Unauthenticated

ALL_SCOPES = tuple(Scope)


@dataclass(frozen=True)
class Tokens:
    """Makes and reads the tokens of one audience. `secret` has at least 32 bytes."""

    secret: str
    issuer: str
    audience: str

    def made_for(
        self, tenant_id: str, user_id: str, scopes: Iterable[str] = ALL_SCOPES, *, valid_seconds: float = 300
    ) -> str:
        """A bearer token, by default with every scope and for 5 minutes of wall time."""
        now = time.time()
        claims = {
            "iss": self.issuer,
            "aud": self.audience,
            "iat": int(now),
            "exp": int(now + valid_seconds),
            "tenant_id": tenant_id,
            "user_id": user_id,
            "scopes": [str(scope) for scope in scopes],
        }
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def read(self, authorization: str | None) -> TokenClaims:
        """The claims of an `Authorization` header. Raises Unauthenticated."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("a bearer token is missing")
        try:
            claims = jwt.decode(
                token,
                self.secret,
                algorithms=["HS256"],
                issuer=self.issuer,
                audience=self.audience,
                options={"require": ["exp", "iss", "aud"]},
            )
            return TokenClaims.model_validate(claims)
        except jwt.PyJWTError as error:
            raise Unauthenticated(str(error)) from None
        except ValidationError:
            raise Unauthenticated("tenant_id or user_id is missing or malformed") from None


def demand(claims: TokenClaims, operation: Operation) -> None:
    """Raises Refused `authorization_missing` where the token lacks the operation's scope."""
    if not claims.allows(operation):
        raise Refused("authorization_missing")


def demand_scene(claims: TokenClaims, *scenes: Scene) -> None:
    """Raises Refused where the token covers none of the scenes (contract §7: calls to `/api/v1/credits/*`)."""
    if not any(allows_scene(claims, scene) for scene in scenes):
        raise Refused("authorization_missing")


def demand_person(claims: TokenClaims, tenant_id: str, user_id: str) -> None:
    """Raises Refused where the body names another tenant or user than the token."""
    if (claims.tenant_id, claims.user_id) != (tenant_id, user_id):
        raise Refused("authorization_missing")
