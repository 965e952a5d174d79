"""Which Temporal server a command uses. In this order: the settings `COMFYUI_TEMPORAL_TEMPORAL_*`, Temporal's own
environment configuration, the local stack's `.run/stack.json`, localhost:7233."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jwt
from pydantic import ValidationError
from temporalio.envconfig import ClientConfigProfile

from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.command_line.settings import CommandSettings
from comfyui_temporal.connecting import DEFAULT_ADDRESS, DEFAULT_NAMESPACE
from comfyui_temporal.contracts.stack import StackDescription

STACK_FILE: Final = Path(".run/stack.json")
_folders: list[Path] = [Path()]


def also_look_for_stack_in(folder: Path) -> None:
    """A checkout's command line also finds the checkout's stack; the working directory is searched first."""
    _folders.append(folder)


@dataclass(frozen=True)
class Server:
    """Temporal's address and what named it. `stack` is set if that was the local stack."""

    address: str
    namespace: str
    named_by: str
    stack: StackDescription | None = None

    @property
    def advice(self) -> str:
        if self.stack is not None:
            return "The local stack does not answer: start it with `make up`."
        return (
            "Start the local stack with `make up`, or name the server in TEMPORAL_ADDRESS, TEMPORAL_PROFILE or "
            "COMFYUI_TEMPORAL_TEMPORAL_ADDRESS."
        )

    @property
    def ui_url(self) -> str | None:
        """The Temporal UI; None if only the server's address is known."""
        return self.stack.ui_url if self.stack else None


def find_server(settings: CommandSettings) -> Server:
    """The server to use. Raises BadInput if Temporal's configuration cannot be read."""
    try:
        profile = ClientConfigProfile.load(profile=settings.temporal_profile)
    except Exception as error:
        raise BadInput(f"Temporal's environment configuration cannot be read: {error}") from None
    namespace = settings.temporal_namespace or profile.namespace or DEFAULT_NAMESPACE
    if settings.temporal_address:
        return Server(settings.temporal_address, namespace, "named by the settings")
    if profile.address:
        return Server(profile.address, namespace, "named by Temporal's environment configuration")
    stack = _read_stack()
    return server_of(stack) if stack is not None else Server(DEFAULT_ADDRESS, namespace, "the default address")


def server_of(stack: StackDescription) -> Server:
    return Server(stack.temporal_address, stack.namespace, f"named by {STACK_FILE}", stack=stack)


def _read_stack() -> StackDescription | None:
    """The local stack's description; None if none runs. Raises BadInput for an unreadable file."""
    for folder in _folders:
        file = folder / STACK_FILE
        try:
            return StackDescription.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValidationError) as error:
            raise BadInput(f"{file} cannot be read ({type(error).__name__}): run `make down`, `make up`.") from None
    return None


def user_of(stack: StackDescription | None, tenant_id: str) -> str | None:
    """The user that the local stack's token for this tenant names; None if there is none."""
    token = stack.tokens.get(tenant_id) if stack else None
    if token is None:
        return None
    try:
        user = jwt.decode(token, options={"verify_signature": False}).get("user_id")
    except jwt.PyJWTError:
        return None
    return user if isinstance(user, str) else None
