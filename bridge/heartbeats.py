"""Heartbeats of an activity on a server, and what becomes of its work when it is cancelled.

cancelled by the workflow         the work is stopped, then `on_cancel`
the worker's grace period ends    the same; the failure is `handed_back`
a heartbeat is lost               the work is stopped here and goes on at the server: the next attempt finds it
Temporal no longer knows it       the same, then `on_unknown`: its workflow may be closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from temporalio import activity
from temporalio.exceptions import ApplicationError

from bridge.calls import RunFailureType

HEARTBEAT_SECONDS: Final = 1.0

T = TypeVar("T")
Act = Callable[[], Coroutine[Any, Any, None]]


async def with_heartbeats(
    work: Coroutine[Any, Any, T],
    details: Callable[[], tuple[Any, ...]],
    *,
    on_cancel: Act | None = None,
    on_unknown: Act | None = None,
    left: Callable[[], Sequence[Any]] = tuple,
) -> T:
    """Run `work` with heartbeats. `left`: the details of the failure with which a stopped worker hands it back."""
    running = asyncio.ensure_future(work)
    try:
        while not running.done():
            activity.heartbeat(*details())
            await asyncio.wait({running}, timeout=HEARTBEAT_SECONDS)
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.wait({running})
        reason = activity.cancellation_details()
        is_shutdown = reason is not None and reason.worker_shutdown
        is_requested = reason is None or reason.cancel_requested
        if on_cancel is not None and (is_requested or is_shutdown):
            await _heartbeating(on_cancel(), details)
        elif on_unknown is not None and reason is not None and reason.not_found:
            await _heartbeating(on_unknown(), details)
        if is_shutdown and not is_requested:
            raise ApplicationError(
                "The worker was stopped before the run ended.",
                *left(),
                type=RunFailureType.HANDED_BACK.value,
                non_retryable=on_cancel is not None,
            ) from None
        raise
    finally:
        if not running.done():
            running.cancel()
    return running.result()


async def _heartbeating(work: Coroutine[Any, Any, None], details: Callable[[], tuple[Any, ...]]) -> None:
    running = asyncio.ensure_future(work)
    while not running.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({running}, timeout=HEARTBEAT_SECONDS)
        activity.heartbeat(*details())
    running.result()
