"""Calls to Temporal during a request: with a time limit, and every failure as a problem."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import structlog
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowUpdateFailedError,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.client.waiting_start import within
from comfyui_temporal.encryption_keys import EncryptionError
from comfyui_temporal.runs import RunSeen, describe_run, is_namespace_missing
from gateway.problems import Problem, ProblemCode

T = TypeVar("T")
log = structlog.get_logger(__name__)

CALL_SECONDS: Final = 5.0
UPDATE_SECONDS: Final = 10.0
RPC_TIMEOUT: Final = timedelta(seconds=CALL_SECONDS)


class RunMissing(Exception):
    """There is no such run, or it is not open."""


async def bounded(call: Awaitable[T]) -> T:
    """The call's answer. Raises Problem `temporal_unavailable`, RunMissing."""
    with temporal_problems():
        return await asyncio.wait_for(call, CALL_SECONDS)


async def described(client: Client, workflow_id: str) -> RunSeen | None:
    """The newest run with this id; None if Temporal does not know it."""
    try:
        return await bounded(describe_run(client, workflow_id, rpc_timeout=RPC_TIMEOUT))
    except RunMissing:
        return None


async def updated(handle: WorkflowHandle[Any, Any], name: str, argument: object, result_type: type[T]) -> T:
    """The run's answer to a new update. Raises RunMissing if it is over, and Problem."""
    try:
        with temporal_problems():
            answer: T = await _of_worker(handle.execute_update(name, argument, result_type=result_type))
            return answer
    except WorkflowUpdateFailedError as failure:
        cause = failure.cause
        sentence = cause.message if isinstance(cause, ApplicationError) else str(cause)
        raise Problem(ProblemCode.INPUT_INVALID, f"The task rejects it: {sentence}") from None


async def _of_worker(call: Coroutine[Any, Any, T]) -> T:
    try:
        return await within(call, UPDATE_SECONDS)
    except TimeoutError:
        raise Problem(
            ProblemCode.WORKER_UNAVAILABLE,
            "The task did not answer in time: no worker runs, or it is busy. Try again.",
        ) from None


@contextmanager
def temporal_problems() -> Iterator[None]:
    """Inside, Temporal's errors become a Problem or RunMissing."""
    try:
        yield
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND and not is_namespace_missing(error):
            raise RunMissing from None
        raise _unavailable(error) from None
    except EncryptionError as error:
        log.error("temporal_data_undecryptable", code=error.code, detail=str(error))
        raise Problem(
            ProblemCode.INTERNAL,
            "The gateway lacks the key that this task is encrypted with: its operator must correct "
            "COMFYUI_TEMPORAL_ENCRYPTION_KEYS.",
        ) from None
    except (TimeoutError, RuntimeError) as error:
        raise _unavailable(error) from None


def _unavailable(error: Exception) -> Problem:
    log.warning("temporal_call_failed", reason=type(error).__name__, detail=str(error)[:200])
    # Not "nothing was changed": the request may have arrived although its answer did not.
    return Problem(
        ProblemCode.TEMPORAL_UNAVAILABLE,
        "Temporal does not answer now: try again. With a task_id or an X-Idempotency-Key, a repeat is the same task.",
    )
