"""Waiting for something to come true, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(look: Callable[[], T], *, within_seconds: float = 10.0) -> T:
    """The first true answer of `look`. AssertionError where there is none in time."""
    deadline = time.monotonic() + within_seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {look}"
        time.sleep(0.05)


async def comes_true(look: Callable[[], bool], *, within_seconds: float = 10.0) -> None:
    """The same without holding up the event loop."""
    deadline = time.monotonic() + within_seconds
    while True:
        if look():
            return
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {look}"
        await asyncio.sleep(0.02)
