"""Waiting for a condition, with a deadline. `what` names it in the AssertionError."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.02


def eventually(look: Callable[[], T], *, within_seconds: float = 10.0) -> T:
    """The first true answer of `look`. Blocks the event loop."""
    deadline = time.monotonic() + within_seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {look}"
        time.sleep(LOOK_SECONDS)
    return found


async def until(look: Callable[[], Awaitable[T | None]], what: str = "", *, within_seconds: float = 10.0) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + within_seconds
    while not (found := await look()):
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {what or look}"
        await asyncio.sleep(LOOK_SECONDS)
    return found


async def comes_true(look: Callable[[], bool], what: str = "", *, within_seconds: float = 10.0) -> None:
    """As `until`, for a condition that is not awaited."""

    async def looked() -> bool:
        return look()

    await until(looked, what or str(look), within_seconds=within_seconds)
