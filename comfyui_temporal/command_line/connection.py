"""Which Temporal server a command talks to, and how its errors become sentences.

Found in this order: the settings `COMFYUI_TEMPORAL_TEMPORAL_*`, Temporal's own environment configuration, the local
stack's `.run/stack.json`, localhost:7233.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Final

import jwt
from pydantic import ValidationError
from temporalio.client import Client
from temporalio.envconfig import ClientConfigProfile
from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.command_line.failures import BadInput, CannotReach, CommandFailure, UnknownTask
from comfyui_temporal.command_line.gateway_stream import GatewayAccess
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import workflow_id_of
from runtime.settings import Settings
from runtime.temporal_connection import connect

CONNECT_SECONDS: Final = 2.5
RPC_TIMEOUT: Final = timedelta(seconds=5)
DEFAULT_ADDRESS: Final = "localhost:7233"
STACK_FILE: Final = Path(".run/stack.json")


@dataclass(frozen=True)
class Server:
    """Where Temporal is and who said so; `stack` is set where that was the local stack."""

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

    def ui_link(self, workflow_id: str, run_id: str | None = None) -> str | None:
        """The run's page in the Temporal UI; None where only the server's address is known."""
        if self.stack is None:
            return None
        page = f"{self.stack.ui_url.rstrip('/')}/namespaces/{self.namespace}/workflows/{workflow_id}"
        return f"{page}/{run_id}/history" if run_id else page


@dataclass(frozen=True)
class Connection:
    """A client, and what a command tells about the server behind it."""

    client: Client
    server: Server
    task_queue: str
    gateway: GatewayAccess | None = None
    """Whose stream tells how tasks go; None: they are asked by query."""


def read_settings() -> Settings:
    """The settings of this process. Raises BadInput that names each bad variable and shows no value."""
    try:
        return Settings()
    except ValidationError as error:
        fields = {
            "COMFYUI_TEMPORAL_" + "_".join(str(part) for part in issue["loc"]).upper(): issue["msg"]
            for issue in error.errors()
        }
        raise BadInput("Settings cannot be used.", fields) from None


def read_stack(path: Path | None = None) -> StackDescription | None:
    """The local stack's own description, or None where none runs. Raises BadInput for an unreadable file.

    Looked for in the working directory, then beside the code, so that the command works from any folder.
    """
    candidates = [path] if path else [STACK_FILE, Path(__file__).parents[2] / STACK_FILE]
    for candidate in candidates:
        try:
            return StackDescription.model_validate_json(candidate.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValidationError) as error:
            raise BadInput(
                f"{candidate} cannot be read ({type(error).__name__}): run `make down`, `make up`."
            ) from None
    return None


def find_server(settings: Settings) -> Server:
    """Which server to talk to. Raises BadInput for a Temporal configuration that cannot be read."""
    try:
        profile = ClientConfigProfile.load(profile=settings.temporal_profile)
    except Exception as error:
        raise BadInput(f"Temporal's environment configuration cannot be read: {error}") from None
    namespace = settings.temporal_namespace or profile.namespace or "default"
    if settings.temporal_address:
        return Server(settings.temporal_address, namespace, "named by the settings")
    if profile.address:
        return Server(profile.address, namespace, "named by Temporal's environment configuration")
    stack = read_stack()
    if stack is not None:
        return Server(stack.temporal_address, stack.namespace, f"named by {STACK_FILE}", stack=stack)
    return Server(DEFAULT_ADDRESS, namespace, "the default address")


def server_of(stack: StackDescription) -> Server:
    return Server(stack.temporal_address, stack.namespace, f"named by {STACK_FILE}", stack=stack)


async def open_connection(server: Server, settings: Settings, *, task_queue: str) -> Connection:
    """Connect, or raise CannotReach within three seconds."""
    named = settings.model_copy(update={"temporal_address": server.address, "temporal_namespace": server.namespace})
    try:
        client = await asyncio.wait_for(connect(named, runtime=_quiet_runtime()), CONNECT_SECONDS)
    except TimeoutError:
        raise CannotReach(_unreachable(server, f"no answer within {CONNECT_SECONDS:g} s")) from None
    except (RuntimeError, ValueError, OSError, RPCError) as error:
        raise CannotReach(_unreachable(server, _short_cause(error))) from None
    return Connection(client, server, task_queue, gateway_of(server, settings))


def gateway_of(server: Server, settings: Settings) -> GatewayAccess | None:
    """The gateway that is set, else the local stack's, with its tenants' tokens."""
    if settings.gateway_url is not None:
        token = settings.gateway_token
        return GatewayAccess(settings.gateway_url, token.get_secret_value() if token else None)
    if server.stack is not None:
        return GatewayAccess(server.stack.gateway_url, tokens=server.stack.tokens)
    return None


@cache
def _quiet_runtime() -> Runtime:
    """Temporal's native part tells each retry on standard output, where a script reads our JSON: only errors here."""
    errors_only = LoggingConfig(filter=TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    return Runtime(telemetry=TelemetryConfig(logging=errors_only))


@asynccontextmanager
async def connection(settings: Settings) -> AsyncIterator[Connection]:
    """The connection a command works with; Temporal's errors inside become sentences."""
    server = find_server(settings)
    task_queue = server.stack.task_queue if server.stack else settings.task_queue
    opened = await open_connection(server, settings, task_queue=task_queue)
    with sentences(server):
        yield opened


@contextmanager
def sentences(server: Server, *, task_id: str | None = None) -> Iterator[None]:
    """Inside, an `RPCError` of Temporal becomes a CommandFailure; with `task_id`, NOT_FOUND is an UnknownTask."""
    try:
        yield
    except RPCError as error:
        raise _failure_of(error, server, task_id) from None


def _failure_of(error: RPCError, server: Server, task_id: str | None) -> CommandFailure:
    where = f"Temporal at {server.address}"
    match error.status:
        case RPCStatusCode.NOT_FOUND if "namespace" in error.message.lower():
            return CannotReach(
                f"{where} has no namespace {server.namespace!r} ({server.named_by}). "
                "Create it, or name another in TEMPORAL_NAMESPACE."
            )
        case RPCStatusCode.NOT_FOUND if task_id is not None:
            return UnknownTask(
                f"{where} knows no task {task_id!r} (workflow {workflow_id_of(task_id)!r} in namespace "
                f"{server.namespace!r}). See `comfyui-tasks list`."
            )
        case RPCStatusCode.UNAVAILABLE | RPCStatusCode.DEADLINE_EXCEEDED | RPCStatusCode.CANCELLED:
            return CannotReach(_unreachable(server, error.message))
        case RPCStatusCode.PERMISSION_DENIED | RPCStatusCode.UNAUTHENTICATED:
            return CannotReach(f"{where} refuses these credentials: {error.message}. Check TEMPORAL_API_KEY and TLS.")
        case RPCStatusCode.INVALID_ARGUMENT if "search attribute" in error.message.lower():
            return CommandFailure(f"{where}: {error.message}. Register it: `comfyui-tasks doctor` says how.")
        case _:
            return CommandFailure(f"{where} refused the call ({error.status.name}): {error.message}")


def _unreachable(server: Server, cause: str) -> str:
    return (
        f"Cannot reach Temporal at {server.address} ({server.named_by}), namespace {server.namespace!r}: "
        f"{cause}. {server.advice}"
    )


def _short_cause(error: BaseException) -> str:
    text = str(error)
    if "h2 protocol error" in text or "get_system_info" in text:
        return "something answers, but not Temporal (another service, or TLS is missing)"
    for known in ("Connection refused", "dns error", "invalid peer certificate", "No route to host"):
        if known.lower() in text.lower():
            return known.lower()
    return text.splitlines()[0][:200] if text else type(error).__name__


def user_of(stack: StackDescription | None, tenant_id: str) -> str | None:
    """The user that the local stack's token for this tenant names; None where there is none."""
    token = stack.tokens.get(tenant_id) if stack else None
    if token is None:
        return None
    try:
        user = jwt.decode(token, options={"verify_signature": False}).get("user_id")
    except jwt.PyJWTError:
        return None
    return user if isinstance(user, str) else None
