"""One call to another party, as the workflow sees it.

1. A call that changes money or a job is a visible activity from its first try: its key and body stand in history
   before the effect, and a repeat sends the same (design, decision 1).
2. A definite refusal is an answer. What cannot be answered in time raises TaskFailed with the party's code.
3. No call is cut short. An opening call that is being retried when the task is to stop is asked to end after the
   attempt in flight; its effect, if any, is learned by the undo.
4. A call beside the flow (a renewal, an old job's cancel) is put down before the run continues as new: it ends after
   the attempt in flight, and the next run repeats it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, Protocol, TypeVar

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import ApplicationError, FailureError, is_cancelled_exception
from temporalio.workflow import ActivityCancellationType, ActivityHandle

from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import Answer, FailureCode, Refusal
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import PRIORITY_KEYS
from workflows.alarm import Alarm
from workflows.earlier_life import is_of_store, was_stopped
from workflows.failures import RowEnded, failure_from
from workflows.interruptible import Waiting
from workflows.stop import Stop

Argument = TypeVar("Argument")
Reply = TypeVar("Reply")
Result = TypeVar("Result")
Method = Callable[[Any, Argument], Awaitable[Result]]

ATTEMPT_TIMEOUT: Final = timedelta(seconds=10)
HEARTBEAT_TIMEOUT: Final = timedelta(seconds=2)
UNREADABLE_FOR: Final = timedelta(minutes=15)
ASK_AGAIN_AFTER: Final = timedelta(seconds=30)
"""Doubled with each unreadable answer, up to `ASK_AGAIN_AT_MOST`: every time asked stands in the history."""
ASK_AGAIN_AT_MOST: Final = timedelta(minutes=2)
RETRY: Final = RetryPolicy(
    initial_interval=timedelta(seconds=1), backoff_coefficient=2, maximum_interval=timedelta(seconds=30)
)
RETRY_SILENCE_ONLY: Final = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    backoff_coefficient=2,
    maximum_interval=timedelta(seconds=30),
    non_retryable_error_types=[FailureCode.REPLY_INVALID],
)
LOCAL_RETRY: Final = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=2)
LOCAL_TIMEOUT: Final = timedelta(seconds=2)
"""Below four fifths of a workflow task's 3 s: a local try that outlives these has an empty workflow task recorded, and
an update that comes then is replayed earlier than it was, which no history bears where it changes what is done.
"""
LOCAL_RETRY_THRESHOLD: Final = timedelta(seconds=2.5)


class _NoLocalAnswer(Exception):
    """The short local try did not succeed in time."""


class TaskFor(Protocol):
    """What a call needs to know of the task it is made for."""

    task_id: str
    tenant_id: str
    user_id: str
    priority: TaskPriority

    @property
    def scene(self) -> Scene: ...


class OutsideCall:
    """Makes the calls of one task: for its tenant, at its priority."""

    def __init__(self, task: TaskFor, stop: Stop, *, run_number: int = 0, waiting: Waiting | None = None) -> None:
        self.call_for = CallFor(
            task_id=task.task_id,
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            scene=task.scene,
            first_execution_run_id=workflow.info().first_execution_run_id,
            run_number=run_number,
        )
        self.priority = Priority(priority_key=PRIORITY_KEYS[task.priority], fairness_key=task.tenant_id)
        self._stop = stop
        self.waiting = waiting or Waiting(stop, Alarm())
        self.earlier = self.waiting.earlier
        self._is_suspended = False
        self._in_background = 0

    def key(self, step: str, n: int | str) -> str:
        """`X-Idempotency-Key` (contract §2, §4)."""
        return f"{self.call_for.task_id}:{step}:{n}"

    def may_begin(self) -> None:
        """Raise TaskStopped if a stop was asked for, RowEnded if the task has ended, TaskFailed if the credits have.

        To be asked before a call is noted: the undo learns of what is noted by asking for it, and would begin it.
        """
        self.waiting.raise_if_interrupted()

    async def setup(
        self, method: Method[Argument, Answer[Reply]], argument: Argument, *, summary: str, minutes: float
    ) -> Answer[Reply]:
        """A call that begins something, retried for `minutes`, which a task store that is away does not use up.

        The hold is looked after meanwhile. Raises TaskFailed (the party's `*_unavailable`, `reply_invalid`, `timeout`
        or `credit_exhausted`), or TaskStopped where a stop was asked for and the call has not been answered, or
        RowEnded where the task has ended.
        """
        while True:
            self.waiting.raise_if_interrupted()
            handle = self.visible(method, argument, summary=summary, within=timedelta(minutes=minutes))
            end = await self.waiting.answered(handle, summary=f"{summary}: look after the hold meanwhile")
            if not handle.done():
                handle.cancel()
            try:
                answer = await handle
            except FailureError as error:
                # Not always as cancelled: an attempt that fails before it hears of the wish ends as its own failure.
                self._stop.raise_if_requested()
                if end is not None:
                    raise end from error
                if is_of_store(error):
                    continue
                raise failure_from(error, _unavailable(method)) from error
            self.earlier.learn_from(answer)
            if was_stopped(answer):
                raise RowEnded()
            return answer

    async def until_answered(
        self,
        method: Method[Argument, Answer[Reply]],
        argument: Argument,
        *,
        summary: str,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Answer[Reply] | None:
        """A call that is repeated without end for silence, 429 and 5xx (contract §4).

        An answer that stays unreadable for 15 minutes counts as a refusal. None where `give_up()` came first.
        """
        unreadable_until, wait, rounds = None, ASK_AGAIN_AFTER, 0
        while True:
            handle = self.visible(method, argument, summary=summary, retry=RETRY_SILENCE_ONLY)
            await workflow.wait_condition(lambda handle=handle: handle.done() or give_up())  # type: ignore[misc]
            if not handle.done():
                handle.cancel()
            try:
                answer = await handle
            except FailureError as error:
                if is_cancelled_exception(error):
                    return None
                failure = failure_from(error, _unavailable(method))
            else:
                answer.tries += rounds
                self.earlier.learn_from(answer)
                return answer
            rounds += 1
            unreadable_until = unreadable_until or workflow.now() + UNREADABLE_FOR
            if workflow.now() >= unreadable_until:
                return Answer(refusal=_unreadable(str(failure)))
            rest = unreadable_until - workflow.now()
            if await self.wait_for(min(wait, rest), give_up, summary=f"{summary}: unreadable answer, asked again"):
                return None
            wait = min(2 * wait, ASK_AGAIN_AT_MOST)

    # Calls beside the flow

    async def in_background(
        self,
        method: Method[Argument, Answer[Reply]],
        argument: Argument,
        *,
        summary: str,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Answer[Reply] | None:
        """`until_answered` for a call that the flow does not wait for: None also where it was put down."""
        if self._is_suspended:
            return None
        self._in_background += 1
        try:
            return await self.until_answered(
                method, argument, summary=summary, give_up=lambda: self._is_suspended or give_up()
            )
        finally:
            self._in_background -= 1

    def has_background_calls(self) -> bool:
        """Whether a call beside the flow is in flight: its answer would be heard by nobody."""
        return self._in_background > 0

    @property
    def is_suspended(self) -> bool:
        return self._is_suspended

    async def suspend(self) -> None:
        """Wait until no call is left beside the flow, each after its attempt in flight, or a stop is asked for.

        None begins from here on: one that began while the run closes would be left behind.
        """
        self._is_suspended = True
        if self.has_background_calls():
            await workflow.wait_condition(lambda: self._stop.requested or not self.has_background_calls())

    def resume(self) -> None:
        """Calls may be made again: the run did not continue as new after all, or its end has begun."""
        self._is_suspended = False

    async def wait_for(self, span: timedelta, happened: Callable[[], bool], *, summary: str) -> bool:
        """Wait until `happened()`, for `span` at most; whether it happened."""
        try:
            await workflow.wait_condition(happened, timeout=span, timeout_summary=summary)
        except TimeoutError:
            return False
        return True

    async def wait_unless_stopped(self, happened: Callable[[], bool]) -> None:
        """Wait until `happened()`. Raises TaskStopped where a stop was asked for before."""
        await workflow.wait_condition(lambda: happened() or self._stop.requested)
        if not happened():
            self._stop.raise_if_requested()

    async def read(
        self, method: Method[Argument, Answer[Reply]], argument: Argument, *, summary: str, minutes: float
    ) -> Answer[Reply]:
        """A call that changes nothing: a short local try, then a visible one. Raises as `opening`."""
        self.waiting.raise_if_interrupted()
        try:
            return await self._local_try(method, argument, summary=summary)
        except _NoLocalAnswer:
            return await self.setup(method, argument, summary=summary, minutes=minutes)

    async def write_store(
        self, method: Method[Argument, Result], argument: Argument, *, summary: str, is_recorded: bool = True
    ) -> Result:
        """A keyed write to our own store: a short local try, then a visible one without end.

        What tells of a decision that is not `is_recorded` in the history yet is visible at once: its workflow task may
        be lost after a local write, and decide otherwise when it comes again with what has come since (pitfall 34).
        """
        try:
            if is_recorded:
                return await self._local_try(method, argument, summary=summary)
        except _NoLocalAnswer:
            pass
        return await self.visible(method, argument, summary=summary)

    async def read_store(
        self, method: Method[Argument, Result], argument: Argument, *, summary: str, within: timedelta
    ) -> Result:
        """A read of our own store: a short local try, then a visible one. Raises FailureError where none answers."""
        try:
            return await self._local_try(method, argument, summary=summary)
        except _NoLocalAnswer:
            return await self.visible(method, argument, summary=summary, within=within)

    async def _local_try(self, method: Method[Argument, Result], argument: Argument, *, summary: str) -> Result:
        """For reads and keyed writes only: it leaves no trace until it is recorded (pitfall 21).

        Raises _NoLocalAnswer, or ApplicationError where no further try will help (pitfall 32).
        """
        try:
            # Only `schedule_to_close`: a failed attempt's `start_to_close` timer would kill the next one (pitfall 33).
            return await workflow.execute_local_activity_method(
                method,
                argument,
                schedule_to_close_timeout=LOCAL_TIMEOUT,
                retry_policy=LOCAL_RETRY,
                local_retry_threshold=LOCAL_RETRY_THRESHOLD,
                summary=summary,
            )
        except ApplicationError as error:
            if error.non_retryable:
                raise
            raise _NoLocalAnswer from error
        except FailureError as error:
            raise _NoLocalAnswer from error

    def visible(
        self,
        method: Method[Argument, Result],
        argument: Argument,
        *,
        summary: str,
        within: timedelta | None = None,
        retry: RetryPolicy = RETRY,
        attempt_timeout: timedelta = ATTEMPT_TIMEOUT,
    ) -> ActivityHandle[Result]:
        """Schedule the call as an activity that operators see while it is retried."""
        return workflow.start_activity_method(
            method,
            argument,
            schedule_to_close_timeout=within,
            start_to_close_timeout=attempt_timeout,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=retry,
            cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            priority=self.priority,
            summary=summary,
        )


def _unavailable(method: Callable[..., Any]) -> FailureCode:
    of_credits = "Credits" in getattr(method, "__qualname__", "")
    return FailureCode.CREDITS_UNAVAILABLE if of_credits else FailureCode.COMFYUI_UNAVAILABLE


def _unreadable(sentence: str) -> Refusal:
    return Refusal(code=FailureCode.REPLY_INVALID, message="unreadable", http_status=0, sentence=sentence)
