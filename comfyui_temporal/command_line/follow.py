"""Follows a task until it ends: by the gateway's stream if one is known, else by the `progress` query twice a
second. The final status always comes from Temporal."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Protocol

from temporalio.client import WorkflowHandle
from temporalio.common import SearchAttributeKey

from comfyui_temporal.client.errors import AccessDenied, TaskError, UnknownTask
from comfyui_temporal.client.http_tasks import HttpTasks
from comfyui_temporal.client.models import TaskOutcome, TaskUpdate
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.tasks import TrainingProgress
from comfyui_temporal.runs import describe_run

POLL_SECONDS: Final = 0.5
DESCRIBE_TIMEOUT: Final = timedelta(seconds=2)
TENANT_ID: Final = SearchAttributeKey.for_keyword("TenantId")


class Watcher(Protocol):
    """Shows a running task: a progress bar, plain lines, a test."""

    def progressed(self, progress: TrainingProgress) -> None:
        """The task's newest state, called after each change."""

    def waits_for_worker(self, sentence: str) -> None:
        """No worker answers: the task makes no progress until one does."""


async def follow(opened: Connection, task_id: str, watcher: Watcher) -> TaskOutcome:
    """Report every change to `watcher` until the task ends. Raises TaskError if Temporal stays away."""
    handle = await opened.tasks.find(task_id)
    end = asyncio.create_task(opened.tasks.wait(task_id))
    reporter = _Reporter(watcher)
    stream = await _stream_of(opened, handle, task_id)
    try:
        while not end.done():
            if stream is not None:
                try:
                    await _report_stream(stream, reporter, end)
                except (AccessDenied, UnknownTask):  # a token of another tenant: it stays so
                    await stream.tasks.aclose()
                    stream = None
                except TaskError:
                    pass  # interrupted: one query in between also shows whether a worker answers
            if stream is not None and stream.is_over:
                break
            if not end.done():
                update = await opened.tasks.read_update(handle, reporter.newest)
                if stream is None or not reporter.is_older(update):
                    reporter.report(update)
            await asyncio.wait({end}, timeout=POLL_SECONDS)
        return await end
    finally:
        end.cancel()
        if stream is not None:
            await stream.tasks.aclose()


class _Reporter:
    """Passes changes on to a watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.newest: TaskUpdate | None = None

    def is_older(self, update: TaskUpdate | None) -> bool:
        """Whether these figures of the workflow are older than those of the stream: it hears of ticks later."""
        newest = self.newest
        if update is None or newest is None or update.standstill is not None:
            return False
        is_same_stage = (update.attempts, update.stage) == (newest.attempts, newest.stage)
        return is_same_stage and update.progress < newest.progress

    def report(self, update: TaskUpdate | None) -> None:
        if update is None:
            return
        if update.standstill is not None:
            self._watcher.waits_for_worker(update.standstill)
            return
        update = update.model_copy(update={"cursor": None})
        if update != self.newest:
            self.newest = update
            self._watcher.progressed(update)


@dataclass
class _Stream:
    """One task's stream, over as many connections as it needs."""

    tasks: HttpTasks
    task_id: str
    cursor: str | None = None
    is_over: bool = field(default=False)
    """The task's last event was received."""


async def _stream_of(opened: Connection, handle: WorkflowHandle[Any, Any], task_id: str) -> _Stream | None:
    if opened.gateway is None:
        return None
    run = await describe_run(opened.client, handle.id, rpc_timeout=DESCRIBE_TIMEOUT)
    tasks = opened.gateway.tasks_of(run.search_attributes.get(TENANT_ID))
    return _Stream(tasks, task_id) if tasks else None


async def _report_stream(stream: _Stream, reporter: _Reporter, end: asyncio.Task[TaskOutcome]) -> None:
    """Return when the stream is interrupted or the task ends. Raises TaskError."""

    async def report() -> None:
        async with aclosing(stream.tasks.follow(stream.task_id, cursor=stream.cursor)) as updates:
            async for update in updates:
                stream.cursor = update.cursor
                reporter.report(update)
        stream.is_over = True

    reporting = asyncio.create_task(report())
    try:
        await asyncio.wait({reporting, end}, return_when=asyncio.FIRST_COMPLETED)
        if reporting.done():
            await reporting
    finally:
        reporting.cancel()
        # Wait for its connection to close: a later cancellation would leave it half open.
        await asyncio.wait({reporting})
