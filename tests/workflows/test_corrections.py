"""A settlement that was unknown when its task ended is looked up again by the reconciler (contract §4)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.credits import CHARGE_REASON, LedgerEntry
from comfyui_temporal.contracts.reconcile import RECONCILE_WORKFLOW, ReconcileOrder, ReconcileResult
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from proof.simulators.admin_wire import Fault
from store import TaskStore
from store.by_hand import Found
from tests.conftest import NewDatabase, unique
from tests.workflows.books import check_histories, ended, give_back
from tests.workflows.payers import Payer, end_open_holds, holds_of, new_payer
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of
from tests.workflows.resets import points_of, reset
from tests.workflows.test_settlement import expired, start_reporting
from workflows import ledger_search
from workflows.correction import corrected
from workflows.task_ledger import TaskLedger

HD = 18 + 6
"""The price of a standard image, in points."""
HOURS = 3_600.0


@pytest_asyncio.fixture
async def alone(
    temporal_env: WorkflowEnvironment,
    new_database: NewDatabase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Platform]:
    """A platform whose store holds no other test's rows, and whose runs look into the ledger for a second only."""
    monkeypatch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
    store = TaskStore(await new_database())
    async with running_platform(temporal_env, store, tmp_path, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 5_000.0}
        async with platform.worker():
            yield platform
    await store.close()


async def reconcile(platform: Platform, *, every_seconds: float = 0.0) -> ReconcileResult:
    """One pass."""
    passing: Handle = await platform.client.start_workflow(
        RECONCILE_WORKFLOW,
        ReconcileOrder(pause_seconds=0.1, look_again_seconds=every_seconds),
        id=unique("reconcile"),
        task_queue=platform.task_queue,
        result_type=ReconcileResult,
    )
    result: ReconcileResult = await passing.result()
    await check_histories(platform, passing)
    return result


async def committed_unseen(payer: Payer, *, ledger: str = "by kind") -> tuple[Handle, Fault]:
    """A task whose commit acted, was not answered, and is not shown by the ledger until the fault is removed."""
    credits = payer.platform.simulators.admin.credits
    for kind in ("ignore_keys", "drop"):
        await credits.fault(kind, route="commit", tenant_id=payer.tenant_id)
    if ledger == "by reason":
        await credits.fault("plain_ledger", tenant_id=payer.tenant_id)
    lag = await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=HOURS)
    return await payer.platform.start(payer.image()), lag


async def credits_in_row(platform: Platform, handle: Handle) -> dict[str, Any]:
    row = await platform.store.task(task_id_of(handle))
    assert row is not None
    return row.credits.model_dump()


async def purgeable(platform: Platform) -> list[str]:
    """The tasks that a purge in two days would delete."""
    return [task.task_id for task in await platform.store.ended_before(datetime.now(UTC) + timedelta(days=2))]


@pytest.mark.parametrize("ledger", ["by kind", "by reason"])
async def test_a_settlement_that_was_unknown_is_corrected_once_the_ledger_shows_it(
    alone: Platform, ledger: str
) -> None:
    payer = await new_payer(alone)
    handle, lag = await committed_unseen(payer, ledger=ledger)
    result = await handle.result()
    unknown = {"settlement": "unknown", "charged": None, "returned": None}
    assert result["credits"] | unknown == result["credits"] == await credits_in_row(alone, handle)
    assert (await reconcile(alone)).corrected == 0
    assert await credits_in_row(alone, handle) == result["credits"], "an absent entry proves nothing"
    events = await alone.store.events(task_id_of(handle))

    await alone.simulators.admin.credits.remove_fault(lag)
    assert (await reconcile(alone)).corrected == 1

    known = {"settlement": SettlementState.SETTLED, "charged": HD, "returned": 0}
    assert await credits_in_row(alone, handle) == {**result["credits"], **known}
    assert [record.code for record in await alone.store.exceptions(task_id=task_id_of(handle))] == [
        "settlement_corrected",
        "settlement_unknown",
    ]
    seqs = [event.seq for event in await alone.store.events(task_id_of(handle))]
    assert seqs == [event.seq for event in events], "a correction publishes no event"
    assert (await handle.result())["credits"] == result["credits"], "the run's result stays as it was"
    assert (await reconcile(alone)).corrected == 0


async def records_of(platform: Platform, handle: Handle) -> dict[str, dict[str, Any]]:
    """Code → the record's details."""
    return {record.code: record.details for record in await platform.store.exceptions(task_id=task_id_of(handle))}


@pytest.mark.parametrize("by", ["the reconciler", "hand"])
async def test_what_a_corrected_task_was_not_charged_is_its_shortfall(alone: Platform, by: str) -> None:
    """Its hold had expired before the commit, and the ledger did not show that in time."""
    payer = await new_payer(alone)
    admin, task = alone.simulators.admin, payer.image()
    await admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], at=0.3, times=None)
    handle = await alone.start(task)
    await alone.until_held(task["task_id"])
    lag = await admin.credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=HOURS)
    await end_open_holds(alone, handle)
    await admin.comfyui.act((await alone.job(handle)).run_id, "finish")
    result = await handle.result()
    assert (result["status"], result["credits"]["settlement"]) == (TaskStatus.COMPLETED, "unknown")
    await admin.credits.remove_fault(lag)
    if by == "hand":
        read = Found(task_id=task["task_id"], charged=0, returned=HD, by="ada", reason="entry 4711 is its expiry")
        assert await alone.store.settle_by_hand(read)
    else:
        assert (await reconcile(alone)).corrected == 1
    known = {"settlement": SettlementState.SETTLED, "charged": 0, "returned": HD, "shortfall": HD}
    assert await credits_in_row(alone, handle) == {**result["credits"], **known}
    assert (await records_of(alone, handle))["shortfall"] == {"shortfall": HD}


@pytest.mark.parametrize(("held", "shown", "charged"), [(0, True, HD), (0, False, None), (HD, True, None)])
def test_a_charge_alone_settles_a_task_that_was_never_held(held: int, shown: bool, charged: int | None) -> None:
    """Where a hold was taken its commit may be missing still; an empty ledger proves nothing."""
    charge = LedgerEntry(
        ledger_id="1", change=-HD, balance_after=0, reason=CHARGE_REASON, task_id="t", created_at=datetime.now(UTC)
    )
    recorded = CreditsSummary(held=held, settlement=SettlementState.UNKNOWN)
    found = corrected(recorded, TaskLedger([charge] if shown else []), price=HD)
    assert (found.charged if found else None) == charged


async def test_the_part_of_a_price_that_was_never_charged_is_the_shortfall_once_corrected(alone: Platform) -> None:
    """Of 2,460 points 2,000 were charged; the answer to the second part leaves open what became of it."""
    payer = await new_payer(alone)
    admin, task = alone.simulators.admin, payer.training(max_credits=5_000)
    conflict = {"detail": {"code": "40901", "message": "idempotency_conflict"}}
    await admin.credits.fault("answer", route="charge", task_id=task["task_id"], nth=2, status=409, body=conflict)
    handle = await start_reporting(alone, task, gpu_hours=40, gpu_hours_used=40)
    await expired(alone, handle)
    assert (await handle.result())["credits"]["settlement"] == "unknown"
    assert (await reconcile(alone)).corrected == 1
    credits = await credits_in_row(alone, handle)
    assert (credits["charged"], credits["shortfall"]) == (2_000, 460)
    assert (await records_of(alone, handle))["shortfall"] == {"shortfall": 460}


async def test_a_task_that_its_give_back_completed_has_its_shortfall_once_corrected(alone: Platform) -> None:
    """Its run was terminated in its commit, whose hold had expired; the ledger showed neither in time."""
    payer = await new_payer(alone)
    credits, task = alone.simulators.admin.credits, payer.image()
    lost = await credits.fault("drop", route="commit", task_id=task["task_id"], when="before", times=None)
    handle = await start_reporting(alone, task, actual_cost=HD)
    await expired(alone, handle)
    await alone.until_hit("commit", lost)
    lag = await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=HOURS)
    await handle.terminate()
    assert (await (await give_back(alone, handle)).result())["outcome"] == "settlement_unknown"
    await credits.remove_fault(lag)
    assert (await reconcile(alone)).corrected == 1
    row = await alone.store.task(task["task_id"])
    assert row is not None
    assert (row.status, row.credits.charged, row.credits.shortfall) == (TaskStatus.COMPLETED, 0, HD)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["unknown", "corrected"])
async def test_a_task_whose_settlement_was_unknown_ends_as_its_row_says_from_every_reset_point(
    alone: Platform, row: str
) -> None:
    """The ledger shows the commit by now, or shows it no more: neither changes how the task had ended."""
    payer = await new_payer(alone)
    handle, lag = await committed_unseen(payer)
    await handle.result()
    points = await points_of(alone, handle)
    await alone.simulators.admin.credits.remove_fault(lag)
    if row == "corrected":
        assert (await reconcile(alone)).corrected == 1
        await alone.simulators.admin.credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=1_000 * HOURS)
    kept = await credits_in_row(alone, handle)
    for point in points[len(points) // 2 :]:  # the later ones: what was begun by then is not begun again
        run = await reset(alone, handle, point)
        assert (await run.result())["credits"] == kept, point
        assert await credits_in_row(alone, handle) == kept, point


async def test_a_hold_that_could_not_be_cancelled_is_given_back_by_its_expiry(alone: Platform) -> None:
    payer = await new_payer(alone)
    task = payer.image()
    refusal = {"detail": {"code": "0", "message": "amount_invalid"}}
    admin = alone.simulators.admin
    await admin.credits.fault("answer", route="cancel_hold", task_id=task["task_id"], status=422, body=refusal)
    await admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"])
    handle = await alone.start(task)
    await alone.until_held(task["task_id"])
    await alone.cancel(handle)
    ending = await ended(alone, handle, exempt={"hold_expires"})
    assert (ending.status, ending.result["credits"]["settlement"]) == (TaskStatus.CANCELLED, "unknown")
    assert (await reconcile(alone)).corrected == 0, "its points have not come back"

    [hold] = await holds_of(alone, handle)
    await admin.credits.expire_hold(hold.pre_deduct_id)
    assert (await reconcile(alone)).corrected == 1

    credits = await credits_in_row(alone, handle)
    assert (credits["charged"], credits["returned"], credits["settlement"]) == (0, HD, "settled")


async def test_an_account_that_cannot_be_read_holds_up_no_other(alone: Platform) -> None:
    unread, shown = await new_payer(alone), await new_payer(alone)
    (first, first_lag), (second, lag) = await committed_unseen(unread), await committed_unseen(shown)
    await first.result()
    await second.result()
    credits = alone.simulators.admin.credits
    for gone in (lag, first_lag):
        await credits.remove_fault(gone)
    refusal = {"detail": {"code": "40401", "message": "account_not_found"}}
    await credits.fault("answer", route="ledger", tenant_id=unread.tenant_id, status=404, body=refusal)
    assert (await reconcile(alone)).corrected == 1
    assert (await credits_in_row(alone, first))["settlement"] == "unknown"
    assert (await credits_in_row(alone, second))["charged"] == HD
    assert (await reconcile(alone)).corrected == 1


async def test_the_ledger_is_looked_at_hourly_and_the_row_stays_for_that_day(alone: Platform) -> None:
    payer = await new_payer(alone)
    handle, lag = await committed_unseen(payer)
    await handle.result()
    await alone.simulators.admin.credits.remove_fault(lag)
    assert (await reconcile(alone, every_seconds=HOURS)).corrected == 0, "it is not due yet"
    assert task_id_of(handle) not in await purgeable(alone)
    assert (await credits_in_row(alone, handle))["settlement"] == "unknown"
    assert (await reconcile(alone)).corrected == 1
    assert task_id_of(handle) in await purgeable(alone)
