"""What every entry point does first: settings read into parts, or a sentence that says what stands in the way."""

from __future__ import annotations

from pydantic import ValidationError

from comfyui_temporal.contracts.errors import sentences_of
from runtime.caller_tokens import CallerTokens, KeySet, SharedSecret
from runtime.settings import Settings


class CannotStart(Exception):
    """A setting or a server stands in the way; the text says which and what to do."""


def read_settings() -> Settings:
    """Raises CannotStart."""
    try:
        return Settings()
    except ValidationError as error:
        raise CannotStart(f"A setting is wrong: {'; '.join(sentences_of(error))}.") from None


def database_of(settings: Settings) -> str:
    """The task store's DSN. Raises CannotStart."""
    if settings.database_dsn is None:
        raise CannotStart(
            "No database is set: give COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://user:password@host:port/database."
        )
    return settings.database_dsn.get_secret_value()


def caller_tokens_by(settings: Settings) -> CallerTokens:
    """How callers' tokens are verified, at the gateway and at the bridge alike (contract §7). Raises CannotStart."""
    if settings.jwks_url is not None:
        keys: KeySet | SharedSecret = KeySet(settings.jwks_url)
    elif settings.token_secret is not None:
        keys = SharedSecret(settings.token_secret.get_secret_value())
    else:
        raise CannotStart(
            "No key of the callers' tokens is set: give COMFYUI_TEMPORAL_TOKEN_SECRET (HS256, at least 32 bytes) or "
            "COMFYUI_TEMPORAL_JWKS_URL."
        )
    return CallerTokens(
        keys,
        issuer=settings.caller_issuer or settings.token_issuer,
        audience=settings.caller_audience or settings.token_audience,
    )
