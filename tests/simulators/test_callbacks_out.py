"""Callbacks: signed, sent once per change, repeated on contract §2's schedule, and every fault they can have."""

from __future__ import annotations

import time

import pytest

from comfyui_temporal.contracts.comfyui import JobCallback
from proof.simulators.serving import Simulators
from tests.simulators.platform import Caller, Receiver, new_task
from tests.waiting import comes_true, until

ALL_FIVE = ["processing"] * 4 + ["delivery"]


async def _delivered(receiver: Receiver, task: str) -> None:
    await comes_true(lambda: "delivery" in receiver.statuses(task), "the delivery callback")


async def test_a_job_sends_a_signed_callback_per_step_with_what_get_answers(caller: Caller, receiver: Receiver) -> None:
    task = new_task()
    job_id = (await caller.submit(task))["job_id"]
    await _delivered(receiver, task)
    arrivals = receiver.of(task)
    assert not any(arrival.flaw for arrival in arrivals)
    assert receiver.statuses(task) == ALL_FIVE
    assert len({arrival.webhook_id for arrival in arrivals}) == 5
    received = [JobCallback.model_validate(arrival.body) for arrival in arrivals]
    assert [callback.stage_progress for callback in received] == [0, 25, 50, 75, 100]
    assert [callback.sequence for callback in received] == sorted({callback.sequence for callback in received})
    times = [callback.occurred_at for callback in received if callback.occurred_at]
    assert times == sorted(times)
    state = await caller.job(job_id)
    assert {name: arrivals[-1].body[name] for name in state} == state


async def test_a_failure_and_a_cancel_send_callbacks_too(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    await simulators.admin.set_speed(1)
    for action, code in (("fail", "node_error"), ("preempt", "gpu_preempted")):
        task = new_task()
        job_id = (await caller.submit(task))["job_id"]
        await simulators.admin.comfyui.act(job_id, action, code="node_error", node="KSampler")
        await comes_true(lambda task=task: bool(receiver.genuine(task)), "the callback")  # type: ignore[misc]
        assert receiver.genuine(task)[-1]["error_details"]["code"] == code


@pytest.mark.parametrize(
    ("status", "phase"), [(401, "refused"), (404, "refused"), (413, "refused"), (200, "delivered")]
)
async def test_callbacks_with_a_final_answer_are_not_repeated(
    caller: Caller, simulators: Simulators, receiver: Receiver, status: int, phase: str
) -> None:
    task = new_task()
    receiver.answers[task] = [status] * 5
    await caller.submit(task)
    await _delivered(receiver, task)
    await simulators.admin.advance(2 * 24 * 3600)
    callbacks = await simulators.admin.comfyui.callbacks(task)
    await comes_true(lambda: len(receiver.of(task)) == 5, "all five")
    assert {(callback.phase, callback.attempts, callback.last_status) for callback in callbacks} == {(phase, 1, status)}


async def test_a_503_is_repeated_on_schedule_with_the_same_id_and_a_new_signature(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    await simulators.admin.comfyui.fault("callback_withhold", task_id=task, callback_status="processing", times=None)
    receiver.answers[task] = [503] * 7
    await caller.submit(task)
    await comes_true(lambda: len(receiver.of(task)) == 1, "the first attempt")
    for number, seconds in enumerate((1, 5, 30, 120, 600, 3600, 3600), start=1):
        await _attempted(simulators, task, number)
        due_at = (await simulators.admin.comfyui.callbacks(task))[-1].due_at
        rest = (due_at - (await simulators.admin.comfyui.clock()).now).total_seconds()
        assert seconds - 0.5 < rest <= seconds, f"attempt {number + 1}"
        await simulators.admin.advance(seconds)
        await comes_true(lambda number=number: len(receiver.of(task)) == number + 1, "the next")  # type: ignore[misc]

    arrivals = receiver.of(task)
    assert len({arrival.webhook_id for arrival in arrivals}) == 1
    assert len({arrival.raw for arrival in arrivals}) == 1
    assert not any(arrival.flaw for arrival in arrivals)
    assert all(abs(int(arrival.timestamp) - time.time()) < 60 for arrival in arrivals), "wall clock, not the moved one"


async def _attempted(simulators: Simulators, task: str, times: int) -> None:
    """Wait until the outbox has written what came of an attempt."""

    async def is_written() -> bool:
        sent = [seen for seen in await simulators.admin.comfyui.callbacks(task) if seen.phase != "withheld"]
        return bool(sent) and sent[0].attempts == times

    await until(is_written, f"attempt {times}")


async def test_a_callback_is_given_up_after_a_day(caller: Caller, simulators: Simulators, receiver: Receiver) -> None:
    task = new_task()
    await simulators.admin.comfyui.fault("callback_withhold", task_id=task, callback_status="processing", times=None)
    receiver.answers[task] = [500] * 99
    await caller.submit(task)
    await comes_true(lambda: len(receiver.of(task)) == 1, "the first attempt")
    await _attempted(simulators, task, 1)
    await simulators.admin.advance(25 * 3600)
    await _attempted(simulators, task, 2)
    assert [seen.phase for seen in await simulators.admin.comfyui.callbacks(task)][-1] == "given_up"


async def test_withheld_callbacks_come_only_when_released(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    await simulators.admin.comfyui.fault("callback_withhold", task_id=task, times=None)
    job_id = (await caller.submit(task))["job_id"]
    await simulators.admin.advance(60)
    assert (await caller.job(job_id))["job_status"] == "delivery"
    assert {seen.phase for seen in await simulators.admin.comfyui.callbacks(task)} == {"withheld"}
    assert receiver.of(task) == []
    await simulators.admin.comfyui.release_callbacks()
    await _delivered(receiver, task)


@pytest.mark.parametrize("same_id", [True, False])
async def test_duplicates(caller: Caller, simulators: Simulators, receiver: Receiver, same_id: bool) -> None:
    task = new_task()
    fault = {"callback_status": "delivery", "copies": 2, "same_id": same_id}
    await simulators.admin.comfyui.fault("callback_duplicate", task_id=task, **fault)
    await caller.submit(task)
    await comes_true(lambda: receiver.statuses(task).count("delivery") == 3, "three deliveries")
    deliveries = [arrival for arrival in receiver.of(task) if arrival.body["job_status"] == "delivery"]
    assert len({arrival.raw for arrival in deliveries}) == 1
    assert len({arrival.webhook_id for arrival in deliveries}) == (1 if same_id else 3)


async def test_a_reordered_callback_arrives_after_a_newer_one(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    await simulators.admin.comfyui.fault("callback_reorder", task_id=task, nth=4, seconds=600)
    await caller.submit(task)
    await comes_true(lambda: len(receiver.of(task)) == 5, "all five")
    assert receiver.statuses(task) == ["processing"] * 3 + ["delivery", "processing"]
    sequences = [body["sequence"] for body in receiver.genuine(task)]
    assert sequences[-1] < sequences[-2]


async def test_garbage_and_forged_callbacks_arrive_in_addition_to_genuine_ones(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    await simulators.admin.comfyui.fault("callback_garbage", task_id=task, nth=1, body=f'[broken "{task}"')
    await simulators.admin.comfyui.fault("callback_forge", task_id=task, nth=2, copies=2)
    await caller.submit(task)
    await comes_true(lambda: len(receiver.of(task)) == 8, "five true, one garbage, two forged")
    arrivals = receiver.of(task)
    assert [bool(arrival.flaw) for arrival in arrivals].count(True) == 2
    assert [arrival.raw for arrival in arrivals].count(f'[broken "{task}"'.encode()) == 1


async def test_a_late_callback_waits_on_the_simulated_clock(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    await simulators.admin.comfyui.fault("callback_late", task_id=task, callback_status="delivery", seconds=3600)
    await caller.submit(task)
    await simulators.admin.advance(60)
    await comes_true(lambda: receiver.statuses(task) == ALL_FIVE[:4], "all but the last")
    await simulators.admin.advance(3601)
    await _delivered(receiver, task)


async def test_an_unreachable_receiver_delays_no_other_task(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    lost, task = new_task(), new_task()
    await caller.submit(lost, callback_url=f"http://127.0.0.1:1/callbacks/comfyui/{lost}")
    await caller.submit(task)
    await _delivered(receiver, task)
    await comes_true(lambda: len(receiver.of(task)) == 5, "all five")
    assert {seen.phase for seen in await simulators.admin.comfyui.callbacks(lost)} == {"pending"}
