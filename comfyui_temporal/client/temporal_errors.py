"""Errors of Temporal's service → `TaskError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.client.errors import (
    AccessDenied,
    NamespaceMissing,
    TaskError,
    TemporalUnavailable,
    Undecryptable,
    UnexpectedReply,
    UnknownTask,
)
from comfyui_temporal.contracts.tasks import workflow_id_of
from comfyui_temporal.encryption_keys import EncryptionError

_LAZY_CONNECTION_FAILED: Final = "Failed client connect"


@contextmanager
def typed_errors(client: Client, *, task_id: str | None = None, missing: TaskError | None = None) -> Iterator[None]:
    """Inside, an RPCError or EncryptionError becomes a TaskError. NOT_FOUND: UnknownTask of `task_id`, or `missing`."""
    try:
        with decrypted():
            yield
    except RPCError as error:
        raise task_error(error, client, task_id=task_id, missing=missing) from None
    except RuntimeError as error:  # a lazy client raises it at its first call
        if _LAZY_CONNECTION_FAILED not in str(error):
            raise
        raise TemporalUnavailable(f"{_where(client)} cannot be reached: {error}") from None


@contextmanager
def decrypted() -> Iterator[None]:
    """Inside, an EncryptionError becomes Undecryptable."""
    try:
        yield
    except EncryptionError as error:
        raise Undecryptable(str(error), code=error.code) from None


def task_error(
    error: RPCError, client: Client, *, task_id: str | None = None, missing: TaskError | None = None
) -> TaskError:
    """The TaskError for a status of Temporal's service."""
    match error.status:
        case RPCStatusCode.NOT_FOUND if "namespace" in error.message.lower():
            return NamespaceMissing(f"{_where(client)} has no namespace {client.namespace!r}.")
        case RPCStatusCode.NOT_FOUND if missing is not None:
            return missing
        case RPCStatusCode.NOT_FOUND if task_id is not None:
            return UnknownTask(
                f"{_where(client)} knows no task {task_id!r} (workflow {workflow_id_of(task_id)!r} in namespace "
                f"{client.namespace!r})."
            )
        case RPCStatusCode.UNAVAILABLE | RPCStatusCode.DEADLINE_EXCEEDED | RPCStatusCode.CANCELLED:
            return TemporalUnavailable(f"{_where(client)} does not answer: {error.message}.")
        case RPCStatusCode.RESOURCE_EXHAUSTED | RPCStatusCode.ABORTED | RPCStatusCode.INTERNAL | RPCStatusCode.UNKNOWN:
            return TemporalUnavailable(
                f"{_where(client)} cannot do it now ({error.status.name}): {error.message}. Try again."
            )
        case RPCStatusCode.PERMISSION_DENIED | RPCStatusCode.UNAUTHENTICATED:
            return AccessDenied(f"{_where(client)} refuses these credentials: {error.message}.")
        case _:
            return UnexpectedReply(f"{_where(client)} refused the call ({error.status.name}): {error.message}")


def _where(client: Client) -> str:
    return f"Temporal at {client.service_client.config.target_host}"
