"""A start that waits until credits are held (contract §6 `Prefer: wait=N`): what it is answered, and for how long."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

from temporalio.client import Client, WorkflowHandle

from comfyui_temporal.client.errors import TaskExists
from comfyui_temporal.client.waiting_start import WaitedStart, go_on_waiting, start_waiting, still_asks, wait_again
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.start_answer import (
    CREDITS_REFUSED,
    ID_REFUSED,
    INPUT_REFUSED,
    MAX_WAIT_SECONDS,
    StartAnswer,
)
from comfyui_temporal.contracts.task_store import TaskRow, TaskState
from comfyui_temporal.contracts.tasks import TaskInput, TaskStatus, workflow_id_of
from comfyui_temporal.contracts.tasks_api import TaskView
from comfyui_temporal.encryption import encryption_of
from gateway.draining import Draining
from gateway.problems import Problem, ProblemCode
from gateway.temporal_calls import temporal_problems
from store import StoreUnavailable, TaskStore

APPLIED: Final = "Preference-Applied"
REPLAYED: Final = "Idempotent-Replayed"
_OF_STATE: Final = set(TaskState.model_fields) & set(TaskView.model_fields)


def seconds_of(prefer: str | None) -> int:
    """N of `Prefer: wait=N`, 60 at most; 0 without one. What cannot be read is ignored (RFC 7240)."""
    for preference in (prefer or "").split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            digits = value.strip().strip('"')
            is_number = digits.isascii() and digits.isdigit() and len(digits) < 10
            return min(int(digits), MAX_WAIT_SECONDS) if is_number else 0
    return 0


def is_answered(view: TaskView) -> bool:
    """Whether the task itself answers a start that waits: a hold, a price to confirm, or the end."""
    return view.status.is_end() or view.confirmation is not None or view.credits.pre_deduct_count > 0


def refusal_of(view: TaskView) -> Problem | None:
    """The problem that a start that waits is answered where its task failed before anything was held."""
    if view.status is not TaskStatus.FAILED or view.error is None or view.credits.pre_deduct_count:
        return None
    code = view.error.code
    if code in CREDITS_REFUSED:
        return Problem(ProblemCode(code), view.error.message, status=HTTPStatus.PAYMENT_REQUIRED)
    if code in INPUT_REFUSED | ID_REFUSED:
        return Problem(ProblemCode(code), view.error.message)
    return None


class StartWaits:
    """Each wait ends after its seconds, or when the gateway shuts down: then the task goes on without it."""

    def __init__(self, temporal: Client, store: TaskStore, draining: Draining, *, task_queue: str) -> None:
        self._temporal = temporal
        self._store = store
        self._draining = draining
        self._task_queue = task_queue

    async def begin(self, task: TaskInput, ends_at: float) -> WaitedStart:
        """Start the task, and wait for two seconds at most. Raises Problem, TaskExists."""
        with temporal_problems():
            return await start_waiting(
                self._temporal, task, task_queue=self._task_queue, within_seconds=_left_until(ends_at)
            )

    async def go_on(self, waited: WaitedStart, ends_at: float) -> StartAnswer | None:
        """The rest of a wait: the answer, or None. Raises Problem."""
        if waited.answer is not None:
            return waited.answer
        with temporal_problems():
            return await self._until_drained(waited.started.handle.id, waited, ends_at)

    async def again(self, view: TaskView, ends_at: float) -> StartAnswer | None:
        """The wait of a repeat, as `go_on`. `view`: the task, which does not answer it yet."""
        workflow_id = workflow_id_of(view.task_id)
        # The payer's answer reaches the row with the next event only.
        if view.confirmation is not None and await still_asks(self._handle(workflow_id), view.confirmation):
            return None
        with temporal_problems():
            return await self._until_drained(workflow_id, None, ends_at)

    def _handle(self, workflow_id: str) -> WorkflowHandle[Any, Any]:
        return self._temporal.get_workflow_handle(workflow_id)

    async def _until_drained(self, workflow_id: str, waited: WaitedStart | None, ends_at: float) -> StartAnswer | None:
        handle, seconds = self._handle(workflow_id), _left_until(ends_at)
        if waited is not None and waited.started.is_new:
            waiting = asyncio.create_task(go_on_waiting(handle, waited.update_id, within_seconds=seconds))
        else:
            waiting = asyncio.create_task(wait_again(handle, within_seconds=seconds))
        drained = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({waiting, drained}, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            for left in (waiting, drained):
                left.cancel()
            await asyncio.gather(waiting, drained, return_exceptions=True)

    async def seen(self, task: TaskInput, answer: StartAnswer | None) -> TaskView:
        """The task by its row, or by the answer where that is newer. Raises TaskExists for another task's row."""
        row: TaskRow | None = None
        if answer is None or answer.state.error is None or answer.state.error.code != FailureCode.TASK_EXISTS:
            with suppress(StoreUnavailable):
                row = await self._store.task(task.task_id)
        elif answer.state.status is TaskStatus.FAILED:
            raise TaskExists(task.task_id)
        if row is not None and not encryption_of(self._temporal).is_hash_of(row.input_sha256, task):
            raise TaskExists(task.task_id)
        view = TaskView.accepted(task) if row is None else TaskView.of_row(row)
        if answer is None or (row is not None and row.version >= answer.state.version):
            return view
        return TaskView.model_validate(view.model_dump() | answer.state.model_dump(include=_OF_STATE))


def ends_at(seconds: int) -> float:
    return time.monotonic() + seconds


def _left_until(ends_at: float) -> float:
    return max(0.0, ends_at - time.monotonic())
