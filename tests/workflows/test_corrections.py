"""A settlement that was unknown when its task ended is looked up again by the reconciler (contract §4)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from activities import credits as credits_calls
from comfyui_temporal.contracts.calls import LedgerQuery
from comfyui_temporal.contracts.credits import CHARGE_REASON, LedgerEntry
from comfyui_temporal.contracts.reconcile import RECONCILE_WORKFLOW, ReconcileOrder, ReconcileResult
from comfyui_temporal.contracts.tasks import CANCEL_SIGNAL, CancelTask, CreditsSummary, SettlementState, TaskStatus
from proof.simulators.admin_wire import Fault
from proof.simulators.credits_profile import CONTRACT, FIELD
from store import TaskStore
from store.by_hand import Found
from tests.conftest import NewDatabase, unique
from tests.workflows.books import check_histories, ended, give_back
from tests.workflows.payers import Payer, end_open_holds, has_kinds, holds_of, new_payer, refuse_cancels
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of
from tests.workflows.resets import point_before, points_of, reset
from tests.workflows.test_reset_settlement import charged_and_reset, stalled
from tests.workflows.test_settlement import delivered, expired, start_reporting
from tests.workflows.test_task_ledger import SHAPES, OneHold
from tests.workflows.test_task_ledger import entries_of as entries_of_hold
from workflows import correction, ledger_search
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
    request: pytest.FixtureRequest,
) -> AsyncIterator[Platform]:
    """A platform whose store holds no other test's rows, and whose runs look into the ledger for a second only."""
    monkeypatch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
    store, profile = TaskStore(await new_database()), getattr(request, "param", CONTRACT)
    async with running_platform(temporal_env, store, tmp_path, speed=2_000, credits_profile=profile) as platform:
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


LONGEST = 4
"""Entries of a page, in place of 1,000."""


@pytest.mark.parametrize("alone", [FIELD], indirect=True, ids=["field"])
@pytest.mark.parametrize(("since", "is_shown"), [(2, True), (3, False)], ids=["all in sight", "its hold cut off"])
async def test_a_ledger_that_is_cut_corrects_a_task_of_which_it_shows_everything(
    alone: Platform, monkeypatch: pytest.MonkeyPatch, since: int, is_shown: bool
) -> None:
    """The account has more entries than a page without a next one shows: an older one is no entry of the task."""
    monkeypatch.setattr(credits_calls, "LONGEST_PAGE", LONGEST)
    monkeypatch.setattr(correction, "LedgerQuery", partial(LedgerQuery, limit=LONGEST))
    payer = await new_payer(alone)
    handle, lag = await committed_unseen(payer)
    result = await handle.result()
    assert result["credits"]["settlement"] == "unknown"
    await alone.simulators.admin.credits.remove_fault(lag)
    for n in range(since):
        await payer.has(200_000 + n)  # each is an entry of the account

    assert (await reconcile(alone)).corrected == int(is_shown)
    known = {"settlement": SettlementState.SETTLED, "charged": HD, "returned": 0} if is_shown else {}
    assert await credits_in_row(alone, handle) == {**result["credits"], **known}


COMMITTED, BACK, OPEN = OneHold(1, HD, "commit", HD), OneHold(2, HD, "cancel"), OneHold(3, HD)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("shown", "granted", "lives", "charged"),
    [
        ([BACK, COMMITTED], 2, 0, HD),
        ([BACK], 1, 0, 0),
        ([BACK], 2, 0, None),
        ([COMMITTED], 2, 0, None),
        ([OneHold(2, HD)], 1, 0, None),
        ([COMMITTED, OneHold(2, HD)], 2, 0, None),
        ([BACK], 1, 1, None),
        ([BACK], 1, None, None),
        ([], 0, 0, None),
    ],
    ids=[
        "renewed and charged",
        "given back",
        "its older hold cut off",
        "a renewal's end not shown",
        "still open",
        "an open hold in the place of one that is cut off",
        "an earlier life may have charged before",
        "whether it was reset is not known",
        "nothing of it",
    ],
)
def test_a_cut_ledger_settles_only_what_it_shows_from_the_first_hold_on(
    shown: list[OneHold], granted: int, lives: int | None, charged: int | None, shape: str
) -> None:
    entries = [entry for hold in shown for entry in entries_of_hold(hold, shape)]
    recorded = CreditsSummary(held=HD, pre_deduct_count=granted, settlement=SettlementState.UNKNOWN)
    found = corrected(recorded, TaskLedger(entries[::-1], is_complete=False), lives=lives)
    assert (found.charged if found else None) == charged


@pytest.mark.parametrize(
    ("shown", "granted", "lives", "is_last_look", "is_settled"),
    [
        ([BACK, OPEN], 1, 0, True, True),
        ([BACK, OPEN], 1, 0, False, False),
        ([BACK, OPEN], 2, 0, True, False),
        ([BACK, OPEN], 1, 1, True, False),
        ([BACK, OPEN], 1, None, True, False),
        ([OneHold(1, HD, "commit", 0), OPEN], 1, 0, True, False),
        ([OPEN, OneHold(4, HD)], 1, 0, True, False),
        ([BACK, OPEN], 0, 0, True, False),
    ],
    ids=[
        "as many ends as holds were granted",
        "a commit may still be shown",
        "both were granted",
        "an earlier life may have been granted the other",
        "whether it was reset is not known",
        "the end of it is a commit of nothing",
        "none of them has ended",
        "none was granted",
    ],
)
def test_an_open_doubled_hold_leaves_no_settlement_unknown_for_good(
    shown: list[OneHold], granted: int, lives: int | None, is_last_look: bool, is_settled: bool
) -> None:
    recorded = CreditsSummary(held=HD, pre_deduct_count=granted, settlement=SettlementState.UNKNOWN)
    for shape in SHAPES:
        ledger = TaskLedger([entry for hold in shown for entry in entries_of_hold(hold, shape)])
        found = corrected(recorded, ledger, lives=lives, is_last_look=is_last_look)
        if is_settled and shape == "reason":
            assert found is not None and (found.charged, found.returned) == (0, HD)
        else:
            assert found is None, f"by {shape}: a ledger with ids shows which hold is open"


@pytest.mark.parametrize("alone", [FIELD], indirect=True, ids=["field"])
async def test_a_task_whose_hold_has_ended_beside_a_doubled_one_is_corrected_once_a_day_has_passed(
    alone: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = await new_payer(alone)
    admin, task = alone.simulators.admin, payer.image()
    await admin.credits.fault("drop", route="pre_deduct", task_id=task["task_id"], when="after")
    await admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"])
    handle = await alone.start(task)
    await alone.until_held(task["task_id"])
    await refuse_cancels(alone, handle, times=None)
    await alone.cancel(handle)
    assert (await handle.result())["credits"]["settlement"] == "unknown"
    doubled, own = await holds_of(alone, handle)
    assert (doubled.phase, own.phase) == ("open", "open")
    await admin.credits.cancel_hold(own.pre_deduct_id)
    assert (await reconcile(alone)).corrected == 0, "a commit may be shown later"
    monkeypatch.setattr(correction, "LAST_LOOK_AFTER", timedelta(0))
    assert (await reconcile(alone)).corrected == 1
    credits = await credits_in_row(alone, handle)
    assert (credits["charged"], credits["returned"], credits["settlement"]) == (0, HD, "settled")


@pytest.mark.parametrize("shows", ["its hold's end", "nothing"])
@pytest.mark.parametrize("how", ["cancelled", "given back"])
async def test_a_charge_in_doubt_does_not_count_as_none_while_the_ledger_does_not_show_it(
    alone: Platform, how: str, shows: str
) -> None:
    """The hold had ended long before its charge, then the run was reset. `shows`: the ledger at the task's end."""
    payer = await new_payer(alone)
    credits, lag = alone.simulators.admin.credits, {"tenant_id": payer.tenant_id, "seconds": 100 * HOURS}
    run = await charged_and_reset(alone, payer, lag_seconds=100 * HOURS)
    if shows == "nothing":
        await credits.remove_faults()
        await credits.fault("ledger_lag", **lag | {"seconds": 300 * HOURS})
    await alone.until_settled(run)
    if how == "cancelled":
        await run.signal(CANCEL_SIGNAL, CancelTask(reason="no longer wanted"))
    else:
        await run.terminate("by a test")
        assert (await (await give_back(alone, run)).result())["outcome"] == "settlement_unknown"
    await alone.until(lambda: _is_unknown(alone, run))
    await credits.remove_faults()
    await credits.fault("ledger_lag", **lag)
    assert (await reconcile(alone)).corrected == 0
    assert (await credits_in_row(alone, run))["settlement"] == "unknown"
    await credits.remove_faults()
    assert (await reconcile(alone)).corrected == 1
    shown = await credits_in_row(alone, run)
    assert (shown["charged"], shown["returned"], shown["settlement"]) == (HD, 0, "settled")


async def test_a_charge_in_doubt_is_awaited_where_the_run_that_was_reset_delivers(alone: Platform) -> None:
    """The ledger hid everything from it. It had sent no charge itself: only the history before the reset has one."""
    payer = await new_payer(alone)
    credits, lag = alone.simulators.admin.credits, {"tenant_id": payer.tenant_id, "seconds": 100 * HOURS}
    handle = await stalled(alone, payer.image())
    how = await end_open_holds(alone, handle)
    await credits.advance(100 * HOURS)
    await credits.fault("delay", route="charge", tenant_id=payer.tenant_id, when="after", seconds=60)
    await delivered(alone, handle)
    await alone.until(lambda: has_kinds(alone, handle, "pre_deduct", how, "charge"))
    await credits.fault("ledger_lag", **lag | {"seconds": 300 * HOURS})
    run = await reset(alone, handle, await point_before(alone, handle, "commit"))
    result = await run.result()
    assert (result["status"], result["credits"]["settlement"]) == (TaskStatus.COMPLETED, "unknown")
    await credits.remove_faults()
    await credits.fault("ledger_lag", **lag)
    assert (await reconcile(alone)).corrected == 0, "the ledger shows the hold's end, and the charge not yet"
    await credits.remove_faults()
    assert (await reconcile(alone)).corrected == 1
    shown = await credits_in_row(alone, run)
    assert (shown["charged"], shown["shortfall"], shown["settlement"]) == (HD, 0, "settled")


async def _is_unknown(platform: Platform, handle: Handle) -> bool:
    return bool((await credits_in_row(platform, handle))["settlement"] == "unknown")


async def test_the_part_of_a_price_that_was_never_charged_is_the_shortfall_once_a_day_has_passed(
    alone: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2,460 points 2,000 were charged; the answer to the second part leaves open what became of it."""
    payer = await new_payer(alone)
    admin, task = alone.simulators.admin, payer.training(max_credits=5_000)
    conflict = {"detail": {"code": "40901", "message": "idempotency_conflict"}}
    await admin.credits.fault("answer", route="charge", task_id=task["task_id"], nth=2, status=409, body=conflict)
    handle = await start_reporting(alone, task, gpu_hours=40, gpu_hours_used=40)
    await expired(alone, handle)
    assert (await handle.result())["credits"]["settlement"] == "unknown"
    assert (await reconcile(alone)).corrected == 0, "the second part may be shown later"
    monkeypatch.setattr(correction, "LAST_LOOK_AFTER", timedelta(0))
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
