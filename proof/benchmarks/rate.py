"""Sends at an even rate, and waits for what was sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

SETTLING_SECONDS: Final = 15.0
"""Longest wait for the last ones."""
Sent = Callable[[int, int], Coroutine[Any, Any, None]]
"""Sends message number n to target number m."""


async def at_a_rate(send: Sent, *, targets: int, per_second: float, seconds: float) -> None:
    """Sends evenly, to one target after the other, without waiting for the one before."""
    sending = []
    began = time.monotonic()
    for number in range(int(seconds * per_second)):
        if (ahead := number / per_second - (time.monotonic() - began)) > 0:
            await asyncio.sleep(ahead)
        sending.append(asyncio.create_task(send(number, number % targets)))
    await asyncio.gather(*sending)


async def settled(is_over: Callable[[], bool]) -> None:
    """Returns when it is over, or after 15 s at the latest."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SETTLING_SECONDS):
            while not is_over():  # noqa: ASYNC110 - no event reports it
                await asyncio.sleep(0.05)
