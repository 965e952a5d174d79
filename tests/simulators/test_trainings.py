"""Trainings: started by a call, stages, checkpoints, files, resuming (contract §3)."""

from __future__ import annotations

import itertools
import json
import re
import struct
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import pytest

from comfyui_temporal.contracts.comfyui import TrainingAccepted, TrainingState
from proof.simulators.serving import Simulators
from tests.simulators.platform import Caller, Receiver, new_task, refusal
from tests.waiting import comes_true


def _weights(uri: str) -> dict[str, Any]:
    """The header of the safetensors file that a uri names."""
    raw = Path(url2pathname(uri.removeprefix("file://"))).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    assert header["lora.weight"]["data_offsets"][1] == len(raw) - 8 - length
    return header


async def test_a_training_waits_for_start_and_holds_no_gpu(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(1)
    task = new_task()
    created = await caller.create(task, epochs=10)
    accepted = TrainingAccepted.model_validate(created)
    assert (accepted.training_status, accepted.estimated_time, accepted.gpu_hours) == ("queued", 45, 1.5)

    await simulators.admin.advance(24 * 3600)
    [seen] = await simulators.admin.comfyui.jobs(task)
    assert (seen.phase, seen.holds_gpu) == ("idle", False)
    before = await caller.training(accepted.training_id)
    assert (before["training_status"], before["estimated_time"]) == ("queued", 45)

    await caller.start(task, accepted.training_id)
    await simulators.admin.advance(45 * 60 + 1)
    assert TrainingState.model_validate(await caller.training(accepted.training_id)).has_succeeded()


async def test_stages_follow_each_other_and_running_alternates_with_checkpointing(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    training_id = (await caller.create(task, epochs=3))["training_id"]
    await caller.start(task, training_id)
    await comes_true(lambda: "completed" in receiver.statuses(task), "the completed callback")

    received = sorted(receiver.genuine(task), key=lambda body: body["sequence"])
    stages = [body["training_stage"] for body in received]
    assert list(dict.fromkeys(stages)) == ["data_ingest", "training", "evaluating", "publishing"]
    within = [body["training_status"] for body in received if body["training_stage"] == "training"]
    assert within == ["running", "checkpointing"] * 3
    for before, after in itertools.pairwise(received):
        assert after["gpu_hours_used"] >= before["gpu_hours_used"]
        if after["training_stage"] == before["training_stage"]:
            assert after["stage_progress"] >= before["stage_progress"]
    assert received[-1]["gpu_hours_used"] == received[-1]["gpu_hours"] == 0.45


async def test_the_loss_falls_and_checkpoints_and_model_exist(
    caller: Caller, simulators: Simulators, receiver: Receiver
) -> None:
    task = new_task()
    training_id = (await caller.create(task, epochs=6))["training_id"]
    await caller.start(task, training_id)
    await comes_true(lambda: "completed" in receiver.statuses(task), "the completed callback")

    received = sorted(receiver.genuine(task), key=lambda body: body["sequence"])
    lines = [line["message"] for body in received for line in body["log"]]
    losses = [float(found.group(1)) for line in lines if (found := re.search(r"epoch .* loss=([\d.]+)", line))]
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    checkpoints = {body["checkpoint"]["epoch"]: body["checkpoint"] for body in received if body["checkpoint"]}
    assert list(checkpoints) == [1, 2, 3, 4, 5, 6]
    for epoch, checkpoint in checkpoints.items():
        assert _weights(checkpoint["uri"])["__metadata__"]["epoch"] == str(epoch)
    output = TrainingState.model_validate(received[-1]).output
    assert output is not None and output.metrics is not None and output.model_path is not None
    assert _weights(output.model_path)["__metadata__"]["base_model"] == "base"
    assert output.metrics["loss"] == losses[-1]


async def test_a_resumed_training_does_what_is_left(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(1)
    task = new_task()
    training_id = (await caller.create(task, epochs=10))["training_id"]
    await caller.start(task, training_id)
    await simulators.admin.advance(30 * 60)
    await simulators.admin.comfyui.act(training_id, "preempt")
    lost = await caller.training(training_id)
    assert (lost["training_status"], lost["error_details"]["code"]) == ("failed", "gpu_preempted")
    checkpoint = lost["checkpoint"]
    assert 0 < checkpoint["gpu_hours_used"] <= lost["gpu_hours_used"] < lost["gpu_hours"]

    left = 10 - checkpoint["epoch"]
    resumed = await caller.create(task, epochs=10, resume_from=checkpoint["uri"])
    assert resumed["gpu_hours"] == pytest.approx(left * 0.15)
    assert resumed["estimated_time"] < 45
    await caller.start(task, resumed["training_id"])
    await simulators.admin.advance(45 * 60)
    state = await caller.training(resumed["training_id"])
    assert (state["training_status"], state["checkpoint"]["epoch"]) == ("completed", 10)


async def test_many_epochs_have_ten_checkpoints(caller: Caller, simulators: Simulators, receiver: Receiver) -> None:
    task = new_task()
    training_id = (await caller.create(task, epochs=1000))["training_id"]
    await caller.start(task, training_id)
    await comes_true(lambda: "completed" in receiver.statuses(task), "the completed callback")
    assert receiver.statuses(task).count("checkpointing") == 10


async def test_start_twice_starts_once_and_cancel_ends_an_idle_one(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(1)
    task = new_task()
    training_id = (await caller.create(task))["training_id"]
    first = await caller.start(task, training_id)
    await simulators.admin.advance(600)
    again = await caller.start(task, training_id)
    assert again["training_status"] == "running"
    assert again["estimated_time"] == pytest.approx(first["estimated_time"], abs=0.01)

    idle = (await caller.create(task))["training_id"]
    answer = (await caller.comfyui("POST", f"/training/{idle}/cancel", {}, key=f"{task}:cancel:1")).json()
    assert (answer["training_status"], answer["error_details"]["code"]) == ("failed", "cancelled")
    assert (await caller.start(task, idle))["error_details"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hyperparameters": {"epochs": 0, "batch_size": 1, "learning_rate": 0.1}}, "hyperparameters.epochs"),
        ({"hyperparameters": {"epochs": 1, "batch_size": 1}}, "hyperparameters.learning_rate"),
        ({"base_model": "unheard-of"}, "base_model"),
        ({"gpu_type": "abacus"}, "gpu_type"),
        ({"resume_from": "file:///nowhere"}, "resume_from"),
    ],
)
async def test_what_cannot_be_trained_is_refused_by_field(caller: Caller, change: dict[str, Any], named: str) -> None:
    task = new_task()
    answer = await caller.comfyui("POST", "/training", caller.training_body(task) | change, key=f"{task}:submit:1")
    assert refusal(answer) == (422, "42201", "payload_invalid")
    assert answer.json()["detail"]["fields"][0].startswith(named)


async def test_another_tenants_checkpoint_is_no_checkpoint(caller: Caller, simulators: Simulators) -> None:
    task = new_task()
    training_id = (await caller.create(task))["training_id"]
    await simulators.admin.comfyui.fault("callback_withhold", times=None)
    await caller.start(task, training_id)
    await simulators.admin.advance(3600)
    uri = (await caller.training(training_id))["checkpoint"]["uri"]
    caller.tenant_id, caller.user_id = "tenant-other", "user-other"
    other = new_task()
    body = caller.training_body(other, resume_from=uri)
    assert refusal(await caller.comfyui("POST", "/training", body, key=f"{other}:submit:1"))[2] == "payload_invalid"


async def test_gpus_of_a_type_that_is_not_there_are_not_listed(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.comfyui.set_gpus("h100", 0)
    listed = {row["gpu_type"]: row for row in (await caller.comfyui("GET", "/gpus")).json()}
    assert set(listed) == {"rtx4090", "a100"}
    assert listed["a100"] == {"gpu_type": "a100", "total": 2, "available": 2, "accelerated_wait": 0}
