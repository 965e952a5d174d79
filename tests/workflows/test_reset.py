"""Tasks that are reset, to any workflow task of any run (contract §4, earlier lives).

The ledger shows at most one charge, the row says what the ledger shows, no result is delivered unpaid, nothing keeps
running: `books.ended` looks at all of it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import Ending, ended
from tests.workflows.payers import new_payer, row_of
from tests.workflows.platform import Handle, Platform
from tests.workflows.reset_scenarios import ENDED, OPEN, POLICY, Scenario, work_goes_on
from tests.workflows.resets import Point, points_of, reset

SIDE_BY_SIDE = 6
SAMPLE = {
    "image completed",
    "image given back",
    "image terminated",
    "training topped up",
    "training topped up and running",
}


@pytest_asyncio.fixture
async def platform(quick_platform: Platform) -> Platform:
    """`quick_platform`, that waits for nothing long and has GPUs for all."""
    quick_platform.policy |= POLICY
    for gpu_type in ("rtx4090", "a100"):
        await quick_platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
    return quick_platform


async def begun(platform: Platform, scenario: Scenario) -> Handle:
    before: dict[str, Any] = dict(platform.policy)
    platform.policy |= dict(scenario.policy)
    try:
        return await scenario.begin(platform, await new_payer(platform))
    finally:
        platform.policy = before


async def reset_and_ended(platform: Platform, handle: Handle, point: Point) -> Ending:
    run = await reset(platform, handle, point)
    async with work_goes_on(platform, run):
        return await ended(platform, run)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ENDED, ids=str)
async def test_an_ended_task_ends_the_same_way_from_every_reset_point(platform: Platform, scenario: Scenario) -> None:
    await ends_as_it_had(platform, scenario, every=1)


@pytest.mark.parametrize("scenario", [scenario for scenario in ENDED if scenario.name in SAMPLE], ids=str)
async def test_a_task_that_had_ended_ends_as_it_had(platform: Platform, scenario: Scenario) -> None:
    """At some points; at every one in the slow suite."""
    await ends_as_it_had(platform, scenario, every=5)


async def ends_as_it_had(platform: Platform, scenario: Scenario, *, every: int) -> None:
    """Each reset is of a run that may have been reset before."""
    handle = await begun(platform, scenario)
    row = await row_of(platform, handle)
    assert row.ended_at is not None
    for point in (await points_of(platform, handle))[::every]:
        again = await reset_and_ended(platform, handle, point)
        assert again.status is row.status, point
        assert await row_of(platform, handle) == row, point


@pytest.mark.slow
@pytest.mark.parametrize("scenario", OPEN, ids=str)
async def test_a_waiting_task_is_completed_and_charged_once_from_every_reset_point(
    platform: Platform, scenario: Scenario
) -> None:
    await completed_once(platform, scenario, every=1)


@pytest.mark.parametrize("scenario", [scenario for scenario in OPEN if scenario.name in SAMPLE], ids=str)
async def test_a_task_that_waits_is_completed_and_charged_once(platform: Platform, scenario: Scenario) -> None:
    """At some points; at every one in the slow suite."""
    await completed_once(platform, scenario, every=7)


async def completed_once(platform: Platform, scenario: Scenario, *, every: int) -> None:
    first = await begun(platform, scenario)
    points = await points_of(platform, first)
    await reset_and_ended(platform, first, points[-1])
    turns = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(place: int) -> None:
        async with turns:
            handle = await begun(platform, scenario)
            points = await points_of(platform, handle)
            point = points[min(place, len(points) - 1)]
            ending = await reset_and_ended(platform, handle, point)
            assert ending.status is TaskStatus.COMPLETED, (point, ending)
            assert ending.charged > 0, (point, ending)

    await asyncio.gather(*(one(place) for place in range(0, len(points), every)))
