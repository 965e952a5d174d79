"""Following a task until it ends: the `progress` query twice a second, the end by Temporal's own long poll."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Final, Protocol

from temporalio.client import WorkflowHandle, WorkflowQueryFailedError, WorkflowQueryRejectedError
from temporalio.service import RPCError, RPCStatusCode

from cli.connection import Connection
from cli.outcome import TaskOutcome, outcome_of
from contracts.tasks import TrainingProgress

POLL_SECONDS: Final = 0.5
QUERY_TIMEOUT: Final = timedelta(seconds=2)


class Watcher(Protocol):
    """Who is told while a task runs: a progress bar, plain lines, a test."""

    def progressed(self, progress: TrainingProgress) -> None:
        """The task's newest state; called when something in it changed."""

    def waits_for_worker(self, sentence: str) -> None:
        """No worker answers: the task stands until one does."""


async def read_progress(handle: WorkflowHandle[Any, Any]) -> TrainingProgress:
    """The query `progress`; image tasks leave `confirmation` empty. Raises RPCError, WorkflowQueryFailedError."""
    progress: TrainingProgress = await handle.query("progress", result_type=TrainingProgress, rpc_timeout=QUERY_TIMEOUT)
    return progress


async def follow(
    connection: Connection, handle: WorkflowHandle[Any, Any], task_id: str, watcher: Watcher
) -> TaskOutcome:
    """Tell `watcher` every change until the task ends. Raises RPCError where Temporal stays away."""
    end = asyncio.create_task(outcome_of(handle, connection.server, task_id))
    seen: TrainingProgress | None = None
    try:
        while not end.done():
            try:
                progress = await read_progress(handle)
            except (WorkflowQueryFailedError, WorkflowQueryRejectedError):
                progress = None  # the first workflow task has not run yet, or the run is over
            except RPCError as error:
                progress = None
                if _is_silence_of_worker(error):
                    watcher.waits_for_worker(
                        f"No worker answers on task queue {connection.task_queue!r}: the task waits until one runs."
                    )
            if progress is not None and progress != seen:
                watcher.progressed(progress)
                seen = progress
            await asyncio.wait({end}, timeout=POLL_SECONDS)
        return await end
    finally:
        end.cancel()


def _is_silence_of_worker(error: RPCError) -> bool:
    return error.status in (
        RPCStatusCode.FAILED_PRECONDITION,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
    )
