"""What operators see of a run: its step table, its attributes in lists, its details, and which task goes first.

`books.ended` asserts for every run that each activity and timer has a summary.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import INPUT_MEMO, ImageTask, TaskStatus, input_sha256_of
from store import TaskStore
from tests.workflows.books import PATCH_MARKER, ended
from tests.workflows.payers import new_payer, until_started
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of

RECORD = re.compile("[56] (record|wait: record)")
WAIT = "4 wait: callback, poll, deadline"
OPENING = ["0 accept", "1 price check", "1 submit", "3 hold"]
TRAINING = ["0 price check", "0 snapshot dataset", "1 create", "3 estimate"]
FORGED = ("job_runs_out",)
IMAGE_STEPS = {
    "claim": "0 accept",
    "submit_job": "1 submit",
    "estimate": "1 price check",
    "pre_deduct": "3 hold",
    "heard": "4 ticks heard",
    "get_job": "4 poll",
    "commit": "5 commit",
    "cancel_job": "5 cancel job",
    "cancel_hold": "5 cancel hold",
    "look": "5 read the task's row",
    "write": "6 record",
}
"""The label of each activity in step table 1 (docs/architecture.md), by its type."""
TRAINING_STEPS: dict[str, tuple[str, ...]] = {
    "claim": ("0 accept",),
    "list_gpus": ("0 check GPUs",),
    "snapshot": ("0 snapshot dataset",),
    "create_training": ("1 create",),
    "estimate": ("0 price check", "3 estimate"),
    "pre_deduct": ("3 hold",),
    "start_training": ("3 start",),
    "heard": ("4 ticks heard",),
    "get_training": ("4 poll",),
    "write": ("5 record",),
    "commit": ("6 commit",),
    "cancel_training": ("6 cancel job",),
    "cancel_hold": ("6 cancel hold",),
    "look": ("6 read the task's row",),
    "delete_snapshot": ("6 delete snapshot",),
}
"""The label of each activity in step table 2."""


async def steps(handle: Handle) -> list[tuple[str, str]]:
    """What the run did, in order: (activity type, or `timer`; summary); calls made locally too."""
    done: list[tuple[str, str]] = []
    async for event in handle.fetch_history_events():
        if event.HasField("activity_task_scheduled_event_attributes"):
            name = event.activity_task_scheduled_event_attributes.activity_type.name
        elif event.marker_recorded_event_attributes.marker_name == PATCH_MARKER:
            continue
        elif event.HasField("marker_recorded_event_attributes"):
            [local] = event.marker_recorded_event_attributes.details["data"].payloads
            name = json.loads(local.data)["activity_type"]
        elif event.HasField("timer_started_event_attributes"):
            name = "timer"
        else:
            continue
        done.append((name, json.loads(event.user_metadata.summary.data)))
    return done


async def read(handle: Handle) -> list[str]:
    """The run as its step table: every label but the event writes, repeated ones once."""
    summaries = [summary for _name, summary in await steps(handle) if not RECORD.match(summary)]
    return [summary for summary, _again in groupby(summaries)]


async def finish(platform: Platform, handle: Handle) -> None:
    """Let the task's job or training end well now."""
    await platform.simulators.admin.comfyui.act((await until_started(platform, handle)).run_id, "finish")


# The step tables


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_labels_that_runs_have(name: str) -> None:
    text = (Path(__file__).parents[2] / name).read_text()
    image, training = text[text.index("`1 ") :].split("`0 price check`", 1)
    for part, labels in ((image, set(IMAGE_STEPS.values())), (training, set(chain(*TRAINING_STEPS.values())))):
        named = re.findall(r"`(\d [a-z' ]+)`", part)
        assert named and set(named) <= labels, named


async def test_an_image_reads_as_its_step_table(quick_platform: Platform) -> None:
    handle = await quick_platform.start_image()
    await ended(quick_platform, handle)
    assert await read(handle) == [*OPENING, WAIT, "5 commit"]


async def test_a_polled_and_retried_image_reads_as_its_step_table(quick_platform: Platform) -> None:
    quick_platform.policy["retry_after_seconds"] = [0.05]
    task = quick_platform.image(options={"poll_after_seconds": 0.1})
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("callback_withhold", task_id=task["task_id"], times=None)
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    await comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], nth=2)
    handle = await quick_platform.start(task)

    async def looked() -> bool:
        """A job that is over at its first poll is not looked for: the second one waits until it was."""
        return len(await comfyui.jobs(task["task_id"])) == 2 and "4 ticks heard" in await read(handle)

    await quick_platform.until(looked)
    await finish(quick_platform, handle)
    await ended(quick_platform, handle)
    kept = "1 wait: submit (keep the hold meanwhile)"  # no timer where that of the pause still runs
    seen = [step for step in await read(handle) if step not in (WAIT, "4 ticks heard", "4 poll", kept)]
    assert seen == [*OPENING, "5 cancel job", "4 wait: next attempt", "1 price check", "1 submit", "5 commit"]
    assert {WAIT, "4 ticks heard", "4 poll"} <= set(await read(handle))


async def test_a_cancelled_image_reads_as_its_step_table(quick_platform: Platform) -> None:
    task = quick_platform.image()
    await quick_platform.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"])
    handle = await quick_platform.start(task)
    await until_started(quick_platform, handle)
    await quick_platform.until_settled(handle)
    await quick_platform.cancel(handle)
    await ended(quick_platform, handle)
    read_so = await read(handle)
    assert read_so[:5] == [*OPENING, WAIT]
    assert sorted(read_so[5:7]) == ["5 cancel hold", "5 cancel job"], "side by side"
    assert read_so[7:] == ["5 read the task's row"]


async def test_a_training_reads_as_its_step_table(quick_platform: Platform) -> None:
    handle = await quick_platform.start_training()
    await ended(quick_platform, handle)
    assert await read(handle) == [
        *("0 accept", "0 check GPUs", *TRAINING, "3 hold", "3 start", "3 wait: start (keep the hold meanwhile)"),
        *(WAIT, "6 commit", "6 delete snapshot"),
    ]


async def test_a_training_that_waits_before_it_starts_says_for_what(quick_platform: Platform) -> None:
    opens = datetime.now(UTC) + timedelta(seconds=0.5)
    handle = await quick_platform.start_training(
        max_credits=None,
        window={"not_before": opens.isoformat()},
        options={"confirm_within_seconds": 0.3},
    )
    ending = await ended(quick_platform, handle)
    assert ending.code == "price_not_confirmed"
    seen = await read(handle)
    assert seen[:-3] == [
        *("0 accept", "0 wait: the window opens", "0 check GPUs"),
        *(*TRAINING, "3 wait: the payer confirms"),
    ]
    assert seen[-3:] == ["6 cancel job", "6 read the task's row", "6 delete snapshot"]


async def test_each_call_of_a_training_has_its_rows_label(quick_platform: Platform) -> None:
    """Also where a local try is followed by a visible call."""
    payer = await new_payer(quick_platform)
    task = payer.training(max_credits=1, options={"poll_after_seconds": 0.1})
    comfyui, credits = (quick_platform.service_of(route) for route in ("list_gpus", "estimate"))
    for service, route in ((comfyui, "list_gpus"), (credits, "estimate")):
        await service.fault("error", route=route, tenant_id=payer.tenant_id, times=3)
    handle = await quick_platform.start(task)

    async def is_waiting() -> bool:
        return bool((await quick_platform.progress(handle))["confirmation"])

    await quick_platform.until(is_waiting)
    await handle.execute_update("confirm_price", {"max_credits": 1_000})
    await ended(quick_platform, handle)
    for name, summary in await steps(handle):
        assert name == "timer" or summary in TRAINING_STEPS[name]
    names = [name for name, _summary in await steps(handle)]
    assert names.count("list_gpus") == 2, "a local try, and the visible call"
    summaries = [summary for name, summary in await steps(handle) if name == "estimate"]
    assert summaries == ["0 price check", "0 price check", "3 estimate"], "a local try, and the visible call"


async def test_each_call_of_an_image_has_its_rows_label(quick_platform: Platform) -> None:
    quick_platform.policy["retry_after_seconds"] = [0.05]
    task = quick_platform.image(options={"poll_after_seconds": 0.1})
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("callback_withhold", task_id=task["task_id"], times=None)
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    handle = await quick_platform.start(task)
    await ended(quick_platform, handle)
    seen = await steps(handle)
    for name, summary in seen:
        assert name == "timer" or IMAGE_STEPS[name] == summary
    assert {name for name, _summary in seen} >= {*IMAGE_STEPS} - {"cancel_hold", "look", "heard"}


# Lists


async def until_listed(platform: Platform, handle: Handle, **attributes: str | None) -> None:
    """Wait until Temporal's visibility has the run under these search attributes, and under no others' values."""
    terms = [f"{name} = '{value}'" if value else f"{name} IS NULL" for name, value in attributes.items()]
    query = " AND ".join([f"WorkflowId = '{handle.id}'", "ExecutionStatus != 'ContinuedAsNew'", *terms])

    async def listed() -> bool:
        return (await platform.client.count_workflows(query)).count == 1

    await platform.until(listed)


async def test_an_image_is_found_by_its_attributes_as_they_change(direct_platform: Platform) -> None:
    fixed = {"priority": "accelerated", "template_id": "upscale"}
    handle = await direct_platform.start_image(**fixed)
    job_id = (await until_started(direct_platform, handle)).run_id
    who = {"TaskId": task_id_of(handle), "TenantId": "tenant-demo", "UserId": "user-demo"}
    what = {"Scene": "image.generate", "TemplateId": "upscale", "TaskPriority": "accelerated"}
    await until_listed(direct_platform, handle, **who, **what, TaskStatus="queued", TaskStage="queued")
    await direct_platform.callback(handle, job_id=job_id, job_status="processing", sequence=1)
    await until_listed(direct_platform, handle, **who, **what, TaskStatus="running", TaskStage="processing")
    await direct_platform.callback(
        handle, job_id=job_id, job_status="delivery", sequence=2, result_urls=["https://example.org/1.png"]
    )
    await ended(direct_platform, handle, exempt=FORGED)
    await until_listed(direct_platform, handle, **who, **what, TaskStatus="completed", TaskStage="delivery")


async def test_a_training_is_found_by_its_attributes_as_they_change(direct_platform: Platform) -> None:
    handle = await direct_platform.start_training(max_credits=None)
    await until_listed(direct_platform, handle, Scene="model.train", TaskStatus="queued", TaskStage=None)
    await direct_platform.until(lambda: is_created(direct_platform, handle))
    await handle.execute_update("confirm_price", {"max_credits": 1_000})
    training_id = (await until_started(direct_platform, handle)).run_id
    running = {"training_id": training_id, "training_status": "running"}
    for sequence, stage in enumerate(("data_ingest", "training"), start=1):
        await direct_platform.callback(handle, **running, training_stage=stage, sequence=sequence)
        await until_listed(direct_platform, handle, TaskStatus="running", TaskStage=stage)
    await direct_platform.cancel(handle)
    await ended(direct_platform, handle)
    await until_listed(direct_platform, handle, TaskStatus="cancelled", TaskStage="training")


async def is_created(platform: Platform, handle: Handle) -> bool:
    return bool((await platform.progress(handle))["confirmation"])


async def test_the_memo_is_the_inputs_hash_for_every_starter(quick_platform: Platform) -> None:
    task = quick_platform.image(extras={"seed": 7})
    handle = await quick_platform.start(task)
    await ended(quick_platform, handle)
    memo = await (await handle.describe()).memo()
    assert memo == {INPUT_MEMO: input_sha256_of(ImageTask.model_validate(task))}


# Details


async def details(handle: Handle) -> dict[str, str]:
    """The run's current details: the items of its list, as the UI would show their text."""
    metadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    assert isinstance(metadata, WorkflowMetadata)
    shown: dict[str, str] = {}
    for row in metadata.current_details.splitlines():
        cells = re.fullmatch(r"- \*\*([a-zA-Z ]+):\*\* ((?:[^\\`*_{}\[\]()+!|<>~&#]|&#\d+;)*)", row)
        assert cells is not None, f"markup from outside: {row}"
        shown[cells[1]] = html.unescape(cells[2])
    return shown


async def test_the_details_show_the_state_of_a_task(direct_platform: Platform) -> None:
    handle = await direct_platform.start_image()
    job_id = (await until_started(direct_platform, handle)).run_id
    await direct_platform.until_settled(handle)
    shown = await details(handle)
    assert (shown["status"], shown["stage"], shown["job"]) == ("queued", "queued 0 %", f"{job_id} (attempt 1)")
    assert shown["credits"] == "estimated 24, held 24, charged 0, returned 0"
    assert shown["waits for"].startswith("ComfyUI: callback or poll, until 20")
    assert shown["last update from ComfyUI"] == "-"
    await direct_platform.callback(handle, job_id=job_id, job_status="processing", sequence=1, stage_progress=40)

    async def is_applied() -> bool:
        return (await details(handle))["stage"] == "processing 40 %"

    await direct_platform.until(is_applied)
    assert (await details(handle))["last update from ComfyUI"].endswith("UTC")
    await direct_platform.cancel(handle)
    await ended(direct_platform, handle)
    assert (await details(handle))["credits"] == "estimated 24, held 24, charged 0, returned 24"


HOSTILE = (
    "| x | <img src=x onerror=alert(1)>\n\n# Head\n![i](https://evil.example/i) **b** `c` [l](javascript:d) ~~e~~ &lt;"
)


async def test_text_from_outside_never_becomes_markup(direct_platform: Platform) -> None:
    direct_platform.policy["retry_after_seconds"] = [60.0]
    handle = await direct_platform.start_image()
    job_id = (await until_started(direct_platform, handle)).run_id
    error = {"code": "gpu_preempted", "message": HOSTILE, "node": "<b>"}
    await direct_platform.callback(handle, job_id=job_id, job_status="processing", sequence=1, error_details=error)

    async def is_shown() -> str:
        return (await details(handle)).get("last error", "")

    assert await direct_platform.until(is_shown) == " ".join(f"gpu_preempted: {HOSTILE}".split())
    direct_platform.policy["retry_after_seconds"] = [0.05]
    await direct_platform.cancel(handle)
    assert (await ended(direct_platform, handle)).status is TaskStatus.CANCELLED


# Who goes first


@pytest.mark.parametrize(("priority", "key"), [("accelerated", 1), ("standard", 3)])
@pytest.mark.parametrize("scene", ["image", "training"])
async def test_every_activity_has_its_tasks_priority_and_tenant(
    quick_platform: Platform, scene: str, priority: str, key: int
) -> None:
    start = quick_platform.start_image if scene == "image" else quick_platform.start_training
    handle = await start(priority=priority)
    await ended(quick_platform, handle)
    priorities = {
        (attributes.activity_type.name, attributes.priority.priority_key, attributes.priority.fairness_key)
        async for event in handle.fetch_history_events()
        if (attributes := event.activity_task_scheduled_event_attributes).activity_type.name
    }
    calls = {"submit_job"} if scene == "image" else {"snapshot", "create_training", "start_training", "delete_snapshot"}
    # A slow machine makes a local call an activity too: more may be scheduled, but all with this priority.
    names = {name for name, _, _ in priorities}
    assert names >= calls | {"pre_deduct", "commit"}
    assert priorities == {(name, key, "tenant-demo") for name in names}


@pytest_asyncio.fixture
async def backlogged(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> AsyncIterator[Platform]:
    """A platform without a worker."""
    async with running_platform(temporal_env, task_store, tmp_path, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 1_000.0}
        yield platform


async def test_accelerated_goes_first_and_one_tenants_backlog_before_no_others(backlogged: Platform) -> None:
    """Seven wait to be submitted; then there is a worker that makes one call at a time."""
    crowd, other = await new_payer(backlogged), await new_payer(backlogged)
    async with backlogged.worker(no_remote_activities=True):
        handles = [await backlogged.start(crowd.image()) for _ in range(5)]
        handles.append(await backlogged.start(other.image()))
        handles.append(await backlogged.start(crowd.image(priority="accelerated")))
        for handle in handles:
            await backlogged.until(lambda handle=handle: is_waiting(handle))  # type: ignore[misc]
    async with backlogged.worker(max_concurrent_activities=1):
        for handle in handles:
            await ended(backlogged, handle)
    submitted = [seen.task_id for seen in await backlogged.simulators.admin.comfyui.requests_seen("submit_job")]
    assert submitted.index(task_id_of(handles[6])) == 0
    assert submitted.index(task_id_of(handles[5])) <= 2


async def is_waiting(handle: Handle) -> bool:
    """Whether an activity of the run waits for a worker."""
    return bool((await handle.describe()).raw_description.pending_activities)
