"""Activities of one run: attempts, retries, time limits, cancellation, as Temporal's server and worker do them.

An attempt that its caller no longer waits for may still act later, because its request was sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import RetryState, TimeoutType
from temporalio.api.failure.v1 import (
    ActivityFailureInfo,
    ApplicationFailureInfo,
    CanceledFailureInfo,
    Failure,
    TimeoutFailureInfo,
)

from comfyui_temporal.contracts.errors import Answer, FailureCode
from proof.simulation.fault_schedule import Attempt, BadAnswer, FaultSchedule
from proof.simulation.hosted_run import payload_of
from proof.simulation.parties import CallRefused, Parties
from proof.simulation.sdk import ScheduleActivity, ScheduleLocalActivity, activity_result
from proof.simulation.store_model import Caller
from proof.simulation.timeline import Scheduled, Timeline
from proof.simulation.trace import Trace

HEARTBEAT_SECONDS: Final = 2.0
HEARS_OF_CANCEL_AFTER: Final = 0.6
UNLIMITED: Final = float("inf")
Resolution = activity_result.ActivityResolution


@dataclass(eq=False)
class Call:
    """One activity that was scheduled."""

    seq: int
    name: str
    argument: Any
    is_local: bool
    expires_at: float
    first_backoff: float
    backoff_factor: float
    longest_backoff: float
    attempts_at_most: int
    not_retried: frozenset[str]
    attempt: int = 0
    running: object | None = None
    """The attempt that is waited for; an attempt that is not this one has been given up."""
    cancel_asked_at: float | None = None
    is_over: bool = False
    last_failure: Failure | None = None
    next_try: Scheduled | None = None
    outcome: Any = None
    """The service's answer, once the caller has it; None: the call failed."""
    scheduled_at: float = 0.0
    resolved_at: float | None = None
    """When the run received its outcome."""

    @classmethod
    def of(cls, command: ScheduleActivity | ScheduleLocalActivity, argument: Any, now: float) -> Call:
        within = command.schedule_to_close_timeout.ToTimedelta().total_seconds()
        policy = command.retry_policy
        return cls(
            seq=command.seq,
            name=command.activity_type,
            argument=argument,
            is_local=isinstance(command, ScheduleLocalActivity),
            expires_at=now + within if within else UNLIMITED,
            first_backoff=policy.initial_interval.ToTimedelta().total_seconds(),
            backoff_factor=policy.backoff_coefficient,
            longest_backoff=policy.maximum_interval.ToTimedelta().total_seconds() or UNLIMITED,
            attempts_at_most=policy.maximum_attempts,
            not_retried=frozenset(policy.non_retryable_error_types),
        )

    @property
    def backoff(self) -> float:
        return float(min(self.first_backoff * self.backoff_factor ** (self.attempt - 1), self.longest_backoff))


class Calls:
    """The calls of one run that are not over. `resolved` is called with each outcome."""

    def __init__(
        self,
        timeline: Timeline,
        faults: FaultSchedule,
        rng: random.Random,
        parties: Parties,
        trace: Trace,
        resolved: Callable[[Call, Resolution], None],
        run_id: str,
    ) -> None:
        self._run_id = run_id
        self._timeline = timeline
        self._faults = faults
        self._rng = rng
        self._parties = parties
        self._trace = trace
        self._resolved = resolved
        self._open: dict[int, Call] = {}
        self.worker_up_at = 0.0

    def schedule(self, command: ScheduleActivity | ScheduleLocalActivity, payloads: Sequence[Payload]) -> Call:
        call = Call.of(command, self._parties.argument_of(command.activity_type, payloads), self._timeline.now)
        call.scheduled_at = self._timeline.now
        self._open[call.seq] = call
        if call.expires_at != UNLIMITED:
            self._timeline.at(call.expires_at, lambda: self._expire(call))
        self._begin(call)
        return call

    def names(self) -> set[str]:
        """The names of the calls that are not over."""
        return {call.name for call in self._open.values()}

    def request_cancel(self, seq: int) -> None:
        """The run cancels it: an attempt that was sent ends by itself; one that was not is never sent."""
        call = self._open.get(seq)
        if call is None:
            return
        call.cancel_asked_at = self._timeline.now
        if call.running is None:
            self._finish(call, cancelled(call))

    def worker_killed(self, up_again_at: float) -> None:
        """Attempts in flight are lost to the server, which notices by their heartbeats; local ones are forgotten."""
        self.worker_up_at = up_again_at
        for call in list(self._open.values()):
            if call.is_local:
                self.forget(call)
            elif call.running is not None:
                call.running = lost = object()
                self._timeline.after(HEARTBEAT_SECONDS, partial(self._heartbeat_missed, call, lost))

    def _heartbeat_missed(self, call: Call, attempt: object) -> None:
        self._failed(call, attempt, _timed_out(TimeoutType.TIMEOUT_TYPE_HEARTBEAT), timed_out=True)

    def forget(self, call: Call) -> None:
        """Stop waiting for it, without an outcome."""
        call.is_over = True
        self._open.pop(call.seq, None)
        if call.next_try is not None:
            call.next_try.cancel()

    def forget_all(self) -> None:
        """The run is closed."""
        for call in list(self._open.values()):
            self.forget(call)

    # Attempts

    def _begin(self, call: Call) -> None:
        call.next_try = None
        if call.is_over:
            return
        if self._timeline.now < self.worker_up_at:
            call.next_try = self._timeline.at(self.worker_up_at, lambda: self._begin(call))
            return
        call.attempt += 1
        call.running = token = object()
        attempt = self._faults.attempt(self._parties.party_of(call.name), call.name)
        self._trace("  call %s #%d attempt %d: %s", call.name, call.seq, call.attempt, attempt)
        if attempt.acts_after is not None:
            self._timeline.after(attempt.acts_after, partial(self._act, call, token, attempt, self._timeline.now))
            if not attempt.is_lost:
                return
        self._timeline.after(attempt.answered_after, lambda: self._unanswered(call, token, attempt))

    def _act(self, call: Call, token: object, attempt: Attempt, began_at: float) -> None:
        outcome: Any
        try:
            caller = Caller(self._run_id, began_at, call.scheduled_at)
            outcome = self._parties.perform(call.name, call.argument, caller)
        except CallRefused as refusal:
            outcome = refusal
        self._trace("  %s #%d acts: %s", call.name, call.seq, outcome)
        if not attempt.is_lost:
            assert attempt.acts_after is not None
            self._timeline.after(
                attempt.answered_after - attempt.acts_after, lambda: self._answered(call, token, attempt, outcome)
            )

    def _answered(self, call: Call, token: object, attempt: Attempt, outcome: Any) -> None:
        if call.is_over or call.running is not token:
            return
        if isinstance(outcome, CallRefused):
            self._failed(call, token, _application(outcome.code, str(outcome), non_retryable=outcome.is_final))
        elif attempt.bad_answer is not None:
            self._unanswered(call, token, attempt)
        else:
            if isinstance(outcome, Answer):
                outcome = outcome.model_copy(update={"tries": call.attempt})
            result = activity_result.Success(result=payload_of(outcome))
            call.outcome = outcome
            self._finish(call, Resolution(completed=result))

    def _unanswered(self, call: Call, token: object, attempt: Attempt) -> None:
        unreadable = attempt.bad_answer is BadAnswer.UNREADABLE
        code = FailureCode.REPLY_INVALID if unreadable else self._parties.unavailable(call.name)
        self._failed(call, token, _application(code, f"{call.name} got no usable answer"))

    def _failed(self, call: Call, token: object, failure: Failure, *, timed_out: bool = False) -> None:
        if call.is_over or call.running is not token:
            return
        call.running, call.last_failure = None, failure
        info = failure.application_failure_info
        if call.cancel_asked_at is not None:
            received = self._timeline.now - call.cancel_asked_at > HEARS_OF_CANCEL_AFTER or self._rng.random() < 0.5
            self._finish(call, cancelled(call) if received and not timed_out else _failed(call, failure))
        elif info.non_retryable or info.type in call.not_retried:
            self._finish(call, _failed(call, failure, RetryState.RETRY_STATE_NON_RETRYABLE_FAILURE))
        elif call.attempts_at_most and call.attempt >= call.attempts_at_most:
            self._finish(call, _failed(call, failure, RetryState.RETRY_STATE_MAXIMUM_ATTEMPTS_REACHED))
        elif self._timeline.now + call.backoff >= call.expires_at:
            self._finish(call, _failed(call, failure, RetryState.RETRY_STATE_TIMEOUT))
        else:
            call.next_try = self._timeline.after(call.backoff, lambda: self._begin(call))

    def _expire(self, call: Call) -> None:
        if not call.is_over:
            failure = _timed_out(TimeoutType.TIMEOUT_TYPE_SCHEDULE_TO_CLOSE, call.last_failure)
            self._finish(call, _failed(call, failure, RetryState.RETRY_STATE_TIMEOUT))

    def _finish(self, call: Call, resolution: Resolution) -> None:
        self.forget(call)
        self._trace("  %s #%d ends: %s", call.name, call.seq, resolution.WhichOneof("status"))
        self._resolved(call, resolution)


def _application(code: str, message: str, *, non_retryable: bool = False) -> Failure:
    return Failure(
        message=message, application_failure_info=ApplicationFailureInfo(type=str(code), non_retryable=non_retryable)
    )


def _timed_out(kind: TimeoutType.ValueType, cause: Failure | None = None) -> Failure:
    return Failure(
        message="activity timed out", timeout_failure_info=TimeoutFailureInfo(timeout_type=kind), cause=cause
    )


def _failed(
    call: Call, failure: Failure, state: RetryState.ValueType = RetryState.RETRY_STATE_CANCEL_REQUESTED
) -> Resolution:
    # A local activity's own failure arrives unwrapped; only its time limit is wrapped (pitfall 32).
    is_bare = call.is_local and failure.HasField("application_failure_info")
    wrapped = failure if is_bare else _of_activity(call, failure, state)
    return Resolution(failed=activity_result.Failure(failure=wrapped))


def cancelled(call: Call) -> Resolution:
    cause = Failure(message="cancelled", canceled_failure_info=CanceledFailureInfo())
    failure = _of_activity(call, cause, RetryState.RETRY_STATE_CANCEL_REQUESTED)
    return Resolution(cancelled=activity_result.Cancellation(failure=failure))


def _of_activity(call: Call, cause: Failure, state: RetryState.ValueType) -> Failure:
    info = ActivityFailureInfo(activity_id=str(call.seq), retry_state=state)
    info.activity_type.name = call.name
    return Failure(message="activity error", activity_failure_info=info, cause=cause)
