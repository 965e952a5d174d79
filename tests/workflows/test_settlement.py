"""Delivered work is charged its price once in total, for any answer of commit and the ledger (contract §4, §5)."""

from __future__ import annotations

from typing import Any

import pytest
from temporalio.client import WorkflowExecutionStatus

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import Ending, ended
from tests.workflows.payers import (
    Payer,
    end_open_holds,
    entries_of,
    has_kinds,
    holds_of,
    kinds_of,
    new_payer,
    until_started,
)
from tests.workflows.platform import Handle, Platform, scheduled, sent, task_id_of

pytestmark = pytest.mark.on_both_profiles

HD = 18 + 6
"""The price of a standard image, in points."""


async def start_reporting(platform: Platform, task: dict[str, Any], **fields: Any) -> Handle:
    """Start an image or a short training whose last state has these fields, and the 202 the same GPU hours."""
    comfyui = platform.simulators.admin.comfyui
    job: dict[str, Any] = {"route": "submit_job", "task_id": task["task_id"]}
    if "dataset" in task:
        job["route"] = "create_training"
        await comfyui.fault("job_duration", **job, seconds=1_000)
    reply = {"gpu_hours": fields["gpu_hours"]} if "gpu_hours" in fields else {}
    await comfyui.fault("job_lie", **job, at=0, fields=fields, reply=reply)
    return await platform.start(task)


async def expired(platform: Platform, handle: Handle) -> str:
    """Let the task's hold end before its commit; the kind of the entry that shows it."""
    await platform.until_held(task_id_of(handle))
    return await end_open_holds(platform, handle)


async def delivered(platform: Platform, handle: Handle) -> None:
    """Let the job be delivered now; returns when its commit has been requested."""
    [job] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(job.run_id, "finish")
    await platform.until(lambda: platform.simulators.admin.credits.requests_seen("commit", task_id_of(handle)))


# What is charged (contract §5 *Charged*)


@pytest.mark.parametrize(
    ("actual_cost", "charged", "exceptions"),
    [
        (HD - 4, HD - 4, []),
        (500, HD, ["cost_above_hold"]),
        (None, HD, []),
        (0, 0, []),
    ],
    ids=["less than held", "above held", "unknown", "nothing"],
)
async def test_an_image_is_charged_what_it_cost_and_never_more_than_is_held(
    quick_platform: Platform, actual_cost: int | None, charged: int, exceptions: list[str]
) -> None:
    handle = await start_reporting(quick_platform, quick_platform.image(), actual_cost=actual_cost)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED and ending.result["result_urls"]
    assert ending.charged == charged
    assert (ending.result["credits"]["held"], ending.result["credits"]["shortfall"]) == (HD, 0)
    assert ending.exceptions == exceptions
    assert [hold.phase for hold in await holds_of(quick_platform, handle)] == ["committed" if charged else "cancelled"]


async def test_a_negative_cost_charges_nothing_and_delivers_nothing(quick_platform: Platform) -> None:
    handle = await start_reporting(quick_platform, quick_platform.image(), actual_cost=-5)
    ending = await ended(quick_platform, handle)
    assert ending.code == "reply_invalid"
    assert ending.result["credits"]["returned"] == HD


async def test_an_unknown_cost_is_the_jobs_estimate(quick_platform: Platform) -> None:
    """The job says 20, the estimate 24: 24 are held, 20 charged."""
    task = quick_platform.image()
    await quick_platform.simulators.admin.comfyui.fault(
        "job_lie",
        route="submit_job",
        task_id=task["task_id"],
        reply={"estimated_cost": 20},
        fields={"actual_cost": None},
    )
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert (ending.charged, ending.result["credits"]["returned"]) == (20, HD - 20)


# Commit refused: the ledger decides (contract §4)


@pytest.mark.parametrize("keys", ["kept", "ignored"])
async def test_a_commit_whose_answer_is_lost_charges_once(quick_platform: Platform, keys: str) -> None:
    """With keys the repeat has the result; without them it is `already_processed`, and the ledger has our commit."""
    task = quick_platform.image()
    credits = quick_platform.simulators.admin.credits
    await credits.fault("drop", route="commit", task_id=task["task_id"])
    if keys == "ignored":
        await credits.fault("ignore_keys", route="commit", task_id=task["task_id"])
    handle = await start_reporting(quick_platform, task, actual_cost=HD - 4)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert (ending.charged, ending.result["credits"]["returned"], ending.exceptions) == (HD - 4, 4, [])
    assert await kinds_of(quick_platform, handle) == ["pre_deduct", "commit"]


async def test_a_hold_that_expired_before_its_commit_is_charged(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform)
    handle = await quick_platform.start(payer.image())
    how = await expired(quick_platform, handle)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert (ending.charged, ending.result["credits"]["shortfall"], ending.exceptions) == (HD, 0, [])
    assert await kinds_of(quick_platform, handle) == ["pre_deduct", how, "charge"]


async def test_more_than_2000_points_are_charged_in_parts(quick_platform: Platform) -> None:
    task = quick_platform.training(max_credits=5_000)
    handle = await start_reporting(quick_platform, task, gpu_hours=40, gpu_hours_used=40)
    await expired(quick_platform, handle)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.charged == 120 + 39 * 60 == 2_460
    entries = await quick_platform.simulators.admin.credits.ledger(task_id_of(handle))
    assert [entry.change for entry in entries if entry.kind == "charge"] == [-2_000, -460]


@pytest.mark.parametrize(("left", "charged"), [(0, 0), (2_100, 2_000)], ids=["all of it", "the second part"])
async def test_a_refused_charge_ends_the_task_completed_with_shortfall(
    quick_platform: Platform, left: int, charged: int
) -> None:
    payer = await new_payer(quick_platform)
    task = payer.training(max_credits=5_000)
    handle = await start_reporting(quick_platform, task, gpu_hours=40, gpu_hours_used=40)
    await expired(quick_platform, handle)
    await payer.has(left)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED and ending.result["output"]["model_path"]
    assert (ending.charged, ending.result["credits"]["shortfall"]) == (charged, 2_460 - charged)
    differs = set() if quick_platform.simulators.credits_profile.counts_gpu_hours else {"prices_differ"}
    assert set(ending.exceptions) == {"shortfall"} | differs


async def test_a_ledger_that_lags_is_waited_for(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform)
    await patient_platform.simulators.admin.credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=200)
    handle = await patient_platform.start(payer.image())
    how = await expired(patient_platform, handle)
    await delivered(patient_platform, handle)
    await patient_platform.pass_time(handle, 150)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", how], "an absent entry proves nothing"
    await patient_platform.pass_time(handle, 120)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])


# hold_insufficient


@pytest.mark.parametrize(("policy", "charged"), [(False, HD), (True, 60)], ids=["by default", "if policy says so"])
async def test_a_hold_that_has_less_than_the_price_is_committed_with_what_it_has(
    quick_platform: Platform, policy: bool, charged: int
) -> None:
    """60 points were requested, the hold has 24 of them."""
    quick_platform.policy["charge_shortfall"] = policy
    task = quick_platform.image(max_credits=60)
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault(
        "job_lie", route="submit_job", task_id=task["task_id"], reply={"estimated_cost": 60}, fields={"actual_cost": 60}
    )
    await holds_less(quick_platform, task["task_id"], HD)
    ending = await ended(quick_platform, await quick_platform.start(task))
    assert ending.status is TaskStatus.COMPLETED
    assert (ending.charged, ending.result["credits"]["shortfall"]) == (charged, 60 - charged)
    assert set(ending.exceptions) == {"prices_differ"} | (set() if policy else {"shortfall"})


async def holds_less(platform: Platform, task_id: str, amount: int) -> None:
    """Let the service refuse a commit once, and its ledger show a smaller hold than was granted."""
    credits = platform.simulators.admin.credits
    refusal = {"detail": {"code": "40902", "message": "hold_insufficient"}}
    await credits.fault("answer", route="commit", task_id=task_id, status=409, body=refusal)
    entry = {"ledger_id": "e", "task_id": task_id, "change": -amount, "reason": "pre_deduct"}
    await credits.fault("alter", route="ledger", task_id=task_id, fields={"entries": [entry]})


@pytest.mark.parametrize("granted", [100, 25])
async def test_a_hold_granted_above_its_request_is_committed_up_to_the_request(
    quick_platform: Platform, granted: int
) -> None:
    """The service says that it froze more: neither the commit nor the price exceeds the request."""
    task = quick_platform.image()
    await quick_platform.simulators.admin.credits.fault(
        "alter", route="pre_deduct", task_id=task["task_id"], fields={"frozen_amount": granted}
    )
    handle = await start_reporting(quick_platform, task, actual_cost=60)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert (ending.charged, ending.result["credits"]["shortfall"]) == (HD, 0)
    assert ending.exceptions == ["cost_above_hold"]
    assert [post["body"]["actual_cost"] for post in await sent(handle, "commit")] == [HD]


@pytest.mark.parametrize("hold", ["open", "expired"])
@pytest.mark.parametrize("policy", [False, True], ids=["shortfall", "shortfall charged"])
async def test_a_training_that_used_more_than_is_held(quick_platform: Platform, policy: bool, hold: str) -> None:
    """120 points are held, 240 used up at the very end: the rest is charged only if policy says so, each part once."""
    quick_platform.policy["charge_shortfall"] = policy
    handle = await start_reporting(quick_platform, quick_platform.training(), gpu_hours_used=3)
    if hold == "expired":
        await expired(quick_platform, handle)
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    charged = 240 if policy else 120
    assert (ending.charged, ending.result["credits"]["shortfall"]) == (charged, 240 - charged)


@pytest.mark.parametrize("left", [0, 1], ids=["nothing is left", "a point is left"])
async def test_the_balance_after_the_last_charge_is_published(quick_platform: Platform, left: int) -> None:
    """120 points are committed, the other 120 charged."""
    quick_platform.policy["charge_shortfall"] = True
    payer = await new_payer(quick_platform)
    handle = await start_reporting(quick_platform, payer.training(), gpu_hours_used=3)
    await quick_platform.until_held(task_id_of(handle))
    await payer.has(120 + left)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, 240, left)
    [settled] = [event for event in ending.events if event.message and "were charged" in event.message]
    assert settled.balance_after == left


# A ledger that shows only reasons, as the platform's own does


@pytest.mark.parametrize("ledger", ["by kind", "by reason"])
@pytest.mark.parametrize("answer", ["lost", "500"])
@pytest.mark.parametrize("cost", [HD - 4, HD], ids=["part of the hold", "all of it"])
async def test_a_commit_that_acted_without_an_answer_is_settled_within_seconds(
    quick_platform: Platform, ledger: str, answer: str, cost: int
) -> None:
    payer = await new_payer(quick_platform)
    credits = quick_platform.simulators.admin.credits
    if ledger == "by reason":
        await payer.has_plain_service()
    if answer == "lost":
        await credits.fault("drop", route="commit", tenant_id=payer.tenant_id)
    else:
        await credits.fault("error", route="commit", tenant_id=payer.tenant_id, status=500, when="after")
    handle = await start_reporting(quick_platform, payer.image(), actual_cost=cost)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, cost, [])
    assert (ending.result["credits"]["settlement"], ending.result["credits"]["returned"]) == ("settled", HD - cost)
    [settled] = [event for event in ending.events if event.message and "were charged" in event.message]
    assert settled.credits_delta == HD - cost
    [requested, *_] = await scheduled(handle, "commit")
    assert (ending.events[-1].ts - ending.events[0].ts).total_seconds() - requested < 15


async def test_a_lagging_ledger_by_reason_never_reports_a_committed_hold_as_given_back(
    patient_platform: Platform,
) -> None:
    """After a renewal the old hold's cancel is the only end that is shown: the new one's is looked for again."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    await payer.has_plain_service()
    await credits.fault("drop", route="commit", tenant_id=payer.tenant_id)
    task = payer.training()
    await patient_platform.simulators.admin.comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    handle = await patient_platform.start(task)
    await until_started(patient_platform, handle)
    await patient_platform.pass_time(handle, 300)
    await patient_platform.until_stage(handle, "data_ingest")
    await patient_platform.pass_time(handle, 1_510)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct", "pre_deduct", "cancel"))
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=400)
    await delivered(patient_platform, handle)
    await patient_platform.pass_time(handle, 300)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "pre_deduct", "cancel", "commit"]
    await patient_platform.pass_time(handle, 250)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])


async def test_a_not_found_cancel_never_reports_a_committed_hold_as_given_back(
    patient_platform: Platform,
) -> None:
    """The old hold's cancel acted and was answered `not found`: its entry is not taken for the new hold's end."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    await payer.has_plain_service()
    not_found = {"detail": {"code": "40401", "message": "pre_deduct_not_found"}}
    refused = {"route": "cancel_hold", "tenant_id": payer.tenant_id, "status": 404, "body": not_found}
    await credits.fault("answer", **refused, when="after")
    await credits.fault("drop", route="commit", tenant_id=payer.tenant_id)
    task = payer.training()
    await patient_platform.simulators.admin.comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    handle = await patient_platform.start(task)
    await until_started(patient_platform, handle)
    await patient_platform.pass_time(handle, 1_810)
    await patient_platform.until(lambda: has_kinds(patient_platform, handle, "pre_deduct", "pre_deduct", "cancel"))
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=400)
    await patient_platform.pass_time(handle, 410)
    await delivered(patient_platform, handle)
    await patient_platform.pass_time(handle, 300)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "pre_deduct", "cancel", "commit"]
    await patient_platform.pass_time(handle, 250)
    ending = await ended(patient_platform, handle, exempt={"points_in_events"})
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 120, [])


@pytest.mark.parametrize("answered", [5, 0, 500])
@pytest.mark.parametrize("ledger", ["by kind", "by reason"])
async def test_a_commit_answered_with_another_amount_is_looked_up(
    quick_platform: Platform, ledger: str, answered: int
) -> None:
    payer = await new_payer(quick_platform)
    if ledger == "by reason":
        await payer.has_plain_service()
    await quick_platform.simulators.admin.credits.fault(
        "alter", route="commit", tenant_id=payer.tenant_id, fields={"frozen_amount": answered}
    )
    handle = await start_reporting(quick_platform, payer.image(), actual_cost=20)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 20, [])


async def test_the_ledger_wins_over_what_was_committed(quick_platform: Platform) -> None:
    """20 points were sent, the answer says 5, and the ledger shows 5: 15 are missing."""
    task = quick_platform.image()
    credits = quick_platform.simulators.admin.credits
    await credits.fault("alter", route="commit", task_id=task["task_id"], fields={"frozen_amount": 5})
    rows = [
        {"ledger_id": f"e{n}", "task_id": task["task_id"], "change": change, "reason": reason}
        for n, (change, reason) in enumerate([(-5, "commit"), (19, "refund_pre_deduct"), (-24, "pre_deduct")])
    ]
    await credits.fault("alter", route="ledger", task_id=task["task_id"], fields={"entries": rows})
    handle = await start_reporting(quick_platform, task, actual_cost=20)
    result = await handle.result()
    expected = {"charged": 5, "returned": 19, "shortfall": 15, "settlement": "settled"}
    assert result["credits"] | expected == result["credits"]


# A charge that is not answered


@pytest.mark.by_contract("keys are kept")
@pytest.mark.parametrize("acts", [True, False], ids=["acted", "did not act"])
@pytest.mark.parametrize("part", [1, 2])
async def test_an_unanswered_charge_is_repeated_where_keys_are_kept(
    quick_platform: Platform, acts: bool, part: int
) -> None:
    task = quick_platform.training(max_credits=5_000)
    await quick_platform.simulators.admin.credits.fault(
        "drop", route="charge", task_id=task["task_id"], when="after" if acts else "before", nth=part
    )
    handle = await start_reporting(quick_platform, task, gpu_hours=40, gpu_hours_used=40)
    await expired(quick_platform, handle)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 2_460, [])
    assert [entry.change for entry in await entries_of(quick_platform, handle) if entry.kind == "charge"] == [
        -2_000,
        -460,
    ]


async def cancelled_by_another_caller(platform: Platform, payer: Payer, handle: Handle) -> None:
    """Another caller gives the task's hold back before its commit."""
    await platform.until_held(task_id_of(handle))
    [hold] = await holds_of(platform, handle)
    await payer.post("cancel", "by-hand", {"pre_deduct_id": hold.pre_deduct_id, "reason": "by hand"})


@pytest.mark.parametrize("acts", [True, False], ids=["acted", "did not act"])
async def test_an_unanswered_charge_waits_for_the_ledger_where_no_keys_are_kept(
    patient_platform: Platform, acts: bool
) -> None:
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    credits = patient_platform.simulators.admin.credits
    lost = await credits.fault("drop", route="charge", tenant_id=payer.tenant_id, when="after" if acts else "before")
    handle = await patient_platform.start(payer.image())
    await cancelled_by_another_caller(patient_platform, payer, handle)
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("charge", lost)
    if not acts:
        await patient_platform.until_settled(handle)
        await patient_platform.pass_time(handle, 560)
        assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel"], "it is not sent again before"
        await patient_platform.pass_time(handle, 60)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel", "charge"]


async def test_an_unanswered_charge_is_not_repeated_where_the_ledger_lacks_the_commit_before_it(
    patient_platform: Platform,
) -> None:
    """120 points are committed and 120 charged; ten minutes later the ledger shows the hold alone."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    patient_platform.policy["charge_shortfall"] = True
    credits = patient_platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=800)
    lost = await credits.fault("drop", route="charge", tenant_id=payer.tenant_id)
    handle = await start_reporting(patient_platform, payer.training(), gpu_hours_used=3)
    await until_started(patient_platform, handle)
    await patient_platform.pass_time(handle, 400)
    await patient_platform.pass_time(handle, 400)
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("charge", lost)
    await patient_platform.pass_time(handle, 650)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 240, ["settlement_unknown"])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "commit", "charge"]


async def test_an_unanswered_charge_is_not_repeated_where_the_ledger_lacks_the_part_before_it(
    patient_platform: Platform,
) -> None:
    """2000 points are charged and 460 more; ten minutes later the ledger shows neither."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    credits = patient_platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=800)
    lost = await credits.fault("drop", route="charge", tenant_id=payer.tenant_id, nth=2)
    task = payer.training(max_credits=5_000)
    handle = await start_reporting(patient_platform, task, gpu_hours=40, gpu_hours_used=40)
    await cancelled_by_another_caller(patient_platform, payer, handle)
    await patient_platform.pass_time(handle, 400)
    await patient_platform.pass_time(handle, 410)
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("charge", lost)
    await patient_platform.pass_time(handle, 650)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 2_460)
    assert "settlement_unknown" in ending.exceptions
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel", "charge", "charge"]


async def unanswered_charge(platform: Platform, payer: Payer, *, lag: float) -> Handle:
    """An image whose charge has acted and is not answered; no keys are kept, and the ledger lags by `lag` seconds."""
    await payer.has_plain_service()
    credits = platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=lag)
    lost = await credits.fault("drop", route="charge", tenant_id=payer.tenant_id)
    handle = await platform.start(payer.image())
    await cancelled_by_another_caller(platform, payer, handle)
    await platform.until_settled(handle)
    await platform.pass_time(handle, lag + 5)
    await delivered(platform, handle)
    await platform.until_hit("charge", lost)
    return handle


@pytest.mark.parametrize("later", ["refused", "unreadable"])
async def test_an_unanswered_charge_is_not_repeated_where_the_ledger_is_shown_only_at_once(
    patient_platform: Platform, later: str
) -> None:
    """It lags by seconds, and no look after the first one is answered."""
    payer = await new_payer(patient_platform)
    credits = patient_platform.simulators.admin.credits
    handle = await unanswered_charge(patient_platform, payer, lag=6)
    [charge] = await scheduled(handle, "charge")

    async def looked_once() -> bool:
        return any(at > charge for at in await scheduled(handle, "ledger"))

    await patient_platform.until(looked_once)
    await patient_platform.until_settled(handle)
    if later == "refused":
        body = {"detail": {"code": "40401", "message": "account_not_found"}}
        refusal = {"status": 404, "body": body}
        await credits.fault("answer", route="ledger", tenant_id=payer.tenant_id, times=None, **refusal)
    else:
        await credits.fault("garbage", route="ledger", tenant_id=payer.tenant_id, times=None)
    for _ in range(2):
        await patient_platform.pass_time(handle, 500)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, ["settlement_unknown"])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel", "charge"]


async def test_an_unanswered_charge_is_looked_for_after_the_ledgers_outage(patient_platform: Platform) -> None:
    """The ledger is away for twelve minutes, and shows the charge a minute and a half later."""
    payer = await new_payer(patient_platform)
    await payer.has_plain_service()
    patient_platform.policy["charge_shortfall"] = True
    credits = patient_platform.simulators.admin.credits
    await credits.fault("ledger_lag", tenant_id=payer.tenant_id, seconds=800)
    await credits.fault("drop", route="charge", tenant_id=payer.tenant_id)
    away = await credits.fault("error", route="ledger", tenant_id=payer.tenant_id, status=503, times=None)
    handle = await start_reporting(patient_platform, payer.training(), gpu_hours_used=3)
    await until_started(patient_platform, handle)
    await patient_platform.pass_time(handle, 400)
    await delivered(patient_platform, handle)
    await patient_platform.until_hit("ledger", away)
    await patient_platform.pass_time(handle, 720)
    await credits.remove_fault(away)
    await patient_platform.pass_time(handle, 40)
    await patient_platform.until_settled(handle)
    await patient_platform.pass_time(handle, 200)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 240, [])
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "commit", "charge"]


# What stays unknown


async def unknown_settlement(platform: Platform, payer: Payer, *exempt: str) -> Ending:
    """Follow an image whose settlement stays unknown to its end, 10 minutes after its delivery."""
    handle = await platform.start(payer.image())
    await platform.until_held(task_id_of(handle))
    await delivered(platform, handle)
    await platform.pass_time(handle, 590)
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "the ledger is looked at for 10 minutes"
    await platform.pass_time(handle, 60)
    return await ended(platform, handle, exempt=exempt)


@pytest.mark.parametrize("message", ["amount_invalid", "pre_deduct_already_processed"])
async def test_a_commit_that_no_ledger_shows_is_recorded_and_nothing_charged(
    patient_platform: Platform, message: str
) -> None:
    """The service refuses the commit with any code, and its ledger shows neither end of the hold."""
    payer = await new_payer(patient_platform)
    refusal = {"detail": {"code": "0", "message": message}}
    await patient_platform.simulators.admin.credits.fault(
        "answer", route="commit", tenant_id=payer.tenant_id, status=409, body=refusal
    )
    ending = await unknown_settlement(patient_platform, payer, "hold_expires")
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 0)
    assert ending.exceptions == ["settlement_unknown"]
    credits = ending.result["credits"]
    assert tuple(credits[key] for key in ("settlement", "charged", "returned", "held")) == ("unknown", None, None, HD)
    assert [event.credits_delta for event in ending.events if event.credits_delta is not None] == [-HD]
    row = await patient_platform.store.task(ending.result["task_id"])
    assert row is not None and row.credits.settlement == "unknown" and row.credits.charged is None


async def test_a_commit_that_stays_unreadable_is_looked_up_in_the_ledger(patient_platform: Platform) -> None:
    payer = await new_payer(patient_platform)
    await patient_platform.simulators.admin.credits.fault(
        "garbage", route="commit", tenant_id=payer.tenant_id, when="after", times=None
    )
    handle = await patient_platform.start(payer.image())
    await patient_platform.until_held(task_id_of(handle))
    await delivered(patient_platform, handle)
    await patient_platform.pass_time(handle, 880)
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "it is repeated for 15 minutes"
    await patient_platform.pass_time(handle, 150)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])


async def test_an_unanswered_commit_is_repeated_without_limit(patient_platform: Platform) -> None:
    """Longer than any setup call, until the service is back."""
    payer = await new_payer(patient_platform)
    fault = await patient_platform.simulators.admin.credits.fault(
        "rate_limit", route="commit", tenant_id=payer.tenant_id, seconds=60, times=None
    )
    handle = await patient_platform.start(payer.image())
    await patient_platform.until_held(task_id_of(handle))
    await delivered(patient_platform, handle)
    await patient_platform.pass_time(handle, 16 * 60)
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING
    await patient_platform.simulators.admin.credits.remove_fault(fault)
    await patient_platform.pass_time(handle, 60)
    ending = await ended(patient_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, HD, [])
