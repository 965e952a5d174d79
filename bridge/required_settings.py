"""Settings that the bridge's entry points share, with a clear message for what is missing."""

from __future__ import annotations

import signal
from asyncio import Event, get_running_loop

from bridge.templates import SHIPPED, TemplateLibrary, TemplateProblem, load_library
from runtime.required_settings import CannotStart
from runtime.settings import Settings


def templates_by(settings: Settings) -> TemplateLibrary:
    """Raises CannotStart."""
    try:
        return load_library(SHIPPED, *settings.bridge_templates)
    except TemplateProblem as problem:
        raise CannotStart(f"{problem}.") from None


def result_secret_by(settings: Settings) -> str:
    """Raises CannotStart."""
    secret = settings.bridge_result_secret or settings.service_secret
    if secret is None:
        raise CannotStart(
            "No secret to sign result addresses with: set COMFYUI_TEMPORAL_BRIDGE_RESULT_SECRET (at least 32 bytes)."
        )
    return secret.get_secret_value()


def callback_secret_by(settings: Settings) -> str:
    """Raises CannotStart."""
    if settings.signing_secret is None:
        raise CannotStart("COMFYUI_TEMPORAL_CALLBACK_SECRETS is not set: callbacks must be signed.")
    return settings.signing_secret


def stop_on_signals(stop: Event) -> None:
    """Set `stop` on SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        get_running_loop().add_signal_handler(number, stop.set)
