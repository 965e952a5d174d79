"""Following a task until it ends: by the gateway's stream where one is known, else by the `progress` query twice a
second. Its end is told by Temporal's own long poll."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Final, Protocol

from temporalio.client import WorkflowHandle, WorkflowQueryFailedError, WorkflowQueryRejectedError
from temporalio.common import SearchAttributeKey
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.gateway_stream import GatewayStream, StreamCut, StreamRefused
from comfyui_temporal.command_line.outcome import TaskOutcome, outcome_of
from comfyui_temporal.contracts.tasks import TrainingProgress
from comfyui_temporal.runs import NoQueryNow, describe_run, query_run

POLL_SECONDS: Final = 0.5
QUERY_TIMEOUT: Final = timedelta(seconds=2)
TENANT_ID: Final = SearchAttributeKey.for_keyword("TenantId")


class Watcher(Protocol):
    """Who is told while a task runs: a progress bar, plain lines, a test."""

    def progressed(self, progress: TrainingProgress) -> None:
        """The task's newest state; called when something in it changed."""

    def waits_for_worker(self, sentence: str) -> None:
        """No worker answers: the task stands until one does."""


async def read_progress(handle: WorkflowHandle[Any, Any]) -> TrainingProgress:
    """The query `progress`; image tasks leave `confirmation` empty.

    Raises RPCError, WorkflowQueryFailedError, NoQueryNow.
    """
    return await query_run(handle, "progress", result_type=TrainingProgress, rpc_timeout=QUERY_TIMEOUT)


async def follow(
    connection: Connection, handle: WorkflowHandle[Any, Any], task_id: str, watcher: Watcher
) -> TaskOutcome:
    """Tell `watcher` every change until the task ends. Raises RPCError where Temporal stays away."""
    end = asyncio.create_task(outcome_of(handle, connection, task_id))
    teller = _Teller(watcher)
    stream = await _stream_of(connection, handle, task_id)
    try:
        while not end.done():
            if stream is not None:
                try:
                    await _told_by(stream, teller, end)
                except StreamRefused:
                    stream = None
                except StreamCut:
                    pass  # asked by query in between, which also tells whether a worker answers
            if stream is not None and stream.is_over:
                break
            if not end.done():
                await _ask(connection, handle, teller)
            await asyncio.wait({end}, timeout=POLL_SECONDS)
        return await end
    finally:
        end.cancel()


class _Teller:
    """Tells a watcher what is new."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._told: TrainingProgress | None = None

    def tell(self, progress: TrainingProgress) -> None:
        if progress != self._told:
            self._told = progress
            self._watcher.progressed(progress)

    def tell_of_silence(self, task_queue: str) -> None:
        self._watcher.waits_for_worker(
            f"No worker answers on task queue {task_queue!r}: the task waits until one runs."
        )

    def tell_of_pause(self, sentence: str) -> None:
        self._watcher.waits_for_worker(sentence)


async def _stream_of(connection: Connection, handle: WorkflowHandle[Any, Any], task_id: str) -> GatewayStream | None:
    if connection.gateway is None:
        return None
    run = await describe_run(connection.client, handle.id, rpc_timeout=QUERY_TIMEOUT)
    return connection.gateway.stream_of(task_id, run.search_attributes.get(TENANT_ID))


async def _told_by(stream: GatewayStream, teller: _Teller, end: asyncio.Task[TaskOutcome]) -> None:
    """Until the stream or the task ends. Raises StreamRefused, StreamCut."""

    async def tell() -> None:
        async for progress in stream.changes():
            teller.tell(progress)

    telling = asyncio.create_task(tell())
    try:
        await asyncio.wait({telling, end}, return_when=asyncio.FIRST_COMPLETED)
        if telling.done():
            await telling
    finally:
        telling.cancel()
        # Its connection is closed by then: whatever cancels next would leave it half open.
        await asyncio.wait({telling})


async def _ask(connection: Connection, handle: WorkflowHandle[Any, Any], teller: _Teller) -> None:
    try:
        teller.tell(await read_progress(handle))
    except (WorkflowQueryFailedError, WorkflowQueryRejectedError):
        pass  # the first workflow task has not run yet, or the run is over
    except NoQueryNow as paused:
        teller.tell_of_pause(str(paused))
    except RPCError as error:
        if _is_silence_of_worker(error):
            teller.tell_of_silence(connection.task_queue)


def _is_silence_of_worker(error: RPCError) -> bool:
    return error.status in (
        RPCStatusCode.FAILED_PRECONDITION,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
    )
