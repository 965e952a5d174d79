"""Looks at the task's row before a call that begins something (contract §4, earlier lives).

The look is part of the activity, not a step of the workflow: a look that stood in the history would be copied by the
next reset, and tell of a life that is no longer the newest. Each attempt looks anew.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.outside_http import current_time_limit_seconds, time_limit
from comfyui_temporal.contracts.calls import CallFor, JobCall, Post
from comfyui_temporal.contracts.credits import HoldReply
from comfyui_temporal.contracts.errors import Answer, FailureCode, Refusal
from comfyui_temporal.contracts.lives import READ_THE_LEDGER, STORE_UNAVAILABLE, TASK_ENDED, EarlierLife, TaskRun
from comfyui_temporal.contracts.scenes import SCENE_OF_WORKFLOW, SCENES
from store import StoreFailure, StoreUnavailable, TaskStore

Asked = TypeVar("Asked", bound=Post[Any] | JobCall)
Reply = TypeVar("Reply")

LOOK_SECONDS: Final = 1.5
NOTE_SECONDS: Final = 1.0

log = structlog.get_logger(__name__)


def acting_run(task_id: str, first_execution_run_id: str | None, run_number: int) -> TaskRun | None:
    """The run that this activity was scheduled by; None where it is none of a task, but a give-back's, say.

    By the activity, never by its input: what a reset run has copied of its history names the run that was reset.
    """
    info = activity.info()
    if info.workflow_type not in SCENE_OF_WORKFLOW or info.workflow_run_id is None:
        return None
    return TaskRun(
        task_id=task_id,
        run_id=info.workflow_run_id,
        run_number=run_number,
        first_execution_run_id=first_execution_run_id,
    )


class Lives:
    """What lets a call through, or answers in the other party's stead."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    async def begin(self, asked: Asked, call: Callable[[Asked], Awaitable[Answer[Reply]]]) -> Answer[Reply]:
        """Make a call that begins something, unless the task has ended: the refusal `task_ended`.

        Raises what the call raises, and ApplicationError `store_unavailable`, retryable.
        """
        return await self._through(asked, call)

    async def charge(self, asked: Asked, call: Callable[[Asked], Awaitable[Answer[Reply]]]) -> Answer[Reply]:
        """As `begin`, and `read_the_ledger` where an earlier life may have charged and the ledger was not read."""
        return await self._through(asked, call, is_settling=True)

    async def settle(self, asked: Asked, call: Callable[[Asked], Awaitable[Answer[Reply]]]) -> Answer[Reply]:
        """As `charge`, but a store that does not answer holds up no settlement: it follows the ledger alone."""
        return await self._through(asked, call, is_settling=True, waits_for_store=False)

    async def _through(
        self,
        asked: Asked,
        call: Callable[[Asked], Awaitable[Answer[Reply]]],
        *,
        is_settling: bool = False,
        waits_for_store: bool = True,
    ) -> Answer[Reply]:
        run = self._run(asked)
        if run is None:
            return await call(asked)
        began = time.monotonic()
        life = await self._life(run, waits_for_store=waits_for_store)
        if life.must_stop:
            return Answer(refusal=_refusal(TASK_ENDED, _why(life)), earlier_life=life)
        has_read = isinstance(asked, Post) and asked.has_read_ledger
        if is_settling and life.is_possible and not has_read:
            return Answer(refusal=_refusal(READ_THE_LEDGER, _why(life)), earlier_life=life)
        with time_limit(current_time_limit_seconds() - (time.monotonic() - began)):
            answer = await call(asked)
        return answer if is_settling else await self._noted(asked.call_for, answer, life)

    async def _life(self, run: TaskRun, *, waits_for_store: bool) -> EarlierLife:
        try:
            return await self._store.register(run, within_seconds=LOOK_SECONDS)
        except StoreUnavailable as failure:
            if waits_for_store:
                raise ApplicationError(str(failure), type=STORE_UNAVAILABLE) from None
            return EarlierLife(is_store_away=True)

    def _run(self, asked: Post[Any] | JobCall) -> TaskRun | None:
        if isinstance(asked, Post) and asked.is_undo:
            return None
        call_for = asked.call_for
        return acting_run(call_for.task_id, call_for.first_execution_run_id, call_for.run_number)

    async def _noted(self, call_for: CallFor, answer: Answer[Reply], life: EarlierLife) -> Answer[Reply]:
        """Keep what was made with the row: a run that is reset before it has told of it forgets it."""
        reply, is_known = answer.reply, False
        if isinstance(reply, HoldReply):
            is_known = await self._note(call_for, "hold", reply.pre_deduct_id)
        elif isinstance(reply, SCENES[call_for.scene].accepted):
            is_known = await self._note(call_for, "job", reply.job_id)
        if not life.is_possible:
            return answer
        return answer.model_copy(update={"earlier_life": life.model_copy(update={"is_known": is_known})})

    async def _note(self, call_for: CallFor, kind: Any, made: str) -> bool:
        try:
            return await self._store.note_made(call_for.task_id, kind, made, within_seconds=NOTE_SECONDS)
        except StoreFailure as failure:  # the answer counts; the run tells of it with its next write
            log.warning("not_noted", task_id=call_for.task_id, kind=kind, reason=str(failure))
            return False


def _why(life: EarlierLife) -> str:
    if life.has_ended:
        return "The task has ended: nothing more is begun for it."
    if life.is_given_back:
        return "The task is being given back: nothing more is begun for it."
    if life.is_superseded:
        return "Another run acts for the task: this one begins nothing more."
    return "An earlier life of the task may have settled it: its ledger is read first."


def _refusal(message: str, sentence: str) -> Refusal:
    return Refusal(code=FailureCode.TASK_CONFLICT, message=message, http_status=0, sentence=sentence)
