"""`doctor --token`: what a caller's token may do here, and why not.

The gateway's settings decide. Where they are set here too, the token is verified here; else the gateway answers.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, TypeGuard

import httpx
import jwt

from comfyui_temporal.command_line.connection import GatewayAccess
from comfyui_temporal.contracts.permissions import REQUIRED_SCOPES, Operation
from doctor.finding import Finding, note, ok, wrong
from runtime.caller_tokens import Caller, TokenRefused, TokensUnverifiable
from runtime.required_settings import caller_tokens_by
from runtime.settings import Settings

ASK_SECONDS: Final = 5.0
OPERATIONS: Final = {
    Operation.START_IMAGE_TASK: "start images",
    Operation.START_TRAINING_TASK: "start trainings",
    Operation.CONFIRM_PRICE: "confirm prices",
    Operation.READ_TASK: "read tasks, events and streams",
    Operation.CANCEL_TASK: "cancel tasks",
    Operation.ROLL_BACK: "roll credits back",
}
_AUDIENCE: Final = "Tokens for the gateway are of another audience and key than tokens for ComfyUI and credits."


async def examine_token(token: str, settings: Settings, gateway: GatewayAccess | None) -> list[Finding]:
    """Who the token names, whether it opens the gateway, and what it may do."""
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        return [wrong("token", f"this is no JWT: {error}", "Give the token itself, without `Bearer`.")]
    findings = [_said(claims)]
    if settings.caller_secret is not None or settings.jwks_url is not None:
        verified = await _verified(token, settings)
    else:
        verified = await _asked(token, claims, settings, gateway)
    if isinstance(verified, Finding):
        return [*findings, verified]
    findings.append(ok("token: accepted", f"as {verified.tenant_id} / {verified.user_id}"))
    return findings + [_may(verified, operation) for operation in OPERATIONS]


def _said(claims: dict[str, Any]) -> Finding:
    expires = claims.get("exp")
    until = f"until {datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M:%S} UTC" if _is_time(expires) else "no expiry"
    says = ", ".join(f"{name} {claims[name]}" for name in ("iss", "aud") if name in claims)
    return note("token", f"says: {says or 'no iss, no aud'}; valid {until}; claims: {', '.join(sorted(claims))}")


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 <= value < 253_402_300_800


async def _verified(token: str, settings: Settings) -> Caller | Finding:
    """By the settings of this process, which should be the gateway's."""
    try:
        return await caller_tokens_by(settings).read(token)
    except TokenRefused as refused:
        advice = (
            "Compare CALLER_ISSUER, CALLER_AUDIENCE, CALLER_TENANT_CLAIM, CALLER_USER_CLAIM, CALLER_SCOPES_CLAIM and "
            f"the key with what made the token. {_AUDIENCE}"
        )
        return wrong("token: accepted", f"no: {refused}", advice)
    except TokensUnverifiable as error:
        return wrong("token: accepted", f"cannot be decided: {error}", "Check COMFYUI_TEMPORAL_JWKS_URL.")


async def _asked(
    token: str, claims: dict[str, Any], settings: Settings, gateway: GatewayAccess | None
) -> Caller | Finding:
    if gateway is None:
        return note(
            "token: accepted",
            "cannot be decided: neither the gateway's address nor its key for callers' tokens is known here",
            "Set COMFYUI_TEMPORAL_GATEWAY_URL, or run it with the gateway's settings.",
        )
    try:
        async with httpx.AsyncClient(timeout=ASK_SECONDS, trust_env=False) as http:
            headers = {"Authorization": f"Bearer {token}"}
            answer = await http.get(f"{gateway.url}/api/v1/tasks", params={"limit": 1}, headers=headers)
    except httpx.HTTPError as error:
        says = f"cannot be decided: the gateway at {gateway.url} does not answer ({str(error) or type(error).__name__})"
        return wrong("token: accepted", says, "Start it, or correct its address.")
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return wrong("token: accepted", f"no: the gateway at {gateway.url} says: {_detail(answer)}", _AUDIENCE)
    try:
        named = settings.caller_claims.read(claims)
        return Caller.model_validate({**named, "expires_at": float(claims.get("exp", 0))})
    except ValueError:
        says = f"the gateway at {gateway.url} accepts it, by claims that are not set here"
        return note("token: accepted", says, "Run doctor with the gateway's CALLER_… settings to see its scopes.")


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def _may(caller: Caller, operation: Operation) -> Finding:
    what = f"token: {OPERATIONS[operation]}"
    if caller.allows(operation):
        return ok(what, "allowed")
    return note(
        what, f"not allowed: it lacks the scope {REQUIRED_SCOPES[operation]}", "Have it issued with that scope."
    )
