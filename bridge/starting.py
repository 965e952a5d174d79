"""What the bridge's entry points share: settings read into parts, or a sentence that says what is missing."""

from __future__ import annotations

import signal
from asyncio import Event, get_running_loop

from pydantic import ValidationError

from bridge.templates import SHIPPED, TemplateLibrary, TemplateProblem, load_library
from caller_tokens import CallerTokens, KeySet, SharedSecret
from contracts.errors import sentences_of
from settings import Settings


class CannotStart(Exception):
    """A setting or a server stands in the way; the text says which and what to do."""


def read_settings() -> Settings:
    """Raises CannotStart."""
    try:
        return Settings()
    except ValidationError as error:
        raise CannotStart(f"A setting is wrong: {'; '.join(sentences_of(error))}.") from None


def templates_by(settings: Settings) -> TemplateLibrary:
    """Raises CannotStart."""
    try:
        return load_library(SHIPPED, *settings.bridge_templates)
    except TemplateProblem as problem:
        raise CannotStart(f"{problem}.") from None


def tokens_by(settings: Settings) -> CallerTokens:
    """How callers' tokens are verified, as the gateway does it. Raises CannotStart."""
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


def result_secret_by(settings: Settings) -> str:
    """Raises CannotStart."""
    secret = settings.bridge_result_secret or settings.token_secret
    if secret is None:
        raise CannotStart(
            "Nothing signs addresses of results: give COMFYUI_TEMPORAL_BRIDGE_RESULT_SECRET (at least 32 bytes)."
        )
    return secret.get_secret_value()


def callback_secret_by(settings: Settings) -> str:
    """Raises CannotStart."""
    if not settings.callback_secrets:
        raise CannotStart("COMFYUI_TEMPORAL_CALLBACK_SECRETS is not set: callbacks must be signed.")
    return settings.callback_secrets[0].get_secret_value()


def heed_signals(stop: Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        get_running_loop().add_signal_handler(number, stop.set)
