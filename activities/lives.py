"""Reads the task's row before a call that starts something (contract §4, earlier lives).

This check is part of the activity, not a step of the workflow. A check in the history would be copied by the next
reset and would describe an outdated life. Each attempt checks again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

import structlog
from temporalio import activity
from temporalio.client import RPCError, RPCStatusCode, WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError

from activities.outside_http import current_time_limit_seconds, time_limit
from comfyui_temporal.contracts.calls import CallFor, JobCall, Post
from comfyui_temporal.contracts.credits import HoldReply
from comfyui_temporal.contracts.errors import Answer, FailureCode, Refusal
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW
from comfyui_temporal.contracts.lives import READ_THE_LEDGER, STORE_UNAVAILABLE, TASK_ENDED, EarlierLife, TaskRun
from comfyui_temporal.contracts.scenes import SCENE_OF_WORKFLOW, SCENES
from store import StoreFailure, StoreUnavailable, TaskStore

Request = TypeVar("Request", bound=Post[Any] | JobCall)
Reply = TypeVar("Reply")

LOOK_SECONDS: Final = 1.5
NOTE_SECONDS: Final = 1.0
CURRENT_RUN_WITHIN: Final = timedelta(seconds=1)

log = structlog.get_logger(__name__)


def acting_run(task_id: str, first_execution_run_id: str | None, run_number: int) -> TaskRun | None:
    """The run that scheduled this activity; None if it is not a task's run, for example a give-back.

    It comes from the activity's context, never from its input: a reset run copies inputs that name the run before it.
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


async def current(run: TaskRun) -> TaskRun | None:
    """`run` as the current one, if Temporal says that it is. Raises ApplicationError, retryable.

    To be called where the row says that the run was superseded: a late call of a run that was reset away may have
    displaced it, and the row alone does not show which of the two is alive.
    """
    handle = activity.client().get_workflow_handle(activity.info().workflow_id or "")
    try:
        description = await handle.describe(rpc_timeout=CURRENT_RUN_WITHIN)
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        sentence = f"Temporal did not say which run of the task is the current one ({error.status.name})."
        raise ApplicationError(sentence, type=FailureCode.INTERNAL.value) from None
    is_current = description.run_id == run.run_id and description.status is WorkflowExecutionStatus.RUNNING
    return run.model_copy(update={"is_current": True}) if is_current else None


class Lives:
    """Lets a call through, or answers in place of the other party."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    async def begin(self, request: Request, call: Callable[[Request], Awaitable[Answer[Reply]]]) -> Answer[Reply]:
        """Make a call that starts something. If the task has ended the answer is the refusal `task_ended`.

        Raises what the call raises, and ApplicationError `store_unavailable`, retryable.
        """
        return await self._through(request, call)

    async def charge(self, request: Request, call: Callable[[Request], Awaitable[Answer[Reply]]]) -> Answer[Reply]:
        """As `begin`; refuses with `read_the_ledger` if an earlier life may have charged and the ledger is unread.

        A give-back gets `task_ended` where another one has claimed the row: it was reset, or its call is late.
        """
        if activity.info().workflow_type == GIVE_BACK_WORKFLOW:
            return await self._of_give_back(request, call)
        return await self._through(request, call, is_settling=True)

    async def settle(self, request: Request, call: Callable[[Request], Awaitable[Answer[Reply]]]) -> Answer[Reply]:
        """As `charge`, but does not wait for an unavailable store: then the settlement relies on the ledger alone."""
        return await self._through(request, call, is_settling=True, waits_for_store=False)

    async def _through(
        self,
        request: Request,
        call: Callable[[Request], Awaitable[Answer[Reply]]],
        *,
        is_settling: bool = False,
        waits_for_store: bool = True,
    ) -> Answer[Reply]:
        run = self._run(request)
        if run is None:
            return await call(request)
        began = time.monotonic()
        life = await self._life(run, waits_for_store=waits_for_store)
        if life.must_stop:
            return Answer(refusal=_refusal(TASK_ENDED, _reason(life)), earlier_life=life)
        has_read = isinstance(request, Post) and request.has_read_ledger
        if is_settling and life.is_possible and not has_read:
            return Answer(refusal=_refusal(READ_THE_LEDGER, _reason(life)), earlier_life=life)
        with time_limit(current_time_limit_seconds() - (time.monotonic() - began)):
            answer = await call(request)
        return answer if is_settling else await self._recorded(request.call_for, answer, life)

    async def _of_give_back(
        self, request: Request, call: Callable[[Request], Awaitable[Answer[Reply]]]
    ) -> Answer[Reply]:
        began, by = time.monotonic(), activity.info().workflow_run_id or ""
        try:
            life = await self._store.life_of_give_back(request.call_for.task_id, by=by, within_seconds=LOOK_SECONDS)
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=STORE_UNAVAILABLE) from None
        if life.must_stop:
            return Answer(refusal=_refusal(TASK_ENDED, _reason(life)), earlier_life=life)
        with time_limit(current_time_limit_seconds() - (time.monotonic() - began)):
            return await call(request)

    async def _life(self, run: TaskRun, *, waits_for_store: bool) -> EarlierLife:
        try:
            life = await self._store.register(run, within_seconds=LOOK_SECONDS)
            if life.is_superseded and (again := await current(run)) is not None:
                life = await self._store.register(again, within_seconds=LOOK_SECONDS)
            return life
        except StoreUnavailable as failure:
            if waits_for_store:
                raise ApplicationError(str(failure), type=STORE_UNAVAILABLE) from None
            return EarlierLife(is_store_away=True)

    def _run(self, request: Post[Any] | JobCall) -> TaskRun | None:
        if isinstance(request, Post) and request.is_undo:
            return None
        call_for = request.call_for
        return acting_run(call_for.task_id, call_for.first_execution_run_id, call_for.run_number)

    async def _recorded(self, call_for: CallFor, answer: Answer[Reply], life: EarlierLife) -> Answer[Reply]:
        """Store the new id with the row: a run that is reset before its next write would forget it."""
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
        except StoreFailure as failure:  # the answer counts; the run's next write stores the id
            log.warning("not_noted", task_id=call_for.task_id, kind=kind, reason=str(failure))
            return False


def _reason(life: EarlierLife) -> str:
    if life.has_ended:
        return "The task has ended: nothing more is started for it."
    if life.is_given_back:
        return "The task is being given back: nothing more is started for it."
    if life.is_superseded:
        return "Another run acts for the task: this one starts nothing more."
    return "An earlier life of the task may have settled it: its ledger is read first."


def _refusal(message: str, sentence: str) -> Refusal:
    return Refusal(code=FailureCode.TASK_CONFLICT, message=message, http_status=0, sentence=sentence)
