"""Start a task and wait until credits are held, by one call to Temporal (contract §6 `Prefer: wait`, §8).

Used by `TemporalTasks` and by the gateway.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.client.submission import RPC_TIMEOUT, Started, start_options, start_task
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.start_answer import WAIT_UNTIL_HELD, Reached, StartAnswer, WaitUntilHeld
from comfyui_temporal.contracts.tasks import TASK_QUEUE, Confirmation, TaskInput, TrainingProgress
from comfyui_temporal.runs import NoQueryNow, query_run

T = TypeVar("T")
SURE_AFTER_SECONDS: Final = 2.0
"""While Temporal waits for a worker its answer does not come. After this long a plain start makes sure of the task."""


@dataclass(frozen=True)
class WaitedStart:
    """A task's run, and what it answered. `answer` is None where it said nothing in time, or is over."""

    started: Started
    answer: StartAnswer | None = None
    update_id: str = WAIT_UNTIL_HELD
    """By which the wait can go on."""


async def start_waiting(
    client: Client, task: TaskInput, *, task_queue: str = TASK_QUEUE, within_seconds: float
) -> WaitedStart:
    """Start a task, or find it, as `start_task` does; the first answer comes with the start, in one round trip.

    It waits for two seconds at most: `go_on_waiting` has the rest. Raises as `start_task`, and TimeoutError where
    Temporal is silent.
    """
    update_id = str(uuid.uuid4())  # not a fixed one: by that the server would find the update of another input
    operation: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
        SCENES[task.scene].workflow, task, **start_options(client, task, task_queue)
    )
    call = client.execute_update_with_start_workflow(
        WAIT_UNTIL_HELD,
        WaitUntilHeld(),
        start_workflow_operation=operation,
        id=update_id,
        result_type=StartAnswer,
    )
    try:
        answer = await within(call, min(within_seconds, SURE_AFTER_SECONDS))
    except WorkflowAlreadyStartedError:
        await _read(operation)
        return WaitedStart(await _started(client, task, task_queue))
    except WorkflowUpdateFailedError:  # by an older worker, which does not know the update
        answer = None
    except (TimeoutError, RPCError) as error:
        await _read(operation)
        # NOT_FOUND: the run closed before it handled the update, or there is no such namespace, which the start tells.
        if isinstance(error, RPCError) and error.status is not RPCStatusCode.NOT_FOUND:
            raise
        started = await _started(client, task, task_queue)
        # A task of an earlier start would have been reported at once.
        return WaitedStart(Started(started.handle, started.task_id, started.run_id, is_new=True), update_id=update_id)
    handle = await operation.workflow_handle()
    return WaitedStart(Started(handle, task.task_id, handle.first_execution_run_id or "", is_new=True), answer)


async def _read(operation: WithStartWorkflowOperation[Any, Any]) -> None:
    """Read the error that the operation keeps too, or asyncio reports it as never retrieved."""
    kept = asyncio.ensure_future(operation.workflow_handle())
    await asyncio.wait({kept}, timeout=1.0)
    kept.cancel()
    await asyncio.gather(kept, return_exceptions=True)


async def _started(client: Client, task: TaskInput, task_queue: str) -> Started:
    return await asyncio.wait_for(start_task(client, task, task_queue=task_queue), RPC_TIMEOUT.total_seconds())


async def go_on_waiting(
    handle: WorkflowHandle[Any, Any], update_id: str, *, within_seconds: float
) -> StartAnswer | None:
    """The answer of a task that was started before; None where there is none in time, or the run is over.

    One update id means one update, however often it is repeated: many that wait do not use up those that a run takes.
    """
    call = handle.execute_update(WAIT_UNTIL_HELD, WaitUntilHeld(), id=update_id, result_type=StartAnswer)
    try:
        return await within(call, within_seconds)
    except (TimeoutError, WorkflowUpdateFailedError):
        return None
    except RPCError as error:
        if error.status in (RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED):
            raise
        return None  # the task is started: that is the answer


async def wait_again(handle: WorkflowHandle[Any, Any], *, within_seconds: float) -> StartAnswer | None:
    """The answer to the repeat of a start, as `go_on_waiting`.

    A repeat may find the answer to an earlier one: a price that has been confirmed since. After that it waits by the
    next id, which every repeat derives from that answer.
    """
    ends_at = time.monotonic() + within_seconds
    update_id = WAIT_UNTIL_HELD
    while True:
        answer = await go_on_waiting(handle, update_id, within_seconds=ends_at - time.monotonic())
        if answer is None or answer.reached is not Reached.CONFIRMATION:
            return answer
        asked = answer.state.confirmation
        if await still_asks(handle, asked.shown() if asked is not None else None):
            return answer
        update_id = f"{WAIT_UNTIL_HELD}:{answer.state.version}"


async def still_asks(handle: WorkflowHandle[Any, Any], confirmation: Confirmation | None) -> bool:
    """Whether the payer's answer to this price is still waited for; also where that cannot be read."""
    try:
        progress = await query_run(handle, "progress", result_type=TrainingProgress, rpc_timeout=RPC_TIMEOUT)
    except (RPCError, NoQueryNow, WorkflowQueryFailedError, WorkflowQueryRejectedError):
        return True
    return progress.confirmation == confirmation


async def within(call: Coroutine[Any, Any, T], seconds: float) -> T:
    """Raises TimeoutError. The SDK turns a cancellation into an error of its own, so no `asyncio.timeout` here."""
    calling = asyncio.create_task(call)
    try:
        await asyncio.wait({calling}, timeout=max(0.0, seconds))
        if not calling.done():
            raise TimeoutError
        return calling.result()
    except WorkflowUpdateRPCTimeoutOrCancelledError:
        raise TimeoutError from None
    finally:
        if not calling.done():
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
