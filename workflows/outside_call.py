"""One call to another party, as the workflow sees it.

1. A call that changes money or a job is a visible activity from its first try: its key and body are in history
   before the effect, and a repeat sends the same (decision 1).
2. A definite refusal is an answer. A call without an answer in time raises TaskFailed with the party's code.
3. No call is cut short. When the task is to stop, a setup call that is being retried ends after the attempt in flight;
   the undo finds out what it did.
4. A background call (a renewal, an old job's cancel) is suspended before the run continues as new: it ends after the
   attempt in flight, and the next run repeats it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, Final, Protocol, TypeVar

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import ApplicationError, FailureError, is_cancelled_exception
from temporalio.workflow import ActivityCancellationType, ActivityHandle

from activities.credits import CreditsActivities
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import Answer, FailureCode, UnreadableReply
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import PRIORITY_KEYS
from workflows.alarm import Alarm
from workflows.earlier_life import is_of_store, was_stopped
from workflows.failures import RowEnded, failure_from, is_own_absence
from workflows.interruptible import InterruptibleWaits
from workflows.step_labels import STEP_LABELS, wait_in
from workflows.stop import Stop
from workflows.task_limits import TaskLimits

Argument = TypeVar("Argument")
Reply = TypeVar("Reply")
Result = TypeVar("Result")
Method = Callable[[Any, Argument], Awaitable[Result]]

ATTEMPT_TIMEOUT: Final = timedelta(seconds=10)
NEW_FOR: Final = ATTEMPT_TIMEOUT
"""How long a background call is waited for before the run continues as new."""
SHORTEST_CALL: Final = timedelta(seconds=1)
"""0 would mean that the call has no limit."""
HEARTBEAT_TIMEOUT: Final = timedelta(seconds=2)
STORE_TIMEOUT: Final = timedelta(minutes=1)
"""Of one attempt of give-back, correction or reconciler at the task store. They hold nothing that could expire."""
UNREADABLE_FOR: Final = timedelta(minutes=15)
ASK_AGAIN_AFTER: Final = timedelta(seconds=30)
"""Doubled with each unreadable answer, up to `ASK_AGAIN_AT_MOST`: each call is in the history."""
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
"""Below four fifths of a workflow task's 3 s. After that the server records an empty workflow task, and an update that
arrives then is replayed earlier than it was handled. Where it changes a decision, this would make replay
nondeterministic.
"""
LOCAL_RETRY_THRESHOLD: Final = timedelta(seconds=2.5)
OWN_ABSENCE: Final = "own-absence-is-no-outage"
ROUNDS_COUNTED: Final = "calls-before-an-outage-of-the-store-counted-as-tries"


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

    def __init__(
        self,
        task: TaskFor,
        stop: Stop,
        *,
        run_number: int = 0,
        waits: InterruptibleWaits | None = None,
        limits: TaskLimits | None = None,
    ) -> None:
        """`limits` are needed by setup calls only."""
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
        self.labels = STEP_LABELS[task.scene]
        self.limits = limits or TaskLimits()
        self.waits = waits or InterruptibleWaits(stop, Alarm())
        self.earlier = self.waits.earlier
        self._is_suspended = False
        self._in_background: list[datetime] = []

    def key(self, step: str, n: int | str) -> str:
        """`X-Idempotency-Key` (contract §2, §4)."""
        return f"{self.call_for.task_id}:{step}:{n}"

    def may_begin(self) -> None:
        """Raise TaskStopped after a cancel, RowEnded where the task has ended, TaskFailed where its credits ran out.

        To be called before a call is recorded: the undo repeats a recorded call to learn its id, and would begin it.
        """
        self.waits.raise_if_interrupted()

    async def setup(
        self,
        method: Method[Argument, Answer[Reply]],
        argument: Argument,
        *,
        summary: str,
        until: datetime | None = None,
        again: Callable[[], Awaitable[None]] | None = None,
    ) -> Answer[Reply]:
        """A call that begins something, retried for the policy's `opening_call_minutes`, and not beyond `until`.

        Time in which the task store or our own workers are away does not count, and the hold is kept alive; `again` is
        awaited before the call is scheduled once more. Raises TaskFailed (the party's `*_unavailable`, `reply_invalid`,
        `timeout` or `credit_exhausted`), TaskStopped where a cancel came before the answer, RowEnded where the task has
        ended, and as `again`.
        """
        longest = timedelta(minutes=self.limits.policy.opening_call_minutes)
        rounds = 0
        while True:
            self.waits.raise_if_interrupted()
            within = longest if until is None else min(longest, max(until - workflow.now(), SHORTEST_CALL))
            handle = self.visible(method, argument, summary=summary, within=within)
            end = await self.waits.answered(handle, summary=wait_in(summary, "keep the hold meanwhile"))
            if not handle.done():
                handle.cancel()
            try:
                answer = await handle
            except FailureError as error:
                # An attempt that fails before the cancellation reaches it ends as its own failure, not as cancelled.
                self._stop.raise_if_requested()
                if end is not None:
                    raise end from error
                if is_of_store(error):
                    rounds += 1
                elif is_own_absence(error) and workflow.patched(OWN_ABSENCE):
                    self.waits.raise_if_over()
                    rounds += error.__cause__ is not None and error.__cause__.__cause__ is not None
                else:
                    raise failure_from(error, _unavailable(method)) from error
                if again is not None:
                    await again()
                continue
            self.earlier.learn_from(answer)
            if was_stopped(answer):
                raise RowEnded(is_unsent=rounds + answer.tries == 1)
            if rounds and workflow.patched(ROUNDS_COUNTED):
                answer.tries += rounds
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

        An answer that stays unreadable for 15 minutes counts as a refusal (`UnreadableReply`). None where `give_up()`
        came first.
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
                return Answer(refusal=UnreadableReply(sentence=str(failure)))
            rest = unreadable_until - workflow.now()
            if await self.wait_for(min(wait, rest), give_up, summary=wait_in(summary, "unreadable answer, repeat")):
                return None
            wait = min(2 * wait, ASK_AGAIN_AT_MOST)

    # Background calls

    async def in_background(
        self,
        method: Method[Argument, Answer[Reply]],
        argument: Argument,
        *,
        summary: str,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Answer[Reply] | None:
        """`until_answered` for a call that the flow does not wait for. None also where it was suspended."""
        if self._is_suspended:
            return None
        began = workflow.now()
        self._in_background.append(began)
        try:
            return await self.until_answered(
                method, argument, summary=summary, give_up=lambda: self._is_suspended or give_up()
            )
        finally:
            self._in_background.remove(began)

    def has_background_calls(self) -> bool:
        """Whether a background call is in flight: a run that closes would lose its answer."""
        return bool(self._in_background)

    def has_new_calls(self) -> bool:
        """Whether a background call began a moment ago: suspended now, it might never be sent."""
        return bool(self._in_background) and workflow.now() - max(self._in_background) < NEW_FOR

    @property
    def is_suspended(self) -> bool:
        return self._is_suspended

    async def suspend(self) -> None:
        """Wait until no background call is left, each after its attempt in flight, or a cancel arrives.

        No new one begins: the run would close without its answer.
        """
        self._is_suspended = True
        if self.has_background_calls():
            await workflow.wait_condition(lambda: self._stop.requested or not self.has_background_calls())

    def resume(self) -> None:
        """Allow background calls again: the run did not continue as new, or its end has begun."""
        self._is_suspended = False

    async def wait_for(self, span: timedelta, happened: Callable[[], bool], *, summary: str) -> bool:
        """Wait until `happened()`, for `span` at most. Returns whether it happened."""
        try:
            await workflow.wait_condition(happened, timeout=span, timeout_summary=summary)
        except TimeoutError:
            return False
        return True

    async def wait_unless_stopped(self, happened: Callable[[], bool]) -> None:
        """Wait until `happened()`. Raises TaskStopped where a cancel came first."""
        await workflow.wait_condition(lambda: happened() or self._stop.requested)
        if not happened():
            self._stop.raise_if_requested()

    async def read(self, method: Method[Argument, Answer[Reply]], argument: Argument, *, summary: str) -> Answer[Reply]:
        """A call that changes nothing: a short local try, then a visible one. Raises as `setup`."""
        self.waits.raise_if_interrupted()
        try:
            return await self._local_try(method, argument, summary=summary)
        except _NoLocalAnswer:
            return await self.setup(method, argument, summary=summary)

    async def write_store(
        self, method: Method[Argument, Result], argument: Argument, *, summary: str, is_recorded: bool = True
    ) -> Result:
        """A keyed write to our own store: a short local try, then a visible one without end.

        A write of a decision that is not `is_recorded` in the history yet is visible at once. After a local write its
        workflow task may be lost; repeated with what arrived since, it may decide otherwise (pitfall 34).
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
        """A read of our own store: a short local try, then a visible one. Raises FailureError without an answer."""
        try:
            return await self._local_try(method, argument, summary=summary)
        except _NoLocalAnswer:
            return await self.visible(method, argument, summary=summary, within=within)

    def local(self, method: Method[Argument, Result], argument: Argument, *, summary: str) -> ActivityHandle[Result]:
        """A short read of our own store that the flow does not wait for, tried once."""
        return workflow.start_local_activity_method(
            method,
            argument,
            schedule_to_close_timeout=LOCAL_TIMEOUT,
            retry_policy=RetryPolicy(maximum_attempts=1),
            summary=summary,
        )

    async def _local_try(self, method: Method[Argument, Result], argument: Argument, *, summary: str) -> Result:
        """For reads and keyed writes only: history does not show it before its result is recorded (pitfall 21).

        Raises _NoLocalAnswer, or ApplicationError where another try cannot help (pitfall 32).
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
        """Schedule the call as an activity, which operators see while it is retried."""
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
    """The code of a party that does not answer."""
    return FailureCode.CREDITS_UNAVAILABLE if method in _CREDITS_CALLS else FailureCode.COMFYUI_UNAVAILABLE


_CREDITS_CALLS: Final = frozenset(call for call in vars(CreditsActivities).values() if callable(call))
