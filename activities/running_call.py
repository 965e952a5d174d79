"""How an activity runs one outside call: with heartbeats, without interruption, with one log line, as one failure.

A request that was sent takes effect whether or not we wait for its answer (pitfall 13). So a cancelled activity waits
until the request in flight has ended by its own limit:

    it succeeded                                   → its answer, so that the workflow knows what happened
    it failed, the workflow requested the cancel   → cancelled
    it failed, for another reason (shutdown)       → the failure, which is retried on another worker
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities import metrics
from activities.outside_http import REQUEST_SECONDS, OutsideFailure, only_if_answering, time_limit
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.errors import Answer

HEARTBEAT_SECONDS: Final = 0.5
MARGIN_SECONDS: Final = 0.5
"""A request must end this long before Temporal's limit, so that its end can still be reported."""
SHORTEST_LIMIT_SECONDS: Final = 0.5

T = TypeVar("T")
log = structlog.get_logger(__name__)


async def answered(call_for: CallFor, call: Coroutine[Any, Any, T]) -> T:
    """Run an outside call to its own end and return its answer.

    Raises ApplicationError (type: a `FailureCode`; retryable unless the request could not be sent) or CancelledError.
    """
    with one_line(call_for) as line:
        info = activity.info()
        with time_limit(request_limit_seconds(info)), only_if_answering() if info.is_local else nullcontext():
            answer = await uninterrupted(call)
        line.outcome = _outcome_of(answer)
        if isinstance(answer, Answer) and info.attempt > 1:
            answer.tries = info.attempt
        return answer


@dataclass
class LogLine:
    """The outcome in a call's log line. An exception names itself."""

    outcome: str = "ok"


@contextmanager
def one_line(call_for: CallFor) -> Iterator[LogLine]:
    """Log one line about the enclosed call: its task, its outcome, milliseconds; never a body.

    An OutsideFailure is raised again as the ApplicationError that Temporal stores.
    """
    info = activity.info()
    bound = {"task_id": call_for.task_id, "tenant_id": call_for.tenant_id, "workflow_id": info.workflow_id}
    line, began, has_failed = LogLine(), time.monotonic(), False
    with structlog.contextvars.bound_contextvars(**bound):
        try:
            yield line
        except OutsideFailure as failure:
            line.outcome, has_failed = failure.code.value, True
            raise as_application_error(failure) from None
        except asyncio.CancelledError:
            line.outcome = "cancelled"
            raise
        except BaseException as error:
            line.outcome, has_failed = type(error).__name__, True
            raise
        finally:
            say = log.warning if has_failed else log.info
            say(
                "outside_call",
                call=info.activity_type,
                outcome=line.outcome,
                attempt=info.attempt,
                milliseconds=round((time.monotonic() - began) * 1000),
            )
            metrics.count_call(metrics.party_of(info.activity_type), line.outcome)


async def uninterrupted(call: Coroutine[Any, Any, T], details: Callable[[], tuple[Any, ...]] = tuple) -> T:
    """Await `call` in its own task and heartbeat `details()` every half second. A cancelled activity still waits."""
    request = asyncio.ensure_future(call)
    cancellation = await wait_with_heartbeats(request, details)
    failure = request.exception()
    if failure is None:
        return request.result()
    if cancellation is not None and cancelled_by_workflow():
        raise cancellation
    raise failure


async def wait_with_heartbeats(
    running: asyncio.Future[Any],
    details: Callable[[], tuple[Any, ...]] = tuple,
    *,
    on_cancel: Callable[[], object] = lambda: None,
) -> asyncio.CancelledError | None:
    """Wait until `running` has ended; return a cancellation that arrived meanwhile, or None.

    A cancellation ends nothing by itself: `on_cancel` is called, and waiting continues.
    """
    cancellation: asyncio.CancelledError | None = None
    is_local = activity.info().is_local
    while not running.done():
        try:
            await asyncio.wait({running}, timeout=HEARTBEAT_SECONDS)
        except asyncio.CancelledError as error:
            cancellation = error
            on_cancel()
        progress = details()
        # The server stores each heartbeat. After the work is done, only details for a next attempt are worth one.
        if not is_local and (progress or not running.done()):
            activity.heartbeat(*progress)
    return cancellation


def cancelled_by_workflow() -> bool:
    """Whether the workflow cancelled the activity, not a worker's shutdown, a pause or a time-out."""
    details = activity.cancellation_details()
    return details is None or details.cancel_requested


def as_application_error(failure: OutsideFailure) -> ApplicationError:
    """The failure as Temporal stores it: its type is the stable code, its message the sentence.

    A local try ignores the requested retry delay. The visible activity waits that long, where operators see it.
    """
    delay = None if activity.info().is_local else failure.retry_after_seconds
    return ApplicationError(
        failure.sentence,
        type=failure.code.value,
        non_retryable=not failure.may_be_retried,
        next_retry_delay=timedelta(seconds=delay) if delay else None,
    )


def request_limit_seconds(info: activity.Info) -> float:
    """How long a request may take, so that it ends before the activity's time limit.

    A local activity has only `schedule_to_close` (pitfall 33). It runs on our clock, so the remaining time is known.
    """
    left = REQUEST_SECONDS
    if info.start_to_close_timeout is not None:
        left = min(left, info.start_to_close_timeout.total_seconds() - MARGIN_SECONDS)
    if info.is_local and info.schedule_to_close_timeout is not None:
        gone = (datetime.now(UTC) - info.scheduled_time).total_seconds()
        left = min(left, info.schedule_to_close_timeout.total_seconds() - gone - MARGIN_SECONDS)
    return max(left, SHORTEST_LIMIT_SECONDS)


def _outcome_of(answer: Any) -> str:
    if not isinstance(answer, Answer):
        return "ok"
    if answer.refusal is not None:
        return f"refused:{answer.refusal.message}"
    return "not_offered" if answer.not_offered else "reply"
