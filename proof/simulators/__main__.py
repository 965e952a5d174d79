"""`python -m proof.simulators credits` and `python -m proof.simulators comfyui`: one simulator as a process of its own.

`python -m proof.simulators credits --credits-profile field` is the platform's own credits service as it was seen.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError

from proof.simulators.comfyui_app import comfyui_app
from proof.simulators.credits_app import credits_app
from proof.simulators.credits_profile import PROFILES, CreditsProfile
from proof.simulators.serving import server_config
from proof.simulators.tokens import Tokens
from runtime.callback_secrets import by_name
from runtime.logs import configure_logs
from runtime.required_settings import CannotStart, read_settings
from runtime.settings import Settings

log = structlog.get_logger("simulators")


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM or SIGINT. A bad setting ends the process with 2 and a sentence."""
    given = _given(arguments)
    try:
        settings = read_settings()
    except CannotStart as error:
        _give_up(str(error))
    configure_logs(level=settings.log_level, as_json=settings.log_json, hidden=settings.hidden_values)
    is_comfyui = given.simulator == "comfyui"
    port = settings.comfyui_simulator_port if is_comfyui else settings.credits_simulator_port
    profile = PROFILES[given.credits_profile or settings.simulator_credits_profile]
    app = _comfyui(settings) if is_comfyui else _credits(settings, profile)
    named = {} if is_comfyui else {"profile": profile.name}
    log.info("simulator serves", simulator=given.simulator, host=settings.simulator_host, port=port, **named)
    uvicorn.Server(server_config(app, host=settings.simulator_host, port=port)).run()


def _given(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m proof.simulators")
    parser.add_argument("simulator", nargs="?", choices=["credits", "comfyui"])
    parser.add_argument("--credits-profile", choices=list(PROFILES), help="instead of the setting's")
    given = parser.parse_args(arguments)
    if given.simulator is None:
        _give_up("Say which one: python -m proof.simulators credits, or python -m proof.simulators comfyui.")
    return given


def _comfyui(settings: Settings) -> FastAPI:
    if settings.signing_secret is None:
        _give_up("COMFYUI_TEMPORAL_CALLBACK_SECRETS is not set: callbacks must be signed.")
    secrets = list(by_name([secret.get_secret_value() for secret in settings.callback_secrets]).values())
    try:
        Webhook(secrets[0])
    except (ValueError, EmptyWebhookSecretError):
        _give_up("The first of COMFYUI_TEMPORAL_CALLBACK_SECRETS is no Standard Webhooks secret (whsec_ and base64).")
    return comfyui_app(
        folder=settings.simulator_folder,
        tokens=_tokens(settings),
        admin_token=_needed(settings.simulator_admin_token, "SIMULATOR_ADMIN_TOKEN"),
        callback_secrets=secrets,
        prices=settings.prices,
        speed=settings.simulator_speed,
        public_url=settings.simulator_public_url,
    )


def _credits(settings: Settings, profile: CreditsProfile) -> FastAPI:
    return credits_app(
        folder=settings.simulator_folder,
        tokens=_tokens(settings),
        admin_token=_needed(settings.simulator_admin_token, "SIMULATOR_ADMIN_TOKEN"),
        prices=settings.prices,
        speed=settings.simulator_speed,
        profile=profile,
    )


def _tokens(settings: Settings) -> Tokens:
    secret = _needed(settings.service_secret, "SERVICE_SECRET")
    return Tokens(secret, settings.service_issuer, settings.service_audience)


def _needed(secret: SecretStr | None, name: str) -> str:
    if secret is None:
        _give_up(f"COMFYUI_TEMPORAL_{name} is not set; it must be at least 32 bytes long.")
    return secret.get_secret_value()


def _give_up(sentence: str) -> NoReturn:
    sys.stderr.write(f"simulators: {sentence}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
