"""The switchboard: each fault does what docs/simulators.md says, when and as often as configured."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from comfyui_temporal.contracts.comfyui import JobState
from comfyui_temporal.contracts.errors import JOB_CODES
from proof.simulators.admin_client import AdminRefused
from proof.simulators.admin_wire import FaultKind
from proof.simulators.serving import Simulators
from tests.simulators.platform import TENANT, USER, Caller, Receiver, new_task, refusal
from tests.waiting import comes_true, until


@pytest.mark.parametrize(("when", "jobs"), [("before", 0), ("after", 1), (None, 1)])
async def test_a_dropped_answer_closes_the_connection(
    caller: Caller, simulators: Simulators, when: str | None, jobs: int
) -> None:
    await simulators.admin.comfyui.fault("drop", route="submit_job", when=when)
    task = new_task()
    with pytest.raises(httpx.RemoteProtocolError):
        await caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1")
    assert len(await simulators.admin.comfyui.jobs(task)) == jobs
    again = await caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1")
    assert again.status_code == 202
    assert len(await simulators.admin.comfyui.jobs(task)) == 1
    seen = await simulators.admin.comfyui.requests_seen("submit_job", task)
    assert [(request.status, request.faults) for request in seen] == [(None, ["drop"]), (202, [])]
    assert [request.outcome for request in seen] == [["not_acted", "acted"], ["acted", "repeated"]][jobs]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "given", "status", "content"),
    [
        ("error", {}, 503, "Service Unavailable"),
        ("error", {"status": 500}, 500, "Service Unavailable"),
        ("html", {}, 502, "<html>"),
        ("garbage", {}, 200, "1e999"),
        ("answer", {"status": 418, "body": {"short": "and stout"}}, 418, "stout"),
        ("answer", {"status": 200, "body": "[not json"}, 200, "[not json"),
        ("answer", {"status": 302, "body": {}, "headers": {"Location": "http://127.0.0.1:1/"}}, 302, "{}"),
    ],
)
async def test_an_error_answer_is_sent_before_or_after_the_effect(
    caller: Caller, simulators: Simulators, when: str, kind: str, given: dict[str, Any], status: int, content: str
) -> None:
    await simulators.admin.credits.fault(kind, route="pre_deduct", when=when, **given)
    task = new_task()
    answer = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert answer.status_code == status
    assert content in answer.content.decode(errors="replace")
    assert len(await simulators.admin.credits.holds(task)) == (when == "after")
    again = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert again.status_code == 200
    assert len(await simulators.admin.credits.holds(task)) == 1


async def test_rate_limits_say_when_to_come_back(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("rate_limit", route="submit_job", seconds=7)
    task = new_task()
    answer = await caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1")
    assert refusal(answer) == (429, "42901", "rate_limited")
    assert answer.headers["retry-after"] == "7"


async def test_a_delayed_request_still_acts_after_its_caller_gave_up(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.fault("act_late", route="pre_deduct", seconds=0.4)
    task = new_task()
    began = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        await caller.http.post(
            f"{simulators.credits_url}/api/v1/credits/pre-deduct",
            json=caller.hold_body(task),
            headers=caller.headers(f"{task}:hold:1"),
            timeout=0.1,
        )
    assert await simulators.admin.credits.holds(task) == [], "not yet"
    repeat = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert time.monotonic() - began >= 0.4, "the repeat waits for the first in flight"
    [hold] = await simulators.admin.credits.holds(task)
    assert repeat.json()["pre_deduct_id"] == hold.pre_deduct_id


async def test_a_delay_before_lets_a_repeat_overtake(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.fault("delay", route="pre_deduct", seconds=0.4)
    task = new_task()
    key = f"{task}:hold:1"
    slow = asyncio.create_task(caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=key))

    async def is_delayed() -> bool:
        return (await simulators.admin.credits.faults())[0].hits == 1

    await until(is_delayed, "the delayed request")
    fast = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=key)
    assert not slow.done()
    assert (await slow).json() == fast.json()


async def test_an_altered_answer_is_altered_once_and_its_effect_is_not(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.fault("alter", route="pre_deduct", fields={"frozen_amount": -3})
    task = new_task()
    first = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    again = await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert (first.json()["frozen_amount"], again.json()["frozen_amount"]) == (-3, 50)


async def test_faults_hit_the_nth_of_what_they_match(caller: Caller, simulators: Simulators) -> None:
    mine, other = new_task(), new_task()
    fault = await simulators.admin.credits.fault("error", route="pre_deduct", task_id=mine, nth=2)
    statuses = []
    for number, task in enumerate((mine, other, mine, mine), start=1):
        key = f"{task}:hold:{number}"
        statuses.append((await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=key)).status_code)
    assert statuses == [200, 200, 503, 200]
    [after] = await simulators.admin.credits.faults()
    assert (after.fault_id, after.hits) == (fault.fault_id, 1)


async def test_times_and_removal_end_a_fault(caller: Caller, simulators: Simulators) -> None:
    twice = await simulators.admin.comfyui.fault("error", route="list_gpus", times=2)
    assert [(await caller.comfyui("GET", "/gpus")).status_code for _ in range(3)] == [503, 503, 200]
    await simulators.admin.comfyui.remove_fault(twice)
    for_ever = await simulators.admin.comfyui.fault("error", route="list_gpus", times=None)
    assert [(await caller.comfyui("GET", "/gpus")).status_code for _ in range(3)] == [503, 503, 503]
    await simulators.admin.comfyui.remove_fault(for_ever)
    assert (await caller.comfyui("GET", "/gpus")).status_code == 200


async def test_a_schedule_is_repeated_by_its_seed(caller: Caller, simulators: Simulators) -> None:
    async def statuses(seed: int) -> list[int]:
        await simulators.admin.reset()
        kinds = [FaultKind.ERROR, FaultKind.RATE_LIMIT]
        await simulators.admin.credits.schedule(seed, 0.5, kinds, route="balance")
        path = f"/balance?tenant_id={TENANT}&user_id={USER}"
        return [(await caller.credits("GET", path)).status_code for _ in range(30)]

    first = await statuses(1)
    assert first == await statuses(1)
    assert first != await statuses(2)
    assert set(first) == {200, 429, 503}


async def test_our_own_routes_can_be_missing_and_trainings_then_start_by_themselves(
    caller: Caller, simulators: Simulators
) -> None:
    await simulators.admin.comfyui.fault("not_offered")
    task = new_task()
    training_id = (await caller.create(task))["training_id"]
    job_id = (await caller.submit(task))["job_id"]
    for method, path in (
        ("POST", f"/training/{training_id}/start"),
        ("POST", f"/training/{training_id}/cancel"),
        ("POST", f"/jobs/{job_id}/cancel"),
        ("GET", "/gpus"),
    ):
        answer = await caller.comfyui(method, path, {} if method == "POST" else None, key=f"{task}:x{path}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    await simulators.admin.advance(60)
    assert (await caller.training(training_id))["training_status"] == "completed"
    assert (await caller.job(job_id))["job_status"] == "delivery"


async def test_keys_can_be_ignored(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.credits.fault("ignore_keys", route="pre_deduct")
    task = new_task()
    for _ in range(2):
        await caller.credits("POST", "/pre-deduct", caller.hold_body(task), key=f"{task}:hold:1")
    assert len(await simulators.admin.credits.holds(task)) == 2


async def test_the_ledger_can_lag_and_be_plain(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    path = f"/ledger?tenant_id={TENANT}&user_id={USER}&task_id={task}"
    lag = await simulators.admin.credits.fault("ledger_lag", seconds=60)
    await caller.hold(task)
    assert (await caller.credits("GET", path)).json()["entries"] == []
    await simulators.admin.advance(61)
    assert len((await caller.credits("GET", path)).json()["entries"]) == 1
    await simulators.admin.credits.remove_fault(lag)

    await simulators.admin.credits.fault("plain_ledger")
    entries = (await caller.credits("GET", path)).json()["entries"]
    assert len(entries) == 2, "the filter is not known: the grant too"
    assert "kind" not in entries[0] and "frozen_change" not in entries[0]


@pytest.mark.parametrize("code", sorted(JOB_CODES))
async def test_a_job_can_fail_with_each_code(caller: Caller, simulators: Simulators, code: str) -> None:
    await simulators.admin.comfyui.fault("job_fail", code=code, retryable=True, node="KSampler", at=0.3)
    job_id = (await caller.submit(new_task()))["job_id"]
    await simulators.admin.advance(60)
    state = JobState.model_validate(await caller.job(job_id))
    assert state.error_details is not None and state.error_details.code == code
    assert (state.job_status, state.stage_progress, state.result_urls) == ("processing", 30, [])


async def test_error_details_can_be_a_text(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("job_fail", message="it broke", as_text=True)
    job_id = (await caller.submit(new_task()))["job_id"]
    await simulators.admin.advance(60)
    assert (await caller.job(job_id))["error_details"] == "it broke"


async def test_a_stalled_job_keeps_its_gpu_until_it_goes_on(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("job_stall", at=0.5)
    task = new_task()
    job_id = (await caller.submit(task))["job_id"]
    await simulators.admin.advance(3600)
    [seen] = await simulators.admin.comfyui.jobs(task)
    assert (seen.phase, seen.holds_gpu, seen.state["stage_progress"]) == ("working", True, 50)
    before = await caller.job(job_id)
    await simulators.admin.advance(3600)
    assert await caller.job(job_id) == before, "a stalled job shows nothing new"
    await simulators.admin.comfyui.act(job_id, "resume")
    await simulators.admin.advance(60)
    assert (await caller.job(job_id))["job_status"] == "delivery"


async def test_a_job_can_hang_in_the_queue(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("job_stall", while_queued=True)
    task = new_task()
    job_id = (await caller.submit(task))["job_id"]
    await simulators.admin.advance(3600)
    assert (await caller.job(job_id))["job_status"] == "queued"
    assert not (await simulators.admin.comfyui.jobs(task))[0].holds_gpu
    await simulators.admin.comfyui.act(job_id, "resume")
    await simulators.admin.advance(60)
    assert (await caller.job(job_id))["job_status"] == "delivery"


async def test_a_slow_job_takes_its_factor(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(1)
    await simulators.admin.comfyui.fault("job_slow", factor=3)
    job_id = (await caller.submit(new_task()))["job_id"]
    await simulators.admin.advance(192 + 3 * 288 - 5)
    assert (await caller.job(job_id))["job_status"] == "processing"
    await simulators.admin.advance(10)
    assert (await caller.job(job_id))["job_status"] == "delivery"


async def test_a_forgotten_job_is_404_and_holds_nothing(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("job_forget")
    task = new_task()
    job_id = (await caller.submit(task))["job_id"]
    await simulators.admin.advance(60)
    assert refusal(await caller.comfyui("GET", f"/jobs/{job_id}")) == (404, "40401", "job_not_found")
    [seen] = await simulators.admin.comfyui.jobs(task)
    assert (seen.phase, seen.holds_gpu, seen.is_over) == ("forgotten", False, True)


async def test_an_instant_jobs_delivery_arrives_before_its_202(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    await simulators.admin.set_speed(1)
    await simulators.admin.comfyui.fault("job_instant")
    await simulators.admin.comfyui.fault("delay", route="submit_job", when="after", seconds=0.5)
    task = new_task()
    submitting = asyncio.create_task(caller.submit(task))
    await comes_true(lambda: receiver.statuses(task) == ["delivery"], "the delivery")
    assert not submitting.done()
    assert (await submitting)["job_status"] == "delivery"


async def test_the_next_job_can_be_given_a_length(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(1)
    await simulators.admin.comfyui.fault("job_duration", seconds=20)
    answer = await caller.submit(new_task())
    assert answer["estimated_time"] == pytest.approx(20 / 60, abs=0.001)
    await simulators.admin.advance(21)
    assert (await caller.job(answer["job_id"]))["job_status"] == "delivery"


async def test_a_job_can_report_a_wrong_cost(caller: Caller, simulators: Simulators) -> None:
    lie = {"reply": {"estimated_cost": 999}, "fields": {"actual_cost": -5}}
    await simulators.admin.comfyui.fault("job_lie", **lie)
    answer = await caller.submit(new_task())
    assert answer["estimated_cost"] == 999
    assert (await caller.job(answer["job_id"]))["actual_cost"] is None
    await simulators.admin.advance(60)
    assert (await caller.job(answer["job_id"]))["actual_cost"] == -5


async def test_a_job_can_be_refused_at_submit(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.fault("job_refuse", code="model_missing", message="no such checkpoint")
    task = new_task()
    answer = await caller.comfyui("POST", "/jobs", caller.job_body(task), key=f"{task}:submit:1")
    assert refusal(answer) == (422, "42202", "job_refused")
    assert answer.json()["detail"]["error_details"]["code"] == "model_missing"
    assert await simulators.admin.comfyui.jobs(task) == []
    assert (await simulators.admin.comfyui.faults())[0].hits == 1


async def test_gpu_hours_can_grow_while_a_training_runs(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    await simulators.admin.comfyui.fault("job_gpu_hours", gpu_hours=9, at=0.5)
    task = new_task()
    training_id = (await caller.create(task, epochs=10))["training_id"]
    await caller.start(task, training_id)
    await comes_true(lambda: "completed" in receiver.statuses(task), "the end")
    assert {body["gpu_hours"] for body in receiver.genuine(task)} == {1.5, 9}
    assert (await caller.training(training_id))["gpu_hours_used"] == 9


async def test_a_bad_order_is_refused_with_what_is_wrong(simulators: Simulators) -> None:
    with pytest.raises(AdminRefused, match="no job or training"):
        await simulators.admin.comfyui.act("job-unknown", "stall")
    with pytest.raises(ValueError, match="at"):
        await simulators.admin.comfyui.fault("job_fail", at=7)
