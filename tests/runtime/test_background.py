"""Background work ends when it is stopped, and its failure is never silent."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from runtime.background import running_in_background, woken


@pytest.mark.parametrize("steps_between", range(5))
async def test_a_wait_that_is_cancelled_as_it_is_woken_is_cancelled(steps_between: int) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(woken(event, within_seconds=60))
    await asyncio.sleep(0.01)
    event.set()
    for _ in range(steps_between):
        await asyncio.sleep(0)
    if waiting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_wait_ends_by_its_limit() -> None:
    async with asyncio.timeout(5):
        await woken(asyncio.Event(), within_seconds=0.01)


async def test_work_that_breaks_is_logged_and_the_rest_goes_on() -> None:
    went_on = asyncio.Event()

    async def breaks() -> None:
        raise ZeroDivisionError

    async def goes_on() -> None:
        await asyncio.sleep(0.01)
        went_on.set()

    with capture_logs() as logs:
        async with running_in_background(breaks(), goes_on()):
            await asyncio.wait_for(went_on.wait(), 5)
    # Other tests' work may still be under way, and log too.
    assert [line["event"] for line in logs].count("background work ended") == 1
