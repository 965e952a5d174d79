"""PostgreSQL away for ten minutes during a task: money settles in time, events follow in order (decision 3).

The clocks of task, ComfyUI and credits are moved on; PostgreSQL's absence is real.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulators.credits_profile import CreditsProfile
from store import TaskStore
from tests.cable import Cable
from tests.workflows.books import Ending, ended
from tests.workflows.payers import (
    entries_of,
    has_kinds,
    holds_of,
    kinds_of,
    new_payer,
    refuse_cancels,
    start_long_training,
    until_started,
)
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of

MINUTE = 60.0
RENEWED = ["pre_deduct", "pre_deduct", "cancel"]


@pytest_asyncio.fixture
async def platform(
    skipping_env: WorkflowEnvironment,
    postgres_dsn: str,
    cable: Cable,
    tmp_path: Path,
    credits_profile: CreditsProfile,
) -> AsyncIterator[Platform]:
    """A platform at contract speed, whose worker and gateway reach PostgreSQL by `cable`."""
    store = TaskStore(cable.dsn)
    running = running_platform(skipping_env, store, tmp_path, speed=1.0, credits_profile=credits_profile)
    async with running as platform, platform.worker():
        yield platform
    await store.close()


async def pass_minutes(platform: Platform, handle: Handle, minutes: int) -> None:
    """A minute at a time, so that each minute's effects come before the next."""
    for _ in range(minutes):
        await platform.pass_time(handle, MINUTE)
        await platform.until(lambda: is_at_rest(handle))


async def is_at_rest(handle: Handle) -> bool:
    """Whether the run only writes events: the write is repeated as long as the store is away."""
    described = (await handle.describe()).raw_description
    calls = [activity for activity in described.pending_activities if activity.activity_type.name != "write"]
    return not calls and not described.HasField("pending_workflow_task")


def assert_in_order(ending: Ending, stages: list[str | None]) -> None:
    """Every stage is published, in order, with the time when it was reached, not when it was written."""
    running = [event for event in ending.events if event.event is EventType.RUNNING]
    assert list(dict.fromkeys(event.stage for event in running)) == stages
    times = [event.ts for event in ending.events]
    assert times == sorted(times)
    assert (times[-1] - times[0]).total_seconds() > 5 * MINUTE


async def test_an_image_is_delivered_and_paid_for_while_the_store_is_away(platform: Platform, cable: Cable) -> None:
    handle = await platform.start_image()
    await until_started(platform, handle)
    await platform.until_settled(handle)
    cable.pull()
    await pass_minutes(platform, handle, 10)
    assert await kinds_of(platform, handle) == ["pre_deduct", "commit"]
    held, paid = await entries_of(platform, handle)
    assert (paid.created_at - held.created_at).total_seconds() < 9 * MINUTE, "it takes eight"
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "it ends once its end is written"
    assert (await platform.progress(handle))["status"] == "completed", "a query of the run already shows it"
    cable.plug_in()
    await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    assert_in_order(ending, ["queued", "processing", "delivery"])


async def test_a_training_is_cancelled_and_given_back_while_the_store_is_away(platform: Platform, cable: Cable) -> None:
    handle = await start_long_training(platform, platform.training())
    await platform.until_settled(handle)
    await pass_minutes(platform, handle, 20)
    cable.pull()
    await pass_minutes(platform, handle, 8)
    await handle.cancel()
    await platform.until(lambda: has_kinds(platform, handle, "pre_deduct", "cancel"))
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING
    cable.plug_in()
    with contextlib.suppress(RPCError):  # it may have ended by now
        await platform.pass_time(handle, 31)
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.CANCELLED
    assert_in_order(ending, [None])
    assert [event.credits_delta for event in ending.events if event.credits_delta] == [-120, 120]


async def test_a_renewal_waits_for_the_store_as_long_as_the_old_hold_lasts(platform: Platform, cable: Cable) -> None:
    """Nothing is begun for a task that may have ended meanwhile (contract §4); the renewal is due after 30 minutes."""
    handle = await start_long_training(platform, platform.training())
    await platform.until_settled(handle)
    await pass_minutes(platform, handle, 28)
    cable.pull()
    await pass_minutes(platform, handle, 1)
    await platform.pass_time(handle, 2 * MINUTE)
    await platform.until(lambda: waits_for_store(handle))
    assert await kinds_of(platform, handle) == ["pre_deduct"]
    cable.plug_in()
    await platform.pass_time(handle, 31)
    await platform.until(lambda: has_kinds(platform, handle, *RENEWED))
    await handle.cancel()
    ending = await ended(platform, handle)
    assert (ending.status, "uncovered" in ending.exceptions) == (TaskStatus.CANCELLED, False)


# Delivered while the store is away: the ledger alone decides, and what was unknown before does not


async def delivered_while_away(platform: Platform, cable: Cable, handle: Handle, *, minutes: int = 5) -> None:
    """Let the training be delivered while the store is away, for as long as its settlement takes."""
    cable.pull()
    [run] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(run.run_id, "finish")
    await pass_minutes(platform, handle, minutes)
    cable.plug_in()
    with contextlib.suppress(RPCError):  # it may have ended by now
        await platform.pass_time(handle, 31)


@pytest.mark.on_both_profiles
@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
async def test_a_delivery_is_paid_for_though_an_old_hold_was_left_to_its_expiry(
    platform: Platform, cable: Cable, times: int | None
) -> None:
    """At the delivery its cancel is requested once more."""
    handle = await start_long_training(platform, platform.training())
    await platform.until_settled(handle)
    await refuse_cancels(platform, handle, times=times)
    await pass_minutes(platform, handle, 31)
    assert await kinds_of(platform, handle) == ["pre_deduct", "pre_deduct"]
    await delivered_while_away(platform, cable, handle)
    ending = await ended(platform, handle, exempt={"hold_expires"} if times is None else ())
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert "hold_left_to_expiry" in ending.exceptions
    assert (ending.result["credits"]["settlement"], ending.result["credits"]["charged"]) == ("settled", 120)


@pytest.mark.on_both_profiles
@pytest.mark.parametrize(
    ("ends", "is_late", "settlement"),
    [("cancel", False, "settled"), ("commit", False, "settled"), ("commit", True, "unknown")],
    ids=["cancelled", "committed", "committed, and still not shown"],
)
async def test_a_delivery_is_paid_for_once_though_an_old_holds_end_was_not_shown(
    platform: Platform, cable: Cable, ends: str, is_late: bool, settlement: str
) -> None:
    """Another caller has ended it. Its end may be a commit until the ledger shows it."""
    payer = await new_payer(platform)
    credits, task = platform.simulators.admin.credits, payer.training()
    handle = await start_long_training(platform, task)
    await platform.until_settled(handle)
    [hold] = await holds_of(platform, handle)
    commit = {"task_id": task["task_id"], "template_id": task["template_id"], "actual_cost": 120}
    fields = commit if ends == "commit" else {"reason": "by hand"}
    late = await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=3 * 3_600, times=None)
    await payer.post(ends, "by-hand", {"pre_deduct_id": hold.pre_deduct_id, **fields})
    await pass_minutes(platform, handle, 45)
    if not is_late:
        await credits.remove_fault(late)
    await delivered_while_away(platform, cable, handle, minutes=13 if is_late else 5)
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert ending.result["credits"]["settlement"] == settlement


async def waits_for_store(handle: Handle) -> bool:
    """Whether a call is repeated because the store, which is looked at before it, does not answer."""
    described = (await handle.describe()).raw_description
    return any(
        activity.last_failure.application_failure_info.type == STORE_UNAVAILABLE
        for activity in described.pending_activities
    )
