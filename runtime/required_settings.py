"""What every entry point does first: turn settings into parts, or fail with a sentence that says what to do."""

from __future__ import annotations

from pydantic import ValidationError

from comfyui_temporal.contracts.errors import sentences_of
from runtime.caller_tokens import CallerTokens, KeySet, SharedSecret
from runtime.settings import Settings


class CannotStart(Exception):
    """A setting or a server prevents the start. The text says which and what to do."""


def namespace_missing(namespace: str, address: str) -> CannotStart:
    """What to raise where the server does not know the namespace: to wait for it would look like work."""
    return CannotStart(
        f"Temporal at {address} has no namespace {namespace!r}: correct COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE, or make "
        f"it: temporal operator namespace create --namespace {namespace}"
    )


def read_settings() -> Settings:
    """Raises CannotStart."""
    try:
        return Settings()
    except ValidationError as error:
        raise CannotStart(f"A setting is invalid: {'; '.join(sentences_of(error))}.") from None


def database_of(settings: Settings) -> str:
    """The task store's DSN. Raises CannotStart."""
    if settings.database_dsn is None:
        raise CannotStart(
            "No database is set: set COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://user:password@host:port/database."
        )
    return settings.database_dsn.get_secret_value()


def caller_tokens_by(settings: Settings) -> CallerTokens:
    """How the gateway verifies callers' tokens (contract §7). Raises CannotStart."""
    if settings.jwks_url is not None:
        keys: KeySet | SharedSecret = KeySet(settings.jwks_url)
    elif settings.caller_secret is not None:
        keys = SharedSecret(settings.caller_secret.get_secret_value())
    else:
        raise CannotStart(
            "No key for callers' tokens is set: set COMFYUI_TEMPORAL_CALLER_SECRET (HS256, at least 32 bytes) or "
            "COMFYUI_TEMPORAL_JWKS_URL."
        )
    return CallerTokens(
        keys,
        issuer=settings.caller_issuer or None,
        audience=settings.caller_audience or None,
        max_seconds=settings.caller_token_max_seconds,
        claims=settings.caller_claims,
    )


def service_tokens_by(settings: Settings) -> CallerTokens:
    """How the bridge verifies service tokens (contract §7). Raises CannotStart."""
    if settings.service_secret is None:
        raise CannotStart(
            "No key for service tokens is set: set COMFYUI_TEMPORAL_SERVICE_SECRET (HS256, at least 32 bytes), the "
            "workers' own."
        )
    keys = SharedSecret(settings.service_secret.get_secret_value())
    return CallerTokens(keys, issuer=settings.service_issuer, audience=settings.service_audience)
