"""The credits service: holds, commits, charges, authorisations, the ledger (contract §4)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from comfyui_temporal.contracts.credits import CancelHoldReply, Estimate, HoldReply, Ledger
from proof.simulators.serving import Simulators
from tests.simulators.platform import TENANT, USER, Caller, new_task, refusal

WHO = {"tenant_id": TENANT, "user_id": USER}


async def _standing(caller: Caller) -> tuple[int, int]:
    answer = (
        await caller.http.get(
            f"{caller.simulators.credits_url}/api/v1/credits/balance", params=WHO, headers=caller.headers()
        )
    ).json()
    return answer["balance"], answer["frozen"]


async def test_a_hold_moves_points_to_frozen_and_a_commit_takes_its_cost_and_returns_the_rest(caller: Caller) -> None:
    task = new_task()
    hold = await caller.hold(task, 50)
    assert HoldReply.model_validate(hold).frozen_amount == 50
    assert await _standing(caller) == (99_950, 50)

    committed = (await caller.commit(task, hold["pre_deduct_id"], 38)).json()

    assert committed["frozen_amount"] == 38, "after a commit it is what was charged"
    assert committed["balance_after"] == 99_962
    assert await _standing(caller) == (99_962, 0)
    admin = caller.simulators.admin.credits
    assert [(entry.kind, entry.change, entry.frozen_change) for entry in await admin.ledger(task)] == [
        ("pre_deduct", -50, 50),
        ("commit", 12, -50),
    ]
    assert await admin.charged(task) == 38
    assert (await admin.balance_check()).ok


async def test_a_cancelled_hold_returns_whole_and_says_the_balance_as_a_string(caller: Caller) -> None:
    task = new_task()
    hold = await caller.hold(task)
    answer = (await caller.cancel_hold(task, hold["pre_deduct_id"])).json()
    assert answer["balance_after"] == "100000"
    assert CancelHoldReply.model_validate(answer).balance_after == 100_000
    assert await _standing(caller) == (100_000, 0)


@pytest.mark.parametrize("first", ["commit", "cancel", "expiry"])
async def test_a_hold_is_resolved_once(caller: Caller, simulators: Simulators, first: str) -> None:
    task = new_task()
    hold = (await caller.hold(task))["pre_deduct_id"]
    if first == "commit":
        assert (await caller.commit(task, hold, 50)).status_code == 200
    elif first == "cancel":
        assert (await caller.cancel_hold(task, hold)).status_code == 200
    else:
        await simulators.admin.credits.expire_hold(hold)

    processed = (409, "40901", "pre_deduct_already_processed")
    assert refusal(await caller.commit(task, hold, 50)) == processed
    assert refusal(await caller.cancel_hold(task, hold)) == processed
    assert len([e for e in await simulators.admin.credits.ledger(task) if e.kind != "pre_deduct"]) == 1
    assert (await simulators.admin.credits.balance_check()).ok


async def test_a_hold_ends_by_the_services_own_clock(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    hold = await caller.hold(task, expire_in=60)
    await simulators.admin.advance(59)
    assert (await simulators.admin.credits.holds(task))[0].phase == "open"

    await simulators.admin.advance(2)

    assert (await simulators.admin.credits.holds(task))[0].phase == "expired"
    assert await _standing(caller) == (100_000, 0)
    expired = (await simulators.admin.credits.ledger(task))[-1]
    assert (expired.kind, expired.pre_deduct_id) == ("expire", hold["pre_deduct_id"])
    assert expired.created_at == datetime.fromisoformat(hold["expire_at"])


async def test_speed_does_not_shorten_a_hold(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(100_000)
    hold = await caller.hold(new_task(), expire_in=600)
    life = datetime.fromisoformat(hold["expire_at"]) - (await simulators.admin.credits.clock()).now
    assert timedelta(seconds=595) < life <= timedelta(seconds=600)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"estimated_cost": 100_001}, (403, "40302", "insufficient_balance")),
        ({"estimated_cost": 0}, (422, "42201", "payload_invalid")),
        ({"estimated_cost": 1.5}, (422, "42201", "payload_invalid")),
        ({"expire_in": 59}, (422, "42201", "payload_invalid")),
        ({"expire_in": 3601}, (422, "42201", "payload_invalid")),
        ({"currency": "EUR"}, (422, "42201", "payload_invalid")),
        ({"scene": "video"}, (422, "42201", "payload_invalid")),
        ({"template_id": "unheard-of"}, (404, "40401", "authorization_not_found")),
        ({"tenant_id": "tenant-other"}, (403, "40302", "authorization_missing")),
        ({"user_id": "user-other"}, (403, "40302", "authorization_missing")),
    ],
)
async def test_a_hold_that_cannot_be_is_refused_by_name_and_moves_nothing(
    caller: Caller, change: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    task = new_task()
    body = caller.hold_body(task) | change
    assert refusal(await caller.credits("POST", "/pre-deduct", body, key=caller.key(task, "hold"))) == expected
    assert await _standing(caller) == (100_000, 0)


async def test_expire_in_is_600_when_left_out(caller: Caller) -> None:
    task = new_task()
    body = caller.hold_body(task)
    del body["expire_in"]
    answer = (await caller.credits("POST", "/pre-deduct", body, key=caller.key(task, "hold"))).json()
    life = datetime.fromisoformat(answer["expire_at"]) - (await caller.simulators.admin.credits.clock()).now
    assert timedelta(seconds=595) < life <= timedelta(seconds=600)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"phase": "revoked"}, "authorization_revoked"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "authorization_expired"),
        ({"quota": 1}, "authorization_quota_exceeded"),
        ({"phase": "missing"}, "authorization_not_found"),
    ],
)
async def test_authorisations_refuse_by_name(
    caller: Caller, simulators: Simulators, order: dict[str, Any], expected: str
) -> None:
    await caller.hold(new_task())
    await simulators.admin.credits.set_authorization("text-to-image", **order)
    task = new_task()
    answer = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=caller.key(task, "hold"))
    assert refusal(answer)[2] == expected


async def test_a_cancelled_hold_gives_its_quota_back(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.set_authorization("text-to-image", quota=1)
    task = new_task()
    hold = await caller.hold(task)
    assert hold["quota_snapshot"] == {"template_quota": 1, "user_usage": 1}
    await caller.cancel_hold(task, hold["pre_deduct_id"])
    assert (await caller.hold(new_task()))["quota_snapshot"]["user_usage"] == 1


async def test_commit_refusals_by_name(caller: Caller) -> None:
    task = new_task()
    hold = (await caller.hold(task, 50))["pre_deduct_id"]
    assert refusal(await caller.commit(task, hold, 51)) == (409, "40902", "hold_insufficient")
    assert refusal(await caller.commit(task, hold, -1)) == (422, "42200", "amount_invalid")
    assert refusal(await caller.commit(task, "hold-unknown", 1)) == (404, "40401", "pre_deduct_not_found")
    assert refusal(await caller.commit(new_task(), hold, 1)) == (404, "40401", "pre_deduct_not_found")
    assert (await caller.commit(task, hold, 50)).status_code == 200, "a refusal leaves the hold as it was"


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (2000, None),
        (2001, (422, "42201", "amount_limit_exceeded")),
        (0, (422, "42201", "payload_invalid")),
    ],
)
async def test_a_charge_takes_1_to_2000_points(
    caller: Caller, amount: int, expected: tuple[int, str, str] | None
) -> None:
    task = new_task()
    body = WHO | {
        "template_id": "text-to-image",
        "task_id": task,
        "amount": amount,
        "priority": "standard",
        "reason": "rest",
    }
    answer = await caller.credits("POST", "/charge", body, key=caller.key(task, "charge"))
    if expected:
        assert refusal(answer) == expected
        return
    assert (answer.json()["change"], answer.json()["balance_after"]) == (-2000, 98_000)
    assert await caller.simulators.admin.credits.charged(task) == 2000


async def test_a_charge_beyond_the_balance_is_402(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.set_balance(10)
    task = new_task()
    body = WHO | {"template_id": "upscale", "task_id": task, "amount": 11, "priority": "standard", "reason": "rest"}
    answer = await caller.credits("POST", "/charge", body, key=caller.key(task, "charge"))
    assert refusal(answer) == (402, "40201", "insufficient_balance")


async def test_estimates_price_both_priorities_by_the_table(caller: Caller, simulators: Simulators) -> None:
    body = WHO | {
        "template_id": "text-to-image",
        "scene": "image.generate",
        "resolution": "4k",
        "priority": "accelerated",
        "extras": {"hires_fix": 8},
    }
    answer = (await caller.credits("POST", "/estimate", body, key=caller.key(new_task(), "estimate"))).json()
    estimate = Estimate.model_validate(answer)
    assert estimate.selected_cost == 18 + 14 + 12 + 8
    assert {option.priority: option.total_cost for option in estimate.options or []} == {
        "standard": 40,
        "accelerated": 52,
    }
    await simulators.admin.credits.set_balance(50)
    again = (await caller.credits("POST", "/estimate", body, key=caller.key(new_task(), "estimate"))).json()
    assert (again["current_balance"], again["suggest_topup"]) == (50, 2)


async def test_a_training_estimate_counts_gpu_hours(caller: Caller) -> None:
    body = WHO | {
        "template_id": "lora-train",
        "scene": "model.train",
        "resolution": "sdxl",
        "priority": "standard",
        "gpu_hours": 1.51,
    }
    answer = (await caller.credits("POST", "/estimate", body, key=caller.key(new_task(), "estimate"))).json()
    assert answer["selected_cost"] == 120 + 30 + 31


async def test_the_ledger_pages_to_its_end_newest_first_and_filters_by_task(caller: Caller) -> None:
    tasks = [new_task() for _ in range(5)]
    for task in tasks:
        await caller.hold(task)
    seen: list[str | None] = []
    cursor: str | None = None
    while True:
        query = WHO | {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        path = "/ledger?" + "&".join(f"{name}={value}" for name, value in query.items())
        page = Ledger.model_validate((await caller.credits("GET", path)).json())
        assert len(page.entries) <= 2
        seen += [entry.task_id for entry in page.entries]
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == [*reversed(tasks), None], "every hold, then the grant that opened the account"

    path = f"/ledger?tenant_id={TENANT}&user_id={USER}&task_id={tasks[2]}"
    only = Ledger.model_validate((await caller.credits("GET", path)).json())
    assert [entry.task_id for entry in only.entries] == [tasks[2]]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "cursor=nonsense", "cursor=aGk6Mw=="])
async def test_a_bad_page_is_refused(caller: Caller, query: str) -> None:
    answer = await caller.credits("GET", f"/ledger?tenant_id={TENANT}&user_id={USER}&{query}")
    assert refusal(answer)[2] == "payload_invalid"


async def test_an_unknown_account_is_named(caller: Caller) -> None:
    caller.user_id = "user-unknown"
    answer = await caller.credits("GET", f"/balance?tenant_id={TENANT}&user_id=user-unknown")
    assert refusal(answer) == (404, "40401", "account_not_found")


async def test_the_scenes_scope_or_rollbacks_is_needed(caller: Caller) -> None:
    task = new_task()
    body = caller.hold_body(task)
    refused = await caller.credits("POST", "/pre-deduct", body, key=f"{task}:hold:1", scopes=["comfyui.model.train"])
    assert refusal(refused) == (403, "40302", "authorization_missing")
    for number, scope in enumerate(("comfyui.image.generate", "credits.rollback"), start=2):
        answer = await caller.credits("POST", "/pre-deduct", body, key=f"{task}:hold:{number}", scopes=[scope])
        assert answer.status_code == 200


async def test_a_bad_token_is_answered_401_and_leaves_the_key_unused(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    url = f"{simulators.credits_url}/api/v1/credits/pre-deduct"
    expired = simulators.tokens.made_for(TENANT, USER, valid_seconds=-1)
    for authorization in ("", "Bearer", "Bearer nonsense", f"Bearer {expired}"):
        headers = {"Authorization": authorization, "X-Idempotency-Key": f"{task}:hold:1"}
        assert (await caller.http.post(url, json=caller.hold_body(task), headers=headers)).status_code == 401
    assert (await caller.hold(task))["frozen_amount"] == 50


async def test_admin_routes_require_their_own_token(caller: Caller, simulators: Simulators) -> None:
    for url in (simulators.credits_url, simulators.comfyui_url):
        for headers in ({}, caller.headers()):
            answer = await caller.http.post(f"{url}/admin/faults", json={"kind": "drop"}, headers=headers)
            assert answer.status_code == 401
    assert await simulators.admin.credits.faults() == []


async def test_admins_open_accounts_by_a_ledger_entry(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.set_balance(70, "tenant-new", "user-new")
    caller.tenant_id, caller.user_id = "tenant-new", "user-new"
    assert (await caller.hold(new_task(), 70))["balance_after"] == 0
    assert (await simulators.admin.credits.balance_check()).ok
