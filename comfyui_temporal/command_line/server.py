"""Which server, namespace, task queue and gateway a command uses, and what named each of them.

What is set wins: a flag, the environment, `.env`; then the local stack's `.run/stack.json`; then the default.
Temporal's own environment configuration (`TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`, `TEMPORAL_PROFILE`) counts as set
too, after `COMFYUI_TEMPORAL_TEMPORAL_*`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jwt
from pydantic import ValidationError
from temporalio.envconfig import ClientConfigProfile

from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.command_line.settings import CommandSettings, source_of
from comfyui_temporal.connecting import DEFAULT_ADDRESS, DEFAULT_NAMESPACE
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import TASK_QUEUE

STACK_FILE: Final = Path(".run/stack.json")
BY_STACK: Final = f"the local stack, {STACK_FILE}"
BY_DEFAULT: Final = "the default"
_folders: list[Path] = [Path()]


def also_look_for_stack_in(folder: Path) -> None:
    """A checkout's command line also finds the checkout's stack; the working directory is searched first."""
    _folders.append(folder)


@dataclass(frozen=True)
class Server:
    """Temporal's address, namespace and task queue, and what named each.

    `stack` is set if all three are the local stack's.
    """

    address: str
    namespace: str
    named_by: str
    task_queue: str = TASK_QUEUE
    namespace_named_by: str = BY_DEFAULT
    task_queue_named_by: str = BY_DEFAULT
    stack: StackDescription | None = None
    ui_url: str | None = None
    """The Temporal UI; None if only the server's address is known."""

    @property
    def advice(self) -> str:
        if self.named_by == BY_STACK:
            return "The local stack does not answer: start it with `make up`."
        return (
            "Start the local stack with `make up`, or name the server with --address, in TEMPORAL_ADDRESS, "
            "TEMPORAL_PROFILE or COMFYUI_TEMPORAL_TEMPORAL_ADDRESS."
        )

    def lines(self) -> Iterator[str]:
        """What is used, and by what it was named, for `-v`."""
        yield f"Temporal at {self.address} ({self.named_by})"
        yield f"namespace {self.namespace} ({self.namespace_named_by})"
        yield f"task queue {self.task_queue} ({self.task_queue_named_by})"


def find_server(settings: CommandSettings) -> Server:
    """The server to use. Raises BadInput if Temporal's configuration cannot be read."""
    try:
        profile = ClientConfigProfile.load(profile=settings.temporal_profile)
    except Exception as error:
        raise BadInput(f"Temporal's environment configuration cannot be read: {error}") from None
    set_address = settings.temporal_address or profile.address
    stack = _stack_at(set_address)
    running = (stack.temporal_address, stack.namespace, stack.task_queue) if stack else (None, None, None)
    address, named_by = _chosen(settings, "temporal_address", profile.address, running[0])
    namespace, namespace_by = _chosen(settings, "temporal_namespace", profile.namespace, running[1])
    queue, queue_by = _chosen(settings, "task_queue", None, running[2])
    is_stacks = stack is not None and (namespace, queue) == (stack.namespace, stack.task_queue)
    return Server(
        address=address or DEFAULT_ADDRESS,
        namespace=namespace or DEFAULT_NAMESPACE,
        named_by=named_by,
        task_queue=queue or TASK_QUEUE,
        namespace_named_by=namespace_by,
        task_queue_named_by=queue_by,
        stack=stack if is_stacks else None,
        ui_url=stack.ui_url if stack else None,
    )


def _chosen(
    settings: CommandSettings, name: str, configured: str | None, of_stack: str | None
) -> tuple[str | None, str]:
    """A value and what named it: the setting, Temporal's own configuration, the local stack; None: the default."""
    source = source_of(settings, name)
    value: str | None = getattr(settings, name)
    if source is not None and value:
        return value, source
    if configured:
        variable = name.upper()  # TEMPORAL_ADDRESS, TEMPORAL_NAMESPACE; else the profile's file has it
        return configured, variable if variable in os.environ else "Temporal's environment configuration"
    return (of_stack, BY_STACK) if of_stack else (None, BY_DEFAULT)


def server_of(stack: StackDescription) -> Server:
    """The local stack's own server."""
    return Server(
        address=stack.temporal_address,
        namespace=stack.namespace,
        named_by=BY_STACK,
        task_queue=stack.task_queue,
        namespace_named_by=BY_STACK,
        task_queue_named_by=BY_STACK,
        stack=stack,
        ui_url=stack.ui_url,
    )


def _stack_at(address: str | None) -> StackDescription | None:
    """The local stack, if it is at this address or none is set. Raises BadInput for an unreadable file."""
    if address is None:
        return _read_stack()
    try:
        stack = _read_stack()
    except BadInput:  # another server is named: the file does not matter
        return None
    return stack if stack is not None and stack.temporal_address == address else None


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
