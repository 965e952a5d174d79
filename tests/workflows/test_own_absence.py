"""Workers of ours that are away: their absence is no outage of a service (contract §4 *How long calls are retried*)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import TaskStatus
from store import TaskStore
from tests.workflows.books import ended
from tests.workflows.payers import kinds_of, new_payer, until_price_shown
from tests.workflows.platform import Handle, Platform, running_platform, sent, task_id_of
from workflows import ledger_search

OPENING_CALL = 5.0
"""Seconds for which a call that begins something is retried: 15 minutes, by policy."""


@pytest_asyncio.fixture
async def platform(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform without a worker, on the wall clock: no server skips time while a call is not taken."""
    async with running_platform(temporal_env, task_store, tmp_path) as platform:
        platform.policy |= {"opening_call_minutes": OPENING_CALL / 60}
        yield platform


async def until_scheduled(platform: Platform, handle: Handle, activity: str, number: int) -> None:
    """Wait until this call was scheduled so often: no worker took it for its whole time before."""

    async def is_scheduled() -> bool:
        return len(await sent(handle, activity)) >= number

    await platform.until(is_scheduled)


async def test_a_submit_that_no_worker_takes_is_sent_once_they_are_back(platform: Platform) -> None:
    async with platform.worker(no_remote_activities=True):
        handle = await platform.start_image()
        await until_scheduled(platform, handle, "submit_job", 3)
    async with platform.worker():
        ending = await ended(platform, handle)
    assert (ending.status, ending.exceptions) == (TaskStatus.COMPLETED, [])
    posts = await sent(handle, "submit_job")
    assert all((post["key"], post["body"]) == (posts[0]["key"], posts[0]["body"]) for post in posts)
    assert len(await platform.simulators.admin.comfyui.requests_seen("submit_job", task_id_of(handle))) == 1


async def test_a_hold_that_no_worker_requests_is_taken_once_they_are_back(platform: Platform) -> None:
    async with platform.worker():
        handle = await platform.start_training(max_credits=None)
        await until_price_shown(platform, handle, 120)
    async with platform.worker(no_remote_activities=True):
        await handle.execute_update("confirm_price", {"max_credits": 120})
        await until_scheduled(platform, handle, "pre_deduct", 3)
    async with platform.worker():
        ending = await ended(platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])
    posts = await sent(handle, "pre_deduct")
    assert all((post["key"], post["body"]) == (posts[0]["key"], posts[0]["body"]) for post in posts)
    assert await kinds_of(platform, handle) == ["pre_deduct", "commit"]


async def test_a_hold_that_no_worker_requested_at_first_counts_as_requested_once(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service keeps no keys and its ledger is late: a second hold would be looked for, and recorded as unknown."""
    monkeypatch.setattr(ledger_search, "DOUBLED_FOR", timedelta(seconds=1))
    payer = await new_payer(platform)
    await payer.has_plain_service()
    await platform.simulators.admin.credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=1_000_000)
    async with platform.worker():
        handle = await platform.start(payer.training(max_credits=None))
        await until_price_shown(platform, handle, 120)
    async with platform.worker(no_remote_activities=True):
        await handle.execute_update("confirm_price", {"max_credits": 120})
        await until_scheduled(platform, handle, "pre_deduct", 2)
    async with platform.worker():
        ending = await ended(platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])


async def test_no_task_waits_for_workers_beyond_its_time(platform: Platform) -> None:
    platform.policy |= {"cap_minutes": 1.5 * OPENING_CALL / 60}
    async with platform.worker(no_remote_activities=True):
        handle = await platform.start_image()
        await until_scheduled(platform, handle, "submit_job", 3)  # the last one is the undo's
    async with platform.worker():
        assert (await ended(platform, handle)).code == "timeout"


async def test_a_start_that_no_worker_takes_is_not_sent_once_the_window_has_closed(platform: Platform) -> None:
    """They are lost while they hold the credits, in time."""
    closes = datetime.now(UTC) + timedelta(seconds=6)
    task = platform.training(window={"not_after": closes.isoformat()})
    credits = platform.simulators.admin.credits
    slow = await credits.fault("delay", route="pre_deduct", task_id=task["task_id"], seconds=1)
    async with platform.worker():
        handle = await platform.start(task)
        await platform.until_hit("pre_deduct", slow)

    async def is_given_up_or_repeated() -> bool:
        return bool(len(await sent(handle, "start_training")) > 1 or await sent(handle, "cancel_hold"))

    async with platform.worker(no_remote_activities=True):
        await platform.until(is_given_up_or_repeated)
    async with platform.worker():
        ending = await ended(platform, handle)
    assert (ending.code, ending.charged) == ("gpu_unavailable", 0)
    assert await platform.simulators.admin.comfyui.requests_seen("start_training", task_id_of(handle)) == []
    assert await kinds_of(platform, handle) == ["pre_deduct", "cancel"]


async def test_a_service_that_does_not_answer_is_unavailable(platform: Platform) -> None:
    """Also where no worker is left to take the last repeat."""
    task = platform.image()
    fault = await platform.service_of("submit_job").fault(
        "error", route="submit_job", task_id=task["task_id"], status=503
    )
    async with platform.worker():
        handle = await platform.start(task)
        await platform.until_hit("submit_job", fault)
    async with platform.worker(no_remote_activities=True):
        await until_scheduled(platform, handle, "submit_job", 2)
    async with platform.worker():
        assert (await ended(platform, handle)).code == "comfyui_unavailable"
