"""Background work of a process. A failure of it is logged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def running_in_background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run each until the block ends. One that ends by itself is a defect and is logged with its trace."""
    tasks = [asyncio.create_task(_watched(one)) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def woken(event: asyncio.Event, *, within_seconds: float) -> None:
    """Wait until the event is set, or that long.

    Not by `asyncio.wait_for`: on Python 3.11 it swallows a cancellation that comes in the same step as the event, and
    a loop that is woken often would never end.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_seconds):
            await event.wait()


async def _watched(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("background work ended")
        raise
