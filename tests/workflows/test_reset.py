"""Tasks that are reset, to any workflow task of any run (contract §4, earlier lives).

The ledger shows at most one charge, the row tells what the ledger shows, nothing is handed out unpaid, nothing keeps
running: `books.ended` looks at all of it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio

from contracts.tasks import TaskStatus
from tests.workflows.books import Ending, ended
from tests.workflows.payers import Payer, new_payer
from tests.workflows.platform import Handle, Platform
from tests.workflows.reset_scenarios import ENDED, OPEN, POLICY, Scenario, work_goes_on
from tests.workflows.resets import Point, points_of, reset

SIDE_BY_SIDE = 6


@pytest_asyncio.fixture
async def platform(quick_platform: Platform) -> Platform:
    """`quick_platform`, that waits for nothing long and has GPUs for all."""
    quick_platform.policy |= POLICY
    for gpu_type in ("rtx4090", "a100"):
        await quick_platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
    return quick_platform


async def payer_of(platform: Platform, ledger: str) -> Payer:
    payer = await new_payer(platform)
    if ledger == "plain":
        await platform.simulators.admin.credits.fault("plain_ledger", tenant_id=payer.tenant_id)
    return payer


async def begun(platform: Platform, scenario: Scenario, ledger: str) -> Handle:
    before: dict[str, Any] = dict(platform.policy)
    platform.policy |= dict(scenario.policy)
    try:
        return await scenario.begin(platform, await payer_of(platform, ledger))
    finally:
        platform.policy = before


async def reset_and_ended(platform: Platform, handle: Handle, point: Point) -> Ending:
    run = await reset(platform, handle, point)
    async with work_goes_on(platform, run):
        return await ended(platform, run)


LEDGERS = pytest.mark.parametrize("ledger", ["whole", "plain"])


@pytest.mark.slow
@LEDGERS
@pytest.mark.parametrize("scenario", ENDED, ids=str)
async def test_a_task_that_had_ended_ends_as_it_had_wherever_it_is_reset_to(
    platform: Platform, scenario: Scenario, ledger: str
) -> None:
    handle = await begun(platform, scenario, ledger)
    row = await platform.store.task(handle.id.removeprefix("task-"))
    assert row is not None and row.ended_at is not None
    for point in await points_of(platform, handle):
        again = await reset_and_ended(platform, handle, point)
        assert again.status is row.status, point
        assert await platform.store.task(row.task_id) == row, point


@pytest.mark.slow
@LEDGERS
@pytest.mark.parametrize("scenario", OPEN, ids=str)
async def test_a_task_that_waits_is_completed_and_charged_once_wherever_it_is_reset_to(
    platform: Platform, scenario: Scenario, ledger: str
) -> None:
    first = await begun(platform, scenario, ledger)
    places = len(await points_of(platform, first))
    await reset_and_ended(platform, first, (await points_of(platform, first))[-1])
    turns = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(place: int) -> None:
        async with turns:
            handle = await begun(platform, scenario, ledger)
            points = await points_of(platform, handle)
            point = points[min(place, len(points) - 1)]
            ending = await reset_and_ended(platform, handle, point)
            assert ending.status is TaskStatus.COMPLETED, (point, ending)
            assert ending.charged > 0, (point, ending)

    await asyncio.gather(*(one(place) for place in range(places)))
