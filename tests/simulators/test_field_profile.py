"""The platform's own credits service as it was seen (contract §4, field): where it differs from our contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime

import httpx
import pytest
import pytest_asyncio

from comfyui_temporal.contracts.credits import Estimate, HoldReply, Ledger
from proof.simulators.admin_client import AdminRefused
from proof.simulators.credits_profile import FIELD
from proof.simulators.serving import Simulators, running_simulators
from tests.simulators.platform import TENANT, USER, Caller, Json, Receiver, new_task, refusal
from tests.waiting import until

WHO = {"tenant_id": TENANT, "user_id": USER}
FIRST = 100_000


@pytest_asyncio.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Simulators]:
    async with running_simulators(tmp_path_factory.mktemp("field"), credits_profile=FIELD) as simulators:
        yield simulators


@pytest_asyncio.fixture
async def simulators(served: Simulators) -> Simulators:
    await served.admin.credits.reset()
    return served


@pytest_asyncio.fixture
async def caller(simulators: Simulators, receiver: Receiver, http: httpx.AsyncClient) -> Caller:
    return Caller(simulators, receiver, http)


async def _entries(caller: Caller, **query: str) -> list[Json]:
    """The entries as the wire shows them, newest first, without the grant that opened the account."""
    path = "/ledger?" + "&".join(f"{name}={value}" for name, value in (WHO | query).items())
    answer = (await caller.credits("GET", path)).json()
    assert "cursor" not in answer, "there are no pages"
    Ledger.model_validate(answer)
    entries: list[Json] = answer["entries"]
    return [entry for entry in entries if entry["task_id"] is not None]


async def _shown(caller: Caller) -> list[tuple[str, int, int]]:
    """`reason`, `change`, `balance_after`, oldest first."""
    return [(entry["reason"], entry["change"], entry["balance_after"]) for entry in reversed(await _entries(caller))]


async def test_a_repeated_pre_deduct_is_a_second_hold(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    key = f"{task}:pre_deduct:1"
    answers = [await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=key) for _ in range(2)]
    assert len({answer.json()["pre_deduct_id"] for answer in answers}) == 2
    admin = simulators.admin.credits
    assert [hold.phase for hold in await admin.holds(task)] == ["open", "open"]
    assert (await admin.account()).frozen == 100
    assert (await admin.balance_check()).ok, "the doubled hold stands in the books as what it is"
    assert {request.outcome for request in await admin.requests_seen("pre_deduct", task)} == {"acted"}


async def test_a_repeated_charge_is_a_second_charge(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    body = WHO | {"template_id": "text-to-image", "task_id": task, "amount": 24, "priority": "standard"}
    for _ in range(2):
        answer = await caller.credits("POST", "/charge", body | {"reason": "delivered"}, key=f"{task}:charge:1")
        assert answer.json()["change"] == -24
    assert await simulators.admin.credits.charged(task) == 48
    assert await _shown(caller) == [("delivered", -24, FIRST - 24), ("delivered", -24, FIRST - 48)]


async def test_a_repeat_does_not_wait_for_the_first(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.fault("act_late", route="pre_deduct", seconds=0.5)
    task = new_task()
    key = f"{task}:pre_deduct:1"
    slow = asyncio.create_task(caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=key))

    async def is_under_way() -> bool:
        return (await simulators.admin.credits.faults())[0].hits == 1

    await until(is_under_way, "the first request")
    fast = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=key)
    assert not slow.done()
    assert fast.json()["pre_deduct_id"] != (await slow).json()["pre_deduct_id"]


async def test_neither_key_nor_token_is_required(caller: Caller, simulators: Simulators) -> None:
    task, url = new_task(), f"{simulators.credits_url}/api/v1/credits"
    hold = (await caller.http.post(f"{url}/pre-deduct", json=caller.hold_body(task))).json()
    body = caller.commit_body(task, hold["pre_deduct_id"], 24)
    assert (await caller.http.post(f"{url}/commit", json=body)).status_code == 200
    assert (await caller.http.get(f"{url}/balance", params=WHO)).json()["balance"] == FIRST - 24
    assert len((await caller.http.get(f"{url}/ledger", params=WHO)).json()["entries"]) == 4
    without_user = await caller.http.get(f"{url}/balance")
    assert refusal(without_user)[2] == "payload_invalid"


async def test_another_tenants_hold_is_not_found(caller: Caller, simulators: Simulators) -> None:
    hold = await caller.hold(new_task())
    other = {"tenant_id": "tenant-other", "user_id": "user-other"}
    url = f"{simulators.credits_url}/api/v1/credits/cancel"
    answer = await caller.http.post(url, json=caller.cancel_body(hold["pre_deduct_id"]) | other)
    assert refusal(answer)[2] == "pre_deduct_not_found"


@pytest.mark.parametrize("cost", [24, 50])
async def test_the_ledger_shows_a_commit_by_its_rest_and_its_cost(
    caller: Caller, simulators: Simulators, cost: int
) -> None:
    task = new_task()
    hold = await caller.hold(task, 50)
    answer = (await caller.commit(task, hold["pre_deduct_id"], cost)).json()
    assert (answer["frozen_amount"], answer["balance_after"]) == (cost, FIRST - cost)
    rest = [("refund_pre_deduct", 50 - cost, FIRST - cost)] if cost < 50 else []
    assert await _shown(caller) == [("pre_deduct", -50, FIRST - 50), *rest, ("commit", -cost, FIRST - cost)]
    assert await simulators.admin.credits.charged(task) == cost, "the books inside know the truth"


async def test_the_ledger_shows_a_cancel_by_its_reason_and_no_ids(caller: Caller) -> None:
    task = new_task()
    hold = await caller.hold(task, 50)
    answer = (await caller.cancel_hold(task, hold["pre_deduct_id"])).json()
    assert answer["balance_after"] == str(FIRST)
    assert await _shown(caller) == [("pre_deduct", -50, FIRST - 50), ("cancel", 50, FIRST)]
    for entry in await _entries(caller):
        assert set(entry) == {"ledger_id", "task_id", "change", "balance_after", "reason", "created_at"}
        assert entry["task_id"] == task
    assert len({entry["ledger_id"] for entry in await _entries(caller)}) == 2


async def test_the_ledger_has_no_pages_and_no_filter(caller: Caller) -> None:
    first, second = new_task(), new_task()
    for task in (first, second):
        hold = await caller.hold(task, 50)
        await caller.commit(task, hold["pre_deduct_id"], 20)
    assert {entry["task_id"] for entry in await _entries(caller, task_id=first)} == {first, second}
    newest = await _entries(caller, limit="2")
    assert [(entry["task_id"], entry["reason"]) for entry in newest] == [
        (second, "commit"),
        (second, "refund_pre_deduct"),
    ]
    assert newest == await _entries(caller, limit="2", cursor="whatever"), "and no cursor leads further"


async def test_a_hold_never_expires_and_can_be_committed_later(caller: Caller, simulators: Simulators) -> None:
    task, admin = new_task(), simulators.admin.credits
    hold = await caller.hold(task, expire_in=60)
    assert datetime.fromisoformat(hold["expire_at"]).tzinfo is not None
    await simulators.admin.advance(7_200)
    with pytest.raises(AdminRefused, match="do not expire"):
        await admin.expire_hold(hold["pre_deduct_id"])
    assert [seen.phase for seen in await admin.holds(task)] == ["open"]
    assert (await caller.commit(task, hold["pre_deduct_id"], 50)).status_code == 200
    assert refusal(await caller.commit(task, hold["pre_deduct_id"], 50))[2] == "pre_deduct_already_processed"
    assert (await admin.balance_check()).ok


async def test_a_hold_can_be_cancelled_by_hand(caller: Caller, simulators: Simulators) -> None:
    task, admin = new_task(), simulators.admin.credits
    hold = await caller.hold(task)
    for _ in range(2):
        await admin.cancel_hold(hold["pre_deduct_id"])
    assert [seen.phase for seen in await admin.holds(task)] == ["cancelled"]
    assert (await _shown(caller))[-1] == ("cancel", 50, FIRST)


async def test_a_hold_reports_no_quota(caller: Caller) -> None:
    hold = await caller.hold(new_task())
    assert hold["quota_snapshot"]["template_quota"] is None
    assert HoldReply.model_validate(hold).frozen_amount == 50


async def test_an_estimate_ignores_gpu_hours(caller: Caller) -> None:
    body = WHO | {"template_id": "lora-train", "scene": "model.train", "resolution": "base", "priority": "standard"}
    for hours in ({}, {"gpu_hours": 9.0}):
        answer = (await caller.credits("POST", "/estimate", body | hours, key=f"{new_task()}:estimate:1")).json()
        assert Estimate.model_validate(answer).selected_cost == 120


async def test_what_the_balance_does_not_cover_is_403(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.set_balance(10)
    task = new_task()
    held = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:pre_deduct:1")
    assert refusal(held) == (403, "40302", "insufficient_balance")
    body = WHO | {"template_id": "upscale", "task_id": task, "amount": 11, "priority": "standard", "reason": "rest"}
    charged = await caller.credits("POST", "/charge", body, key=f"{task}:charge:1")
    assert refusal(charged) == (403, "40302", "insufficient_balance")


async def test_a_commit_can_act_and_answer_500(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.fault("error", route="commit", status=500, when="after")
    task = new_task()
    hold = (await caller.hold(task, 50))["pre_deduct_id"]
    assert (await caller.commit(task, hold, 24)).status_code == 500
    assert await simulators.admin.credits.charged(task) == 24
    assert refusal(await caller.commit(task, hold, 24))[2] == "pre_deduct_already_processed"
