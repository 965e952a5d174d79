"""Idempotency keys: the first answer again for the same key and body (contract §4)."""

from __future__ import annotations

import asyncio

from proof.simulators.serving import Simulators
from tests.simulators.platform import Caller, new_task, refusal


async def test_a_repeat_gives_the_first_answer_and_acts_once(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    body = caller.hold_body(task)
    reordered = dict(reversed(list(body.items())))
    first = await caller.credits("POST", "/pre-deduct", body, key=f"{task}:hold:1")
    await caller.hold(new_task())
    again = await caller.credits("POST", "/pre-deduct", reordered, key=f"{task}:hold:1")

    assert again.json() == first.json(), "also the balance of then"
    assert len(await simulators.admin.credits.holds(task)) == 1
    seen = await simulators.admin.credits.requests_seen("pre_deduct", task)
    assert [request.outcome for request in seen] == ["acted", "repeated"]


async def test_the_same_key_with_another_body_is_a_conflict(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    await caller.credits("POST", "/pre-deduct", caller.hold_body(task, 50), key=f"{task}:hold:1")
    other = await caller.credits("POST", "/pre-deduct", caller.hold_body(task, 51), key=f"{task}:hold:1")
    assert refusal(other) == (409, "40901", "idempotency_conflict")
    assert [hold.amount for hold in await simulators.admin.credits.holds(task)] == [50]


async def test_the_same_key_for_another_job_is_a_conflict(caller: Caller) -> None:
    task = new_task()
    jobs = [(await caller.submit(task))["job_id"] for _ in range(2)]
    assert (await caller.comfyui("POST", f"/jobs/{jobs[0]}/cancel", {}, key=f"{task}:cancel:1")).status_code == 200
    other = await caller.comfyui("POST", f"/jobs/{jobs[1]}/cancel", {}, key=f"{task}:cancel:1")
    assert refusal(other)[2] == "idempotency_conflict"


async def test_keys_are_scoped_by_tenant(caller: Caller) -> None:
    task = new_task()
    mine = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    caller.tenant_id, caller.user_id = "tenant-other", "user-other"
    theirs = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert mine.json()["pre_deduct_id"] != theirs.json()["pre_deduct_id"]


async def test_a_request_that_its_token_does_not_allow_leaves_its_key_free(caller: Caller) -> None:
    task, key = new_task(), "key of a token without scope"
    refused = await caller.comfyui("POST", "/jobs", caller.job_body(task), key=key, scopes=["task.read"])
    assert refusal(refused)[2] == "authorization_missing"
    assert (await caller.comfyui("POST", "/jobs", caller.job_body(task), key=key)).status_code == 202


async def test_a_repeat_waits_for_the_first_in_flight(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("act_late", route="submit_job", seconds=0.3)
    task = new_task()
    answers = await asyncio.gather(
        *(caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1") for _ in range(3))
    )
    assert {answer.json()["job_id"] for answer in answers} == {answers[0].json()["job_id"]}
    assert len(await simulators.admin.comfyui.jobs(task)) == 1
    assert all(answer.elapsed.total_seconds() >= 0.3 for answer in answers), "no repeat overtakes the first"


async def test_definite_refusals_are_kept_and_others_free_the_key(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    await simulators.admin.credits.set_balance(10)
    poor = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    await simulators.admin.credits.set_balance(100)
    kept = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert refusal(poor) == refusal(kept) == (403, "40302", "insufficient_balance")

    await simulators.admin.credits.fault("error", route="pre_deduct", status=503)
    for expected in (503, 200):
        answer = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:2")
        assert answer.status_code == expected


async def test_keys_are_kept_30_days(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    first = await caller.submit(task)
    days = 24 * 3600
    await simulators.admin.advance(29 * days)
    again = await caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1")
    assert again.json()["job_id"] == first["job_id"]
    await simulators.admin.advance(2 * days)
    after = await caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1")
    assert after.json()["job_id"] != first["job_id"]


async def test_a_post_without_a_key_is_refused(caller: Caller) -> None:
    answer = await caller.comfyui("POST", "/jobs", caller.job_body(new_task()))
    assert answer.json()["detail"]["fields"] == ["X-Idempotency-Key: Field required"]
