"""One timer for every wait: it is kept as long as possible, and none is started without need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.testing import WorkflowEnvironment

from tests.workflows.probe import probed
from workflows.alarm import Alarm

SOON, LATER, LATEST = timedelta(milliseconds=500), timedelta(seconds=30), timedelta(seconds=60)


def never() -> bool:
    return False


async def test_what_has_happened_and_what_is_due_is_not_waited_for(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> None:
        alarm, now = Alarm(), workflow.now()
        await alarm.until(lambda: True, now + LATER, "happened")
        await alarm.until(never, now, "due")
        await alarm.until(never, now - SOON, "overdue")
        await alarm.until(lambda: True, None, "happened, no limit")

    assert (await probed(temporal_env, lines)).timers == {}


async def test_it_fires_at_its_time_and_not_before(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> list[bool]:
        alarm, rang = Alarm(), []
        for name in ("first", "second"):
            at = workflow.now() + SOON
            await alarm.until(never, at, name)
            rang.append(workflow.now() >= at)
        return rang

    seen = await probed(temporal_env, lines)

    assert seen.result == [True, True]
    assert seen.timers == {"first": "rang", "second": "rang"}


async def test_a_running_timer_is_kept_for_a_later_time_and_replaced_for_an_earlier_one(
    temporal_env: WorkflowEnvironment,
) -> None:
    async def lines() -> None:
        alarm, now = Alarm(), workflow.now()
        await waited_without_alarm(lambda happened: alarm.until(happened, now + LATER, "first"))
        await waited_without_alarm(lambda happened: alarm.until(happened, now + LATEST, "later: the first is kept"))
        await waited_without_alarm(lambda happened: alarm.until(happened, now + LATER, "the same: the first is kept"))
        await alarm.until(never, workflow.now() + SOON, "earlier")

    assert (await probed(temporal_env, lines)).timers == {"first": "cancelled", "earlier": "rang"}


async def test_without_a_limit_no_timer_is_started_and_a_running_one_still_fires(
    temporal_env: WorkflowEnvironment,
) -> None:
    async def lines() -> None:
        alarm = Alarm()
        await waited_without_alarm(lambda happened: alarm.until(happened, None, "no limit"))
        await waited_without_alarm(lambda happened: alarm.until(happened, workflow.now() + SOON, "soon"))
        await alarm.until(never, None, "no limit: the running one rings")

    assert (await probed(temporal_env, lines)).timers == {"soon": "rang"}


async def test_a_cleared_alarm_cancels_its_timer(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> None:
        alarm = Alarm()
        alarm.clear()
        await waited_without_alarm(lambda happened: alarm.until(happened, workflow.now() + LATER, "under one name"))
        alarm.clear()
        await waited_without_alarm(lambda happened: alarm.until(happened, workflow.now() + LATEST, "under another"))

    assert (await probed(temporal_env, lines)).timers == {"under one name": "cancelled", "under another": "stood"}


async def waited_without_alarm(wait: Callable[[Callable[[], bool]], Awaitable[Any]]) -> None:
    """Wait until what is waited for has happened, in a later workflow task and before any alarm."""
    happened: list[str] = []

    async def happen() -> None:
        await asyncio.sleep(0.001)
        happened.append("it happened")

    await asyncio.gather(wait(lambda: bool(happened)), happen())
