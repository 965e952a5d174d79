"""No large input leaves a run stuck: datasets, replies, callbacks (pitfalls 6, 39, 43).

`books.ended` asserts that no workflow task failed.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, GiveBackResult, give_back_id_of
from comfyui_temporal.contracts.size_budget import MAX_START_BYTES, PAYLOAD_BYTES, json_bytes
from comfyui_temporal.contracts.tasks import TaskStatus, TrainingTask
from tests.conftest import unique
from tests.workflows.books import check_histories, ended, ended_without_its_run, runs_of
from tests.workflows.platform import Handle, Platform, task_id_of
from tests.workflows.test_continue_as_new import FORGED, OUTPUT, model, started, tick

pytestmark = pytest.mark.timeout(600)

PATH_CHARACTERS = 200
MANY = pytest.param(10_000, marks=pytest.mark.slow)
RUNNING = {"training_status": "running", "training_stage": "training"}


def dataset_of(platform: Platform, count: int, path_characters: int = PATH_CHARACTERS) -> tuple[Path, list[str]]:
    """A dataset of so many files with paths so long; their names."""
    folder = platform.folder / "datasets" / "tenant-demo" / f"{count}-files-{path_characters}"
    half = path_characters // 2
    names = [f"{n:05}".ljust(half, "d") + "/" + "f" * (path_characters - half - 5) + ".txt" for n in range(count)]
    if not folder.exists():
        for name in names:
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(b"x")
    return folder, names


async def largest_payload(handle: Handle) -> int:
    """Of a run's whole history."""
    sizes = [0]
    async for event in handle.fetch_history_events():
        for field, attributes in event.ListFields():
            if field.name.endswith("_attributes"):
                sizes += [len(part.data) for name in ("input", "result") for part in _payloads(attributes, name)]
    return max(sizes)


def _payloads(attributes: Any, name: str) -> Any:
    return getattr(attributes, name).payloads if name in attributes.DESCRIPTOR.fields_by_name else ()


async def preempted_and_resumed(platform: Platform, handle: Handle, attempts: int) -> str:
    """Every attempt but the last is preempted, each of several runs; the last training's id."""
    training_id = await started(platform, handle)
    for attempt in range(1, attempts):
        await tick(platform, handle, training_id, 1, **RUNNING)
        await tick(platform, handle, training_id, 2, **RUNNING)
        details = {"code": "gpu_preempted", "message": "gone"}
        await platform.callback(handle, training_id=training_id, sequence=3, **RUNNING, error_details=details)

        async def is_next(attempt: int = attempt) -> bool:
            return bool((await platform.progress(handle))["attempts"] == attempt + 1)

        await platform.until(is_next, seconds=60)
        training_id = await started(platform, handle)
    return training_id


@pytest.mark.parametrize("count", [300, MANY])
async def test_a_large_dataset_goes_through_four_attempts_and_many_runs(direct_platform: Platform, count: int) -> None:
    """Seen with 10,000 files: continue-as-new failed forever, renewal and settlement stopped."""
    folder, names = dataset_of(direct_platform, count)
    before = dict(direct_platform.policy)
    direct_platform.policy |= {"continue_as_new_signals": 2, "retry_after_seconds": [0.05, 0.05, 0.05]}
    dataset = {"dataset_id": "large", "source_uri": folder.as_uri(), "files": names}
    handle = await direct_platform.start_training(dataset=dataset)
    await direct_platform.until(lambda: _is_created(direct_platform, handle), seconds=300)
    training_id = await preempted_and_resumed(direct_platform, handle, 4)
    await tick(direct_platform, handle, training_id, 1, **RUNNING)
    await direct_platform.callback(handle, **model(training_id, gpu_hours_used=1.0))
    direct_platform.policy = before
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged, ending.result["attempts"]) == (TaskStatus.COMPLETED, 120, 4)
    runs = await runs_of(direct_platform, handle)
    assert len(runs) >= 4
    sizes = [await largest_payload(run) for run in runs]
    assert max(sizes[1:]) < 32 * 1024, "only the first run's input holds the list"
    sent = await direct_platform.simulators.admin.comfyui.requests_seen("create_training", task_id_of(handle))
    assert [request.status for request in sent] == [202] * 4


async def _is_created(platform: Platform, handle: Handle) -> bool:
    return bool(await platform.simulators.admin.comfyui.jobs(task_id_of(handle)))


@pytest.mark.slow
async def test_a_list_as_large_as_temporal_takes_works_to_the_end(direct_platform: Platform) -> None:
    folder, names = dataset_of(direct_platform, 10_000, 206)
    task = direct_platform.training(dataset={"dataset_id": "large", "source_uri": folder.as_uri(), "files": names})
    while json_bytes(TrainingTask.model_validate(task)) > MAX_START_BYTES:
        names.pop()
    assert json_bytes(TrainingTask.model_validate(task)) > MAX_START_BYTES - 300, "as large as may be"
    before = dict(direct_platform.policy)
    direct_platform.policy |= {"continue_as_new_signals": 2}
    handle = await direct_platform.start(task)
    await direct_platform.until(lambda: _is_created(direct_platform, handle), seconds=300)
    training_id = await preempted_and_resumed(direct_platform, handle, 2)
    direct_platform.policy = before
    await direct_platform.callback(handle, **model(training_id, gpu_hours_used=1.0))
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, pytest.param(9_000, marks=pytest.mark.slow)])
async def test_a_terminated_run_with_a_large_dataset_is_given_back(direct_platform: Platform, count: int) -> None:
    """Seen with 9,000 files and two attempts: the orphans were too large to pass on, hold and training stayed open."""
    folder, names = dataset_of(direct_platform, count)
    dataset = {"dataset_id": "large", "source_uri": folder.as_uri(), "files": names}
    handle = await direct_platform.start_training(dataset=dataset)
    await direct_platform.until(lambda: _is_created(direct_platform, handle), seconds=300)
    await preempted_and_resumed(direct_platform, handle, 2)
    await direct_platform.until_settled(handle)
    await handle.terminate("by a test")
    task_id = task_id_of(handle)
    giving: Any = await direct_platform.client.start_workflow(
        GIVE_BACK_WORKFLOW,
        GiveBackOrder(task_id=task_id),
        id=give_back_id_of(task_id),
        task_queue=direct_platform.task_queue,
        result_type=GiveBackResult,
    )
    result: GiveBackResult = await giving.result()
    await check_histories(direct_platform, giving)
    async for event in giving.fetch_history_events():
        for payload in event.activity_task_completed_event_attributes.result.payloads:
            assert len(payload.data) < 16 * 1024, "the orphans are passed on without the list"
    assert result.outcome == "given_back"
    assert (await ended_without_its_run(direct_platform, task_id)).status is TaskStatus.FAILED


# Replies of a megabyte


def estimate_of(cost: int) -> str:
    """Nearly a megabyte, whose numbers take three times as much when they are written again."""
    return f'{{"selected_cost": {cost}, "calculation_basis": [{",".join(["1e15"] * 200_000)}]}}'


async def test_an_estimate_of_a_megabyte_is_read_and_not_kept(quick_platform: Platform) -> None:
    task_id = unique("image")
    credits = quick_platform.simulators.admin.credits
    await credits.fault("answer", route="estimate", task_id=task_id, body=estimate_of(24), when="after")
    handle = await quick_platform.start_image(task_id=task_id)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


@pytest.mark.parametrize("gpu_type", [None, "wanted"])
async def test_a_list_of_20_000_kinds_of_gpu_is_read_and_not_kept(
    quick_platform: Platform, gpu_type: str | None
) -> None:
    """It takes nearly a megabyte; the requested type is the last."""
    rows = [f'{{"gpu_type":"t{n:05}","total":1e5,"available":1e5}}' for n in range(20_000)]
    body = f'[{",".join(rows)},{{"gpu_type":"wanted","total":1,"available":0}}]'
    assert len(body) < 1024 * 1024
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.set_gpus("wanted", 4)
    tenant = unique("tenant")
    await comfyui.fault("answer", route="list_gpus", tenant_id=tenant, body=body, times=None)
    await quick_platform.simulators.admin.credits.set_balance(1_000, tenant, "user-demo")
    folder = quick_platform.folder / "datasets" / tenant / "faces"
    folder.mkdir(parents=True)
    (folder / "1.txt").write_text("one")
    fields = {"gpu_type": gpu_type} if gpu_type else {}
    handle = await quick_platform.start_training(
        tenant_id=tenant, dataset={"dataset_id": "faces", "source_uri": folder.as_uri()}, **fields
    )
    ending = await ended(quick_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert await largest_payload(handle) < 16 * 1024


# Callbacks of a quarter of a megabyte


@pytest.mark.slow
async def test_a_training_completes_after_hundreds_of_the_largest_callbacks(direct_platform: Platform) -> None:
    """Past the gateway: 100 while the call that made the training is out, 200 once it is followed."""
    task = direct_platform.training()
    slow = await direct_platform.simulators.admin.comfyui.fault(
        "delay", route="create_training", task_id=task["task_id"], when="after", seconds=5
    )
    handle = await direct_platform.start(task)
    await direct_platform.until_hit("create_training", slow)
    training_id = (await direct_platform.job(handle)).run_id
    metrics = {f"metric {n:05}": 1e-5 * n for n in range(8_000)}
    limit = asyncio.Semaphore(8)

    async def send(sequence: int) -> None:
        body = {"training_id": training_id, "sequence": sequence, "stage_progress": sequence / 10, **RUNNING}
        output = {"model_path": "file:///m", "metrics": metrics}
        async with limit:
            await direct_platform.callback(handle, **body, output=output, error_details=None)

    assert 200_000 < len(json.dumps(metrics)) < 256 * 1024
    await asyncio.gather(*(send(sequence) for sequence in range(1, 101)))
    assert await started(direct_platform, handle) == training_id
    for sequence in range(101, 301):
        await send(sequence)
    await direct_platform.callback(handle, **model(training_id, gpu_hours_used=1.0))
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert (ending.status, ending.result["output"]) == (TaskStatus.COMPLETED, OUTPUT)
    runs = await runs_of(direct_platform, handle)
    carried = [await _input_bytes(run) for run in runs[1:]]
    assert carried == [] or max(carried) < PAYLOAD_BYTES


async def _input_bytes(run: Handle) -> int:
    async for event in run.fetch_history_events(page_size=1):
        return len(event.workflow_execution_started_event_attributes.input.payloads[0].data)
    raise AssertionError("a run without a first event")
