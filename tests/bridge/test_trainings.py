"""A training through the bridge: queued until started, chunk by chunk, resumed, cancelled."""

from __future__ import annotations

import hashlib
import io
import itertools
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from bridge.orders import DatasetOrder
from bridge.task_files import FOLDER
from comfyui_temporal.contracts.comfyui import DatasetSnapshot
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, USER, BridgePlatform, Json
from tests.bridge.test_servers import until_running
from tests.conftest import unique

MODELS = {"checkpoints": ["v1-5-pruned.safetensors"]}


def picture(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (color, 90, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def training_body(bridge: BridgePlatform, *, pictures: int = 4, **fields: Any) -> Json:
    """A valid request. Its dataset's snapshot is in storage, as the task's worker writes it."""
    task_id = unique("task")
    folder = bridge.folder / "store" / "snapshots" / task_id / "cats" / "files"
    folder.mkdir(parents=True)
    files = []
    for n in range(pictures):
        for name, content in ((f"cat-{n}.png", picture(40 * n)), (f"cat-{n}.txt", f"a cat, {n}".encode())):
            (folder / name).write_bytes(content)
            files.append({"path": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return {
        "task_id": task_id,
        "tenant_id": TENANT,
        "user_id": USER,
        "base_model": "base",
        "dataset": {"dataset_id": "cats", "snapshot_uri": folder.as_uri() + "/", "files": files},
        "hyperparameters": {"epochs": 3, "batch_size": 2, "learning_rate": 0.0005},
        "priority": "standard",
        "callback_url": f"{bridge.receiver.url}/callbacks/comfyui/{task_id}",
        **fields,
    }


async def created(bridge: BridgePlatform, **fields: Any) -> Json:
    body = training_body(bridge, **fields)
    answer = await bridge.post("/training", body)
    assert answer.status_code == 202, answer.text
    accepted: Json = answer.json()
    return accepted | {"task_id": body["task_id"]}


async def state_of(bridge: BridgePlatform, training_id: str) -> Json:
    answer = await bridge.get(f"/training/{training_id}")
    assert answer.status_code == 200, answer.text
    state: Json = answer.json()
    return state


async def post_action(bridge: BridgePlatform, training_id: str, action: str) -> Json:
    answer = await bridge.post(f"/training/{training_id}/{action}", {})
    assert answer.status_code == 200, answer.text
    state: Json = answer.json()
    return state


async def ended(bridge: BridgePlatform, training_id: str, seconds: float = 60) -> Json:
    async def over() -> Json | None:
        state = await state_of(bridge, training_id)
        return state if state["training_status"] in ("completed", "failed") else None

    state = await bridge.until(over, seconds=seconds)
    assert state is not None
    return state


def file_of(address: str) -> Path:
    return Path(unquote(urlsplit(address).path))


async def has_end_callback(bridge: BridgePlatform, task_id: str) -> bool:
    return bool(set(bridge.receiver.statuses(task_id)) & {"completed", "failed"})


@pytest.mark.slow
async def test_a_dataset_of_ten_thousand_long_paths_is_trained_on(bridge: BridgePlatform, native: NativeServer) -> None:
    """The list has 3 MB, more than a Temporal input may have. Most of its files are not for training."""
    await native.admin.set(models=MODELS)
    body = training_body(bridge)
    notes = [{"path": f"{n:05}".ljust(200, "x") + ".md", "size_bytes": 1, "sha256": "0" * 64} for n in range(9_990)]
    body["dataset"]["files"] += notes
    async with bridge.gpu(native):
        key = unique("key")
        answers = [await bridge.post("/training", body, key=key) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 202], answers[0].text
        assert answers[0].json() == answers[1].json()
        training_id = answers[0].json()["training_id"]
        await post_action(bridge, training_id, "start")
        state = await ended(bridge, training_id)
    assert state["error_details"] is None, state
    assert state["checkpoint"]["step"] == 6, "four pictures, as without the notes"


async def test_a_training_runs_chunk_by_chunk(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        accepted = await created(bridge)
        assert accepted["training_status"] == "queued"
        assert await native.admin.submissions() == []
        await post_action(bridge, accepted["training_id"], "start")
        state = await ended(bridge, accepted["training_id"])
        assert state["error_details"] is None, state
        await bridge.until(lambda: has_end_callback(bridge, accepted["task_id"]))
    # Four pictures, two at a time, three epochs: three chunks of two steps, each continuing the one before.
    assert len(await native.admin.runs()) == 3
    assert state["checkpoint"]["epoch"] == 3
    assert state["checkpoint"]["step"] == 6
    assert file_of(state["checkpoint"]["uri"]).name == "epoch-0003-r1_6_steps_00001_.safetensors"
    assert file_of(state["output"]["model_path"]).read_bytes() == file_of(state["checkpoint"]["uri"]).read_bytes()
    assert state["gpu_hours_used"] > 0

    bodies = sorted(bridge.receiver.genuine(accepted["task_id"]), key=lambda body: body["sequence"])
    stages = [body["training_stage"] for body in bodies if body["training_stage"]]
    assert [key for key, _ in itertools.groupby(stages)] == ["data_ingest", "training", "evaluating", "publishing"]
    statuses = [body["training_status"] for body in bodies]
    assert statuses.count("checkpointing") == 3
    training = [body["stage_progress"] for body in bodies if body["training_stage"] == "training"]
    assert training == sorted(training)
    lines = [line["message"] for body in bodies for line in body.get("log", [])]
    assert any(line.startswith("epoch 2/3 step 4") for line in lines), lines


@pytest.mark.parametrize("step_seconds", [36_000.0, -36_000.0])
async def test_a_servers_clock_that_is_set_is_not_billed_as_gpu_hours(
    bridge: BridgePlatform, native: NativeServer, step_seconds: float
) -> None:
    await native.admin.set(models=MODELS, clock_step_seconds=step_seconds)
    began = time.monotonic()
    async with bridge.gpu(native):
        accepted = await created(bridge)
        await post_action(bridge, accepted["training_id"], "start")
        state = await ended(bridge, accepted["training_id"])
    assert state["error_details"] is None, state
    assert 0 < state["gpu_hours_used"] * 3600 < time.monotonic() - began
    assert state["checkpoint"]["gpu_hours_used"] == state["gpu_hours_used"] == state["gpu_hours"]


async def test_a_training_that_is_not_started_holds_nothing_and_can_be_cancelled(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        accepted = await created(bridge)
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None
        cancelled = await post_action(bridge, accepted["training_id"], "cancel")
        assert (cancelled["training_status"], cancelled["error_details"]["code"]) == ("failed", "cancelled")
        restarted = await post_action(bridge, accepted["training_id"], "start")
        assert restarted["training_status"] == "failed"
    assert len(await native.admin.submissions()) == 1


async def test_cancelling_a_running_training_stops_its_prompt(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(models=MODELS, hold=True)
    async with bridge.gpu(native):
        accepted = await created(bridge)
        await post_action(bridge, accepted["training_id"], "start")
        await until_running(bridge, native)
        await post_action(bridge, accepted["training_id"], "cancel")

        async def interrupted() -> bool:
            return [run.outcome for run in await native.admin.runs()] == ["interrupted"]

        await bridge.until(interrupted)
        state = await state_of(bridge, accepted["training_id"])
    assert state["error_details"]["code"] == "cancelled"
    assert state["output"] is None


@pytest.mark.slow
async def test_a_training_is_resumed_from_its_last_checkpoint_only_by_its_own_tenant(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer]
) -> None:
    first, second = servers
    for server in servers:
        await server.admin.set(models=MODELS)
    async with bridge.gpu(first):
        accepted = await created(bridge)
        await post_action(bridge, accepted["training_id"], "start")
        checkpoint = (await ended(bridge, accepted["training_id"]))["checkpoint"]["uri"]
    theirs = training_body(bridge, resume_from=checkpoint, tenant_id="tenant-other", user_id="user-other")
    refused = await bridge.post("/training", theirs, tenant="tenant-other", user="user-other")
    assert refused.status_code == 422
    assert "resume_from" in refused.json()["detail"]["fields"][0]
    # On another server, which does not have the checkpoint.
    async with bridge.gpu(second):
        hyperparameters = {"epochs": 5, "batch_size": 2, "learning_rate": 0.0005}
        resumed = await created(bridge, resume_from=checkpoint, hyperparameters=hyperparameters)
        await post_action(bridge, resumed["training_id"], "start")
        state = await ended(bridge, resumed["training_id"])
    assert state["error_details"] is None, state
    assert (state["checkpoint"]["epoch"], state["checkpoint"]["step"]) == (5, 10)
    assert len(await second.admin.runs()) == 2


@pytest.mark.slow
async def test_losing_a_server_during_a_training_costs_one_chunk(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer]
) -> None:
    first, second = servers
    for server in servers:
        await server.admin.set(models=MODELS)
    try:
        async with bridge.gpu(first):
            accepted = await created(bridge)
            await post_action(bridge, accepted["training_id"], "start")

            async def has_checkpoint() -> bool:
                state = await state_of(bridge, accepted["training_id"])
                return state["checkpoint"] is not None

            await bridge.until(has_checkpoint)
            await first.kill()
            async with bridge.gpu(second):
                state = await ended(bridge, accepted["training_id"])
        assert state["error_details"] is None, state
        assert state["checkpoint"]["step"] == 6
        assert 1 <= len(await second.admin.runs()) <= 2
    finally:
        await first.restart()


async def test_a_training_keeps_its_server_from_its_dataset_to_its_chunk(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    body = training_body(bridge)
    whole = DatasetOrder(training_id="training-1", snapshot=DatasetSnapshot.model_validate(body["dataset"]))
    changed = body["dataset"]["files"][0] | {"sha256": "0" * 64}
    snapshot = DatasetSnapshot.model_validate(body["dataset"] | {"files": [changed]})
    refused = DatasetOrder(training_id="training-2", snapshot=snapshot)
    async with bridge.gpu(native, taken_seconds=20.0) as worker:
        with pytest.raises(ApplicationError):
            await ActivityEnvironment().run(worker.activities.ingest_dataset, refused)
        assert await worker.slot.take("another") is None, "a dataset that is refused has no chunk"
        worker.slot.begin("another")
        worker.slot.end()
        await ActivityEnvironment().run(worker.activities.ingest_dataset, whole)
        assert await worker.slot.take("another") == "the server is held by another job"
        assert await worker.slot.take("training-1") is None
        worker.slot.begin("training-1")
        worker.slot.end()
        assert not worker.slot.is_held


@pytest.mark.parametrize("is_erased", [False, True])
async def test_a_dataset_that_a_restarted_server_has_lost_is_put_there_again(
    bridge: BridgePlatform, native: NativeServer, is_erased: bool
) -> None:
    await native.admin.set(models=MODELS, hold=True)
    async with bridge.gpu(native):
        accepted = await created(bridge)
        await post_action(bridge, accepted["training_id"], "start")
        await until_running(bridge, native)
        dataset = native.folder / "input" / FOLDER / accepted["training_id"]
        if is_erased:
            for file in dataset.rglob("*.*"):
                file.write_bytes(b"")
        else:
            shutil.rmtree(dataset)
        await native.admin.forget()
        await until_running(bridge, native, runs_before=1)
        files = [file for file in dataset.rglob("*.*") if file.stat().st_size]
        assert len(files) == 8
        await native.admin.set(hold=False)
        state = await ended(bridge, accepted["training_id"])
    assert state["error_details"] is None, state
    assert state["checkpoint"]["step"] == 6


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"base_model": "flux"}, "base_model: 'flux' is not offered; offered are base, sdxl"),
        ({"hyperparameters": {"epochs": 0, "batch_size": 1, "learning_rate": 0.1}}, "hyperparameters.epochs"),
        (
            {"hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.1, "warmup": 3}},
            "hyperparameters.warmup: template 'lora-train' does not accept it",
        ),
        ({"gpu_type": "h100"}, "gpu_type: no server has 'h100'"),
        (
            {"dataset": {"dataset_id": "cats", "snapshot_uri": "file:///etc/", "files": []}},
            "dataset.snapshot_uri: is not below the task's own folder",
        ),
        ({"resume_from": "file:///etc/passwd"}, "resume_from: is no checkpoint"),
        ({"callback_url": "http://169.254.169.254/"}, "callback_url"),
    ],
)
async def test_an_invalid_training_is_refused_with_the_field(bridge: BridgePlatform, fields: Json, named: str) -> None:
    answer = await bridge.post("/training", training_body(bridge, **fields))
    assert answer.status_code == 422, answer.text
    assert named in "; ".join(answer.json()["detail"]["fields"])


@pytest.mark.parametrize("escape", ["..", "%2e%2e", "%2E%2e", "%252e%252e", "..%2f..", "..\\.."])
async def test_a_training_reads_its_own_tasks_snapshot_and_no_other(bridge: BridgePlatform, escape: str) -> None:
    body, other = training_body(bridge), training_body(bridge)
    snapshot = body["dataset"]["snapshot_uri"]
    uris = (
        other["dataset"]["snapshot_uri"],
        snapshot.replace(f"/{body['task_id']}/", f"/{body['task_id']}/{escape}/{other['task_id']}/"),
        snapshot.replace("/snapshots/", f"/snapshots/{escape}/snapshots/"),
    )
    for uri in uris:
        refused = await bridge.post("/training", body | {"dataset": body["dataset"] | {"snapshot_uri": uri}})
        assert refused.status_code == 422, refused.text
        assert "dataset.snapshot_uri" in refused.json()["detail"]["fields"][0]
    checkpoint = (
        f"{bridge.bridge.storage.url}/checkpoints/{TENANT}/{escape}/tenant-other/epoch-1-r1_6_steps_.safetensors"
    )
    refused = await bridge.post("/training", body | {"resume_from": checkpoint})
    assert refused.status_code == 422 and "resume_from" in refused.json()["detail"]["fields"][0]
    file = body["dataset"]["files"][0] | {"path": f"{escape}/cat-0.png"}
    refused = await bridge.post("/training", body | {"dataset": body["dataset"] | {"files": [file]}})
    assert refused.status_code == 422 and "dataset.files" in refused.json()["detail"]["fields"][0]


async def test_a_dataset_that_was_changed_ends_the_training(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        accepted = await created(bridge)
        changed = bridge.folder / "store" / "snapshots" / accepted["task_id"] / "cats" / "files" / "cat-1.png"
        changed.write_bytes(picture(250))
        await post_action(bridge, accepted["training_id"], "start")
        state = await ended(bridge, accepted["training_id"])
    assert state["error_details"]["code"] == "workflow_invalid"
    assert "cat-1.png" in state["error_details"]["message"]
    assert await native.admin.submissions() == []
