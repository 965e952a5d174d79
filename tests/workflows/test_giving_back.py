"""What a refused cancel of a hold means (contract §4 *cancel refused*), and services that offer less than ours."""

from __future__ import annotations

from typing import Any

import pytest
from temporalio import activity
from temporalio.client import WorkflowExecutionStatus, WorkflowUpdateStage
from temporalio.exceptions import ApplicationError

from activities.lives import Lives
from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE, EarlierLife, TaskRun
from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended, ended_without_its_run, give_back
from tests.workflows.payers import (
    Payer,
    end_open_holds,
    holds_of,
    kinds_of,
    new_payer,
    refuse_cancels,
    start_long_training,
    until_kinds,
    until_started,
)
from tests.workflows.platform import Handle, Platform, scheduled, task_id_of

HD = 18 + 6
"""The price of a standard image, in points."""
BY_KIND = pytest.mark.by_contract("the ledger shows kinds and ids")


async def start_held(platform: Platform, task: dict[str, Any]) -> Handle:
    """Start an image that never ends by itself; returns when credits are held."""
    await platform.simulators.admin.comfyui.fault(
        "job_stall", route="submit_job", task_id=task["task_id"], while_queued=True
    )
    handle = await platform.start(task)
    await platform.until_held(task_id_of(handle))
    return handle


async def test_a_hold_that_had_expired_is_given_back(quick_platform: Platform) -> None:
    handle = await start_held(quick_platform, quick_platform.image())
    await end_open_holds(quick_platform, handle)
    assert await quick_platform.cancel(handle) == "accepted"
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [])
    assert ending.result["credits"]["returned"] == HD
    assert [event.credits_delta for event in ending.events if event.credits_delta] == [-HD, HD]


async def test_a_cancel_whose_answer_is_lost_is_found_in_the_ledger(quick_platform: Platform) -> None:
    """The service looks at no keys: the repeat is refused as `already_processed`."""
    task = quick_platform.image()
    credits = quick_platform.simulators.admin.credits
    await credits.fault("ignore_keys", route="cancel_hold", task_id=task["task_id"])
    await credits.fault("drop", route="cancel_hold", task_id=task["task_id"])
    handle = await start_held(quick_platform, task)
    await quick_platform.cancel(handle)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [])
    assert await kinds_of(quick_platform, handle) == ["pre_deduct", "cancel"]


@pytest.mark.parametrize("by", ["update", "Temporal"])
async def test_a_hold_that_another_caller_committed_completes_the_task(quick_platform: Platform, by: str) -> None:
    """The run ends Completed, whichever way it was cancelled."""
    payer = await new_payer(quick_platform)
    task = payer.image()
    handle = await start_held(quick_platform, task)
    [hold] = await holds_of(quick_platform, handle)
    body = {
        "pre_deduct_id": hold.pre_deduct_id,
        "actual_cost": 20,
        "task_id": task["task_id"],
        "template_id": task["template_id"],
    }
    await payer.post("commit", "by-hand", body)
    if by == "update":
        assert await quick_platform.cancel(handle) == "accepted"
    else:
        await handle.cancel()
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 20, [])


@pytest.mark.parametrize(
    ("message", "exceptions"),
    [("pre_deduct_not_found", []), ("amount_invalid", ["hold_left_to_expiry"])],
)
async def test_a_cancel_refused_by_another_name_leaves_the_hold_to_its_expiry(
    quick_platform: Platform, message: str, exceptions: list[str]
) -> None:
    task = quick_platform.image()
    await quick_platform.simulators.admin.credits.fault(
        "answer",
        route="cancel_hold",
        task_id=task["task_id"],
        status=422,
        body={"detail": {"code": "0", "message": message}},
    )
    handle = await start_held(quick_platform, task)
    await quick_platform.cancel(handle)
    ending = await ended(quick_platform, handle, exempt={"hold_expires"})
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, exceptions)
    assert ending.result["credits"]["settlement"] == ("unknown" if exceptions else "settled")


@pytest.mark.by_contract("it keeps keys")
async def test_a_hold_that_another_life_cancelled_for_another_reason_is_given_back(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform)
    task = payer.image()
    handle = await start_held(quick_platform, task)
    [hold] = await holds_of(quick_platform, handle)
    body = {"pre_deduct_id": hold.pre_deduct_id, "reason": "of a life before the reset"}
    await payer.post("cancel", f"{task['task_id']}:cancel:1", body)
    await quick_platform.cancel(handle)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [])
    assert ending.result["credits"]["settlement"] == "settled"


async def test_a_cancel_that_stays_unreadable_leaves_the_hold_to_its_expiry(patient_platform: Platform) -> None:
    task = patient_platform.image()
    unreadable = await patient_platform.simulators.admin.credits.fault(
        "garbage", route="cancel_hold", task_id=task["task_id"], times=None
    )
    handle = await start_held(patient_platform, task)
    cancelled = await handle.start_update("cancel_task", {"reason": ""}, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
    await patient_platform.until_hit("cancel_hold", unreadable)
    await patient_platform.pass_time(handle, 14.5 * 60)
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "it is repeated for 15 minutes"
    await patient_platform.pass_time(handle, 60)
    assert (await cancelled.result())["outcome"] == "accepted"
    ending = await ended(patient_platform, handle, exempt={"hold_expires"})
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, ["hold_left_to_expiry"])


async def test_a_hold_whose_answer_is_never_readable_is_recorded(patient_platform: Platform) -> None:
    """Its id cannot be learned: the pre-deduct is repeated for 15 minutes, and for 15 more by the undo."""
    task = patient_platform.image()
    unreadable = await patient_platform.simulators.admin.credits.fault(
        "garbage", route="pre_deduct", task_id=task["task_id"], when="after", times=None
    )
    patient_platform.policy["opening_call_minutes"] = 0.1
    handle = await patient_platform.start(task)
    await patient_platform.until_hit("pre_deduct", unreadable)
    await patient_platform.pass_time(handle, 16 * 60)
    ending = await ended(patient_platform, handle, exempt={"hold_expires"})
    assert ending.code == "reply_invalid"
    assert set(ending.exceptions) == {"undo_unfinished", "reply_invalid", "hold_doubled"}, "the ledger shows the hold"


# Services that offer less


async def test_a_hold_whose_cancel_was_lost_is_found_by_reason_alone(quick_platform: Platform) -> None:
    """No keys, no ids: that one more cancel is shown than is known of says that it was this hold's."""
    payer = await new_payer(quick_platform)
    credits = quick_platform.simulators.admin.credits
    await credits.fault("plain_ledger", tenant_id=payer.tenant_id)
    await credits.fault("ignore_keys", route="cancel_hold", tenant_id=payer.tenant_id)
    await credits.fault("drop", route="cancel_hold", tenant_id=payer.tenant_id)
    handle = await start_held(quick_platform, payer.image())
    await quick_platform.cancel(handle)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [])
    assert ending.result["credits"]["returned"] == HD


async def held_twice(platform: Platform, payer: Payer, fate: str) -> Handle:
    """A task whose first hold's answer is lost, on a service without keys; its `fate` is commit or cancel."""
    credits = platform.simulators.admin.credits
    await credits.fault("ignore_keys", tenant_id=payer.tenant_id)
    await credits.fault("drop", route="pre_deduct", tenant_id=payer.tenant_id)
    if fate == "commit":
        return await platform.start(payer.image())
    handle = await start_held(platform, payer.image())
    await until_started(platform, handle)
    await platform.cancel(handle)
    return handle


@pytest.mark.parametrize("fate", ["commit", "cancel"])
@pytest.mark.parametrize("ledger", [pytest.param("by kind", marks=BY_KIND), "by reason"])
async def test_a_hold_that_was_taken_twice_is_recorded_with_its_amount(
    quick_platform: Platform, ledger: str, fate: str
) -> None:
    """The first answer is lost and keys are ignored: another hold is open. It is cancelled where its id is known."""
    payer = await new_payer(quick_platform)
    if ledger == "by reason":
        await quick_platform.simulators.admin.credits.fault("plain_ledger", tenant_id=payer.tenant_id)
    handle = await held_twice(quick_platform, payer, fate)
    ending = await ended(quick_platform, handle, exempt={"hold_expires"})
    assert ending.charged == (HD if fate == "commit" else 0)
    assert ending.exceptions == ["hold_doubled"]
    [record] = await quick_platform.store.exceptions(task_id=task_id_of(handle))
    assert record.details["amount"] == HD
    open_holds = [hold for hold in await holds_of(quick_platform, handle) if hold.phase == "open"]
    assert len(open_holds) == (1 if ledger == "by reason" else 0)


LAGS = pytest.mark.parametrize(("lag", "record"), [(5, "hold_doubled"), (90, "undo_unfinished")])


async def held_twice_by_a_late_ledger(platform: Platform, lag: float) -> Handle:
    """A task whose first hold's answer is lost; no keys are kept, and the ledger, by reason, lags by `lag` seconds."""
    payer = await new_payer(platform)
    await payer.has_plain_service()
    credits = platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=lag)
    await credits.fault("drop", route="pre_deduct", tenant_id=payer.tenant_id)
    handle = await start_held(platform, payer.image())
    await until_started(platform, handle)
    return handle


async def cancelled_and_looked_for(platform: Platform, handle: Handle) -> None:
    """Cancel a task whose doubled hold is then looked for: for a minute, if it has to be."""
    await handle.start_update("cancel_task", {"reason": ""}, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
    await platform.until(lambda: has_kind(platform, handle, "cancel"))
    await platform.until_settled(handle)
    await platform.pass_time(handle, 65)


async def has_kind(platform: Platform, handle: Handle, kind: str) -> bool:
    return kind in await kinds_of(platform, handle)


@pytest.mark.on_both_profiles
@LAGS
async def test_a_hold_that_was_taken_twice_is_recorded_where_the_ledger_lags(
    patient_platform: Platform, lag: float, record: str
) -> None:
    """At first it shows neither hold, or the first alone, and not the end of the task's own."""
    handle = await held_twice_by_a_late_ledger(patient_platform, lag)
    await cancelled_and_looked_for(patient_platform, handle)
    ending = await ended(patient_platform, handle, exempt={"hold_expires"})
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [record])
    assert [each.details.get("amount") for each in ending.records] == [HD if record == "hold_doubled" else None]


@pytest.mark.on_both_profiles
@LAGS
async def test_a_hold_that_was_taken_twice_is_recorded_by_a_give_back_where_the_ledger_lags(
    patient_platform: Platform, lag: float, record: str
) -> None:
    handle = await held_twice_by_a_late_ledger(patient_platform, lag)
    await patient_platform.until_settled(handle)
    await handle.terminate()
    giving_back = await give_back(patient_platform, handle)
    await patient_platform.until(lambda: has_kind(patient_platform, handle, "cancel"))
    await patient_platform.until_settled(giving_back)
    await patient_platform.pass_time(giving_back, 65)
    assert (await giving_back.result())["outcome"] == "given_back"
    exceptions = await patient_platform.store.exceptions(task_id=task_id_of(handle))
    assert {each.code for each in exceptions} == {"internal", record}


@pytest.mark.on_both_profiles
async def test_a_hold_that_was_taken_twice_is_recorded_beside_one_that_could_not_be_cancelled(
    patient_platform: Platform,
) -> None:
    """No end of an own hold shows that a ledger that lags has caught up: it is looked at for a minute."""
    handle = await held_twice_by_a_late_ledger(patient_platform, 5)
    await refuse_cancels(patient_platform, handle)
    await handle.start_update("cancel_task", {"reason": ""}, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
    await patient_platform.until_settled(handle, seconds=1)
    await patient_platform.pass_time(handle, 65)
    ending = await ended(patient_platform, handle, exempt={"hold_expires"})
    assert (ending.status, set(ending.exceptions)) == (TaskStatus.CANCELLED, {"hold_left_to_expiry", "undo_unfinished"})


@pytest.mark.by_contract("the ledger shows ids")
@pytest.mark.parametrize("message", ["amount_invalid", "pre_deduct_not_found"])
@pytest.mark.parametrize("fate", ["commit", "cancel"])
async def test_a_doubled_hold_that_cannot_be_cancelled_is_recorded(
    quick_platform: Platform, fate: str, message: str
) -> None:
    payer = await new_payer(quick_platform)
    refusal = {"detail": {"code": "0", "message": message}}
    await quick_platform.simulators.admin.credits.fault(
        "answer",
        route="cancel_hold",
        tenant_id=payer.tenant_id,
        nth=1 if fate == "commit" else 2,  # the one before is its own hold's
        status=422,
        body=refusal,
    )
    handle = await held_twice(quick_platform, payer, fate)
    ending = await ended(quick_platform, handle, exempt={"hold_expires"})
    [record] = ending.records
    assert (record.code, record.details["amount"]) == ("hold_doubled", HD)
    said = "could not be cancelled: it ends by expiry" if message == "amount_invalid" else "had ended before"
    assert said in record.message and message in record.message
    credits, charged = ending.result["credits"], HD if fate == "commit" else 0
    assert (credits["settlement"], credits["charged"], credits["returned"]) == ("settled", charged, HD - charged)


@pytest.fixture
def away_for_longer_than_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task store is away from the second attempt of a first pre-deduct on, until that call's time is over."""
    look, first = Lives._life, dict[str, str]()

    async def look_of(lives: Lives, run: TaskRun, *, waits_for_store: bool) -> EarlierLife:
        info = activity.info()
        is_first = first.setdefault(f"{run.run_id} {info.activity_type}", info.activity_id) == info.activity_id
        if info.activity_type == "pre_deduct" and is_first and info.attempt > 1:
            raise ApplicationError("The task store does not answer.", type=STORE_UNAVAILABLE)
        return await look(lives, run, waits_for_store=waits_for_store)

    monkeypatch.setattr(Lives, "_life", look_of)


@pytest.mark.on_both_profiles
@pytest.mark.usefixtures("away_for_longer_than_the_call")
async def test_a_hold_that_two_calls_took_is_recorded(quick_platform: Platform) -> None:
    """The first call's answer is lost; another one is made once the store is back, and its first try is answered."""
    payer = await new_payer(quick_platform)
    await payer.has_plain_service()
    await quick_platform.simulators.admin.credits.fault("drop", route="pre_deduct", tenant_id=payer.tenant_id)
    quick_platform.policy["opening_call_minutes"] = 0.1
    handle = await quick_platform.start(payer.image())
    ending = await ended(quick_platform, handle, exempt={"hold_expires"})
    assert len(await scheduled(handle, "pre_deduct")) == 2
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD)
    assert [record.details["amount"] for record in ending.records if record.code == "hold_doubled"] == [HD]


@pytest.mark.parametrize("fate", ["commit", "cancel"])
async def test_a_repeated_request_that_the_ledger_no_longer_shows_is_recorded(
    quick_platform: Platform, fate: str
) -> None:
    """A busy account's ledger without pages ends before the request: whether another hold is open cannot be seen."""
    payer = await new_payer(quick_platform)
    credits = quick_platform.simulators.admin.credits
    others = [
        {"ledger_id": f"l-{n}", "task_id": f"other-{n}", "change": -24, "balance_after": 0, "reason": "pre_deduct"}
        | {"created_at": "2026-01-01T00:00:00Z"}
        for n in range(1000)
    ]
    body = {"entries": others}
    await credits.fault("answer", route="ledger", tenant_id=payer.tenant_id, status=200, body=body, times=None)
    handle = await held_twice(quick_platform, payer, fate)
    ending = await ended(quick_platform, handle, exempt={"hold_expires"})
    assert ending.charged == (HD if fate == "commit" else 0)
    assert ending.exceptions == ["undo_unfinished"]


@pytest.mark.by_contract("keys are kept")
async def test_a_hold_that_was_requested_twice_and_taken_once_is_not_doubled(quick_platform: Platform) -> None:
    task = quick_platform.image()
    await quick_platform.simulators.admin.credits.fault("drop", route="pre_deduct", task_id=task["task_id"])
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert (ending.status, ending.exceptions) == (TaskStatus.COMPLETED, [])


@pytest.mark.by_contract("keys are kept")
async def test_a_hold_that_was_taken_once_is_not_doubled_where_the_ledger_lags(patient_platform: Platform) -> None:
    """Nothing is shown at first; then the entries have kinds, and such a service keeps keys."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=30)
    await credits.fault("drop", route="pre_deduct", tenant_id=payer.tenant_id)
    handle = await start_held(patient_platform, payer.image())
    await until_started(patient_platform, handle)
    await cancelled_and_looked_for(patient_platform, handle)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, [])


@pytest.mark.on_both_profiles
@pytest.mark.parametrize(("acts", "lag"), [(True, 0), (True, 5), (False, 0)], ids=["acted", "late", "did not act"])
async def test_a_hold_that_was_refused_after_a_lost_answer_is_recorded_only_where_it_was_taken(
    patient_platform: Platform, acts: bool, lag: float
) -> None:
    """Without keys the repeat is a request of its own: its refusal says nothing about the first one."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    credits = patient_platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=lag)
    pre_deduct = {"route": "pre_deduct", "tenant_id": payer.tenant_id}
    await credits.fault("drop", **pre_deduct, when="after" if acts else "before")
    refusal = {"detail": {"code": "40302", "message": "insufficient_balance"}}
    refused = await credits.fault("answer", **pre_deduct, nth=2, status=403, body=refusal)
    handle = await patient_platform.start(payer.image())
    await patient_platform.until_hit("pre_deduct", refused)
    await patient_platform.until_settled(handle, seconds=1)
    if not acts or lag:
        await patient_platform.pass_time(handle, 65)
    ending = await ended(patient_platform, handle, exempt={"hold_expires"})
    assert (ending.status, ending.code) == (TaskStatus.FAILED, "insufficient_balance")
    doubled = [record.details["amount"] for record in ending.records if record.code == "hold_doubled"]
    assert doubled == ([HD] if acts else [])
    assert set(ending.exceptions) - {"hold_doubled"} == {"insufficient_balance"}
    assert ending.result["credits"]["pre_deduct_ids"] == []


async def remove_our_routes(platform: Platform, tenant_id: str) -> None:
    """Remove ComfyUI's (ours) routes and the ledger's kinds for this tenant."""
    await platform.simulators.admin.comfyui.fault("not_offered", tenant_id=tenant_id)
    await platform.simulators.admin.credits.fault("plain_ledger", tenant_id=tenant_id)


@pytest.mark.parametrize("scene", ["image", "training"])
async def test_services_without_any_of_our_routes_deliver_and_charge(quick_platform: Platform, scene: str) -> None:
    payer = await new_payer(quick_platform)
    await remove_our_routes(quick_platform, payer.tenant_id)
    task = payer.image() if scene == "image" else payer.training()
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, HD if scene == "image" else 120)
    missing = ["route_not_offered:gpus", "route_not_offered:start"] if scene == "training" else []
    assert sorted(record.key for record in ending.records) == missing


async def test_a_job_that_cannot_be_cancelled_runs_out_and_costs_nothing(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform)
    await remove_our_routes(quick_platform, payer.tenant_id)
    handle = await start_held(quick_platform, payer.image())
    await until_started(quick_platform, handle)
    await quick_platform.cancel(handle)
    ending = await ended(quick_platform, handle, exempt={"job_runs_out"})
    assert (ending.status, ending.exceptions) == (TaskStatus.CANCELLED, ["route_not_offered"])


@pytest.mark.on_both_profiles
async def test_a_terminated_run_hands_nothing_out_where_the_hold_of_its_commit_was_given_back(
    patient_platform: Platform,
) -> None:
    """The commit never acted. That another hold is left to its expiry says nothing about it."""
    handle = await start_long_training(patient_platform, patient_platform.training())
    task_id = task_id_of(handle)
    await refuse_cancels(patient_platform, handle, times=2)
    await patient_platform.pass_time(handle, 1_810)
    await until_kinds(patient_platform, handle, ["pre_deduct", "pre_deduct"])
    await patient_platform.until_settled(handle)
    away = await patient_platform.simulators.admin.credits.fault(
        "error", route="commit", task_id=task_id, status=503, times=None
    )
    [run] = await patient_platform.simulators.admin.comfyui.jobs(task_id)
    await patient_platform.simulators.admin.comfyui.act(run.run_id, "finish")
    await patient_platform.until_hit("commit", away)
    await handle.terminate()
    given_back = await (await give_back(patient_platform, handle)).result()
    assert given_back["outcome"] == "settlement_unknown"
    ending = await ended_without_its_run(patient_platform, task_id, exempt={"hold_expires"})
    assert (ending.status, ending.charged, ending.result["output"]) == (TaskStatus.FAILED, 0, None)
    assert [hold.phase for hold in await holds_of(patient_platform, handle)] == ["open", "cancelled"]
