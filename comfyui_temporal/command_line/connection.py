"""The connection that a command uses, and how errors become sentences with exit codes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Final

from rich.console import Console
from rich.text import Text
from temporalio.client import Client
from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError

from comfyui_temporal.client.errors import (
    AccessDenied,
    CreditsRefused,
    InvalidInput,
    NamespaceMissing,
    TaskError,
    TaskExists,
    TaskOver,
    TemporalUnavailable,
    Undecryptable,
    UnknownTask,
    WorkerUnavailable,
)
from comfyui_temporal.client.http_tasks import HttpTasks
from comfyui_temporal.client.temporal_errors import task_error
from comfyui_temporal.client.temporal_tasks import TemporalTasks
from comfyui_temporal.command_line.failures import BadInput, CannotReach, CommandFailure, ExitCode
from comfyui_temporal.command_line.server import BY_STACK, Server, find_server
from comfyui_temporal.command_line.settings import CommandSettings, is_verbose, source_of
from comfyui_temporal.connecting import connect
from comfyui_temporal.encryption import encryption_by
from comfyui_temporal.encryption_keys import EncryptionError, KeysUnusable

CONNECT_SECONDS: Final = 2.5


@dataclass(frozen=True)
class GatewayAccess:
    """The gateway's address, and each tenant's token for it."""

    url: str
    token: str | None = field(default=None, repr=False)
    """For every tenant; if it is None, `tokens` has one for each."""
    tokens: dict[str, str] = field(default_factory=dict, repr=False)

    def tasks_of(self, tenant_id: str | None) -> HttpTasks | None:
        """The tenant's tasks; None without a token for it. An interrupted stream is not reopened automatically."""
        token = self.token or self.tokens.get(tenant_id or "")
        return HttpTasks(self.url, token, patience_seconds=0) if token else None


@dataclass(frozen=True)
class Connection:
    """A client, the server behind it, and the gateway if one is known."""

    client: Client
    server: Server
    task_queue: str
    gateway: GatewayAccess | None = None
    """The gateway whose stream is followed; None: tasks are followed by query."""

    @cached_property
    def tasks(self) -> TemporalTasks:
        return TemporalTasks(self.client, task_queue=self.task_queue, ui_url=self.server.ui_url)


@asynccontextmanager
async def connection(settings: CommandSettings) -> AsyncIterator[Connection]:
    """The connection that a command uses. Inside, errors become CommandFailures."""
    server = find_server(settings)
    say_what_is_used(server, settings)
    opened = await open_connection(server, settings)
    with sentences(opened):
        yield opened


def say_what_is_used(server: Server, settings: CommandSettings) -> None:
    """With `-v`: each address and name, and what named it, on standard error."""
    if not is_verbose():
        return
    gateway = gateway_of(server, settings)
    named_by = source_of(settings, "gateway_url") or BY_STACK
    lines = [*server.lines(), f"gateway {gateway.url} ({named_by})" if gateway else "no gateway: tasks are queried"]
    for line in lines:
        Console(stderr=True).print(Text(f"uses {line}", style="dim"), soft_wrap=True)


async def open_connection(server: Server, settings: CommandSettings) -> Connection:
    """Connect within three seconds. Raises CannotReach, BadInput."""
    try:
        encryption = encryption_by(settings.encryption_keys)
    except KeysUnusable as error:
        raise BadInput(str(error)) from None
    connecting = connect(
        address=server.address,
        namespace=server.namespace,
        profile=settings.temporal_profile,
        runtime=_quiet_runtime(),
        encryption=encryption,
    )
    try:
        client = await asyncio.wait_for(connecting, CONNECT_SECONDS)
    except TimeoutError:
        raise CannotReach(_unreachable(server, f"no answer within {CONNECT_SECONDS:g} s")) from None
    except (RuntimeError, ValueError, OSError, RPCError) as error:
        raise CannotReach(_unreachable(server, _short_cause(error))) from None
    return Connection(client, server, server.task_queue, gateway_of(server, settings))


def gateway_of(server: Server, settings: CommandSettings) -> GatewayAccess | None:
    """The configured gateway, else the local stack's, with its tenants' tokens."""
    if settings.gateway_url is not None:
        token = settings.gateway_token
        return GatewayAccess(settings.gateway_url, token.get_secret_value() if token else None)
    if server.stack is not None:
        return GatewayAccess(server.stack.gateway_url, tokens=server.stack.tokens)
    return None


@cache
def _quiet_runtime() -> Runtime:
    """Logs only errors: Temporal's native part logs retries to standard output, where scripts read our JSON."""
    errors_only = LoggingConfig(filter=TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    return Runtime(telemetry=TelemetryConfig(logging=errors_only))


@contextmanager
def sentences(opened: Connection) -> Iterator[None]:
    """Inside, a TaskError, RPCError or EncryptionError becomes a CommandFailure that says what to do."""
    try:
        yield
    except TaskError as error:
        raise _failure_of(error, opened.server) from None
    except RPCError as error:
        raise _failure_of(task_error(error, opened.client), opened.server) from None
    except EncryptionError as error:
        raise CommandFailure(str(error), code=error.code) from None


def _failure_of(error: TaskError, server: Server) -> CommandFailure:
    match error:
        case NamespaceMissing():
            advice = "Create it, or name another with --namespace or in TEMPORAL_NAMESPACE."
            return CannotReach(f"{error.sentence} It was named by {server.namespace_named_by}. {advice}")
        case TemporalUnavailable():
            return CannotReach(_unreachable(server, error.sentence))
        case WorkerUnavailable():
            return CannotReach(error.sentence)
        case AccessDenied():
            return CannotReach(f"{error.sentence} Check TEMPORAL_API_KEY and TLS.")
        case UnknownTask():
            sentence = f"{error.sentence} See `comfyui-tasks list`."
            return CommandFailure(sentence, exit_code=ExitCode.UNKNOWN_TASK, code=error.code)
        case TaskExists():
            sentence = f"{error.sentence} Use another task_id, or see it with `comfyui-tasks show {error.task_id}`."
            return CommandFailure(sentence, exit_code=ExitCode.TASK_EXISTS, code=error.code)
        case InvalidInput():
            return BadInput(error.sentence, error.fields)
        case TaskOver():
            return CommandFailure(error.sentence, exit_code=ExitCode.TOO_LATE, code=error.code)
        case CreditsRefused() | Undecryptable():
            return CommandFailure(error.sentence, code=error.code)
    advice = " Register it: `comfyui-tasks doctor` shows how." if "search attribute" in error.sentence.lower() else ""
    return CommandFailure(f"{error.sentence}{advice}")


def _unreachable(server: Server, cause: str) -> str:
    return (
        f"Cannot reach Temporal at {server.address} (named by {server.named_by}), namespace {server.namespace!r}: "
        f"{cause.rstrip('.')}. {server.advice}"
    )


def _short_cause(error: BaseException) -> str:
    text = str(error)
    if "h2 protocol error" in text or "get_system_info" in text:
        return "something answers, but not Temporal (another service, or TLS is missing)"
    for known in ("Connection refused", "dns error", "invalid peer certificate", "No route to host"):
        if known.lower() in text.lower():
            return known.lower()
    return text.splitlines()[0][:200] if text else type(error).__name__
