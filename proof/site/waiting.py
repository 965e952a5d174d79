"""Waiting for a condition while parts of the stack are away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import asyncpg
import httpx
from temporalio.service import RPCError

from proof.simulators.admin_client import AdminRefused
from store import StoreFailure

T = TypeVar("T")
OUTSIDE_ERRORS: Final = (
    httpx.HTTPError,
    OSError,
    TimeoutError,
    RPCError,
    AdminRefused,
    StoreFailure,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # asyncpg raises it where the server closes the connection in the middle of a message.
    asyncpg.InternalClientError,
)
LOOK_SECONDS: Final = 0.1
RETRY_SECONDS: Final = 0.5
LIMIT_SECONDS: Final = 120.0
"""No fault keeps a part of the stack away for longer."""


class NotRepaired(Exception):
    """The stack did not come back in order; the text says what was waited for."""


async def insist(act: Callable[[], Awaitable[T]], what: str, *, seconds: float = LIMIT_SECONDS) -> T:
    """Repeat until it succeeds. Raises NotRepaired."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await act()
        except OUTSIDE_ERRORS as error:
            if time.monotonic() > deadline:
                raise NotRepaired(f"{what}: {type(error).__name__} for {seconds:g} s: {error}") from error
        await asyncio.sleep(RETRY_SECONDS)


async def until(
    condition: Callable[[], Awaitable[T]], what: str, *, seconds: float, look_seconds: float = LOOK_SECONDS
) -> T:
    """The condition's first true value; an error counts as not yet. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    failure: Exception | None = None
    while time.monotonic() < deadline:
        try:
            value = await condition()
        except OUTSIDE_ERRORS as error:
            failure = error
        else:
            if value:
                return value
        await asyncio.sleep(look_seconds)
    seen = f" ({type(failure).__name__}: {failure})" if failure else ""
    raise TimeoutError(f"{what}: not within {seconds:g} s{seen}")
