"""Settings that the bridge's entry points share, with a clear message for what is missing."""

from __future__ import annotations

import base64
import re
import signal
from asyncio import Event, get_running_loop
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from bridge.template_library import SHIPPED, TemplateLibrary, load_library
from bridge.templates import TemplateProblem
from comfyui_temporal.contracts.permissions import Scene
from runtime.required_settings import CannotStart
from runtime.settings import Settings

_HEADER_VALUE: Final = re.compile(r"([\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?)?")


def template_folders_by(settings: Settings) -> list[Path]:
    """Shipped templates first: a later folder replaces an earlier one's."""
    return [SHIPPED, *settings.bridge_templates]


def templates_by(settings: Settings) -> TemplateLibrary:
    """Raises CannotStart."""
    try:
        return load_library(*template_folders_by(settings))
    except TemplateProblem as problem:
        raise CannotStart(f"{problem}.") from None


def warm_up_by(settings: Settings, templates: TemplateLibrary, pool: str) -> list[str]:
    """The ids of this pool's templates to warm up. Raises CannotStart."""
    known = {template.template_id: template for template in templates.of_scene(Scene.IMAGE_GENERATE)}
    if unknown := [name for name in settings.bridge_warm_up if name not in known]:
        offered = ", ".join(sorted(known))
        raise CannotStart(
            f"COMFYUI_TEMPORAL_BRIDGE_WARM_UP names {', '.join(unknown)}, which no template of images is called; there "
            f"are {offered}."
        )
    return [name for name in settings.bridge_warm_up if known[name].manifest.pool == pool]


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


def server_headers_by(settings: Settings) -> dict[str, str]:
    """The headers that a proxy before the ComfyUI server demands. Raises CannotStart; no message has a secret."""
    headers = dict(settings.gpu_server_headers)
    token, login = settings.gpu_server_token, settings.gpu_server_login
    names = [name for name, given in (("TOKEN", token), ("LOGIN", login)) if given is not None]
    names += ["HEADERS"] if any(name.lower() == "authorization" for name in headers) else []
    if len(names) > 1:
        raise CannotStart(
            f"COMFYUI_TEMPORAL_GPU_SERVER_{' and _'.join(names)} both set the header Authorization: set one of them."
        )
    if token is not None:
        headers["Authorization"] = SecretStr(f"Bearer {token.get_secret_value()}")
    if login is not None:
        if ":" not in login.get_secret_value():
            raise CannotStart("COMFYUI_TEMPORAL_GPU_SERVER_LOGIN must be user:password.")
        encoded = base64.b64encode(login.get_secret_value().encode()).decode()
        headers["Authorization"] = SecretStr(f"Basic {encoded}")
    found = {name: value.get_secret_value() for name, value in headers.items()}
    unusable = [name for name, value in found.items() if not _HEADER_VALUE.fullmatch(value)]
    if unusable:
        raise CannotStart(
            f"The header {unusable[0]} for the ComfyUI server has a value that no header may have: a space at its end, "
            "a line end or an accent."
        )
    return found


def stop_on_signals(stop: Event) -> None:
    """Set `stop` on SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        get_running_loop().add_signal_handler(number, stop.set)
