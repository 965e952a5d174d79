"""Step table 2, row by row, off the good path: window, GPUs, dataset, confirmation, start (contract §8).

`books.ended` asserts that the dataset's copy is gone at every end; here tests see that it existed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow

from activities.datasets import DatasetSnapshots
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.comfyui import TrainingAccepted, TrainingDraft, TrainingRequest
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import GpuWindow, TaskStatus
from tests.workflows.books import Ending, ended
from tests.workflows.payers import holds_of, kinds_of, new_payer, until_price_shown, until_started
from tests.workflows.platform import Handle, Platform, sent, task_id_of
from workflows.failures import TaskFailed
from workflows.gpu_window import Window
from workflows.interruptible import InterruptibleWaits
from workflows.training import TrainingWorkflow

PRICE = 120
HOUR = 3_600.0
Fields = dict[str, Any]


async def routes_called(platform: Platform, handle: Handle) -> list[str]:
    """The routes of either service that were called for the task, each once, in the order of the first call."""
    admin, task_id = platform.simulators.admin, task_id_of(handle)
    seen = [*await admin.comfyui.requests_seen(None, task_id), *await admin.credits.requests_seen(None, task_id)]
    return list(dict.fromkeys(request.route for request in sorted(seen, key=lambda request: request.at)))


async def assert_nothing_begun(platform: Platform, handle: Handle) -> None:
    """No training, no hold, no copy; which GPUs there are may have been read."""
    assert set(await routes_called(platform, handle)) <= {"estimate"}, "a price may be read, nothing is begun"
    assert platform.snapshot_files(task_id_of(handle)) == []


async def finish(platform: Platform, handle: Handle) -> Ending:
    """Let the task's training end well now."""
    run = await until_started(platform, handle)
    await platform.simulators.admin.comfyui.act(run.run_id, "finish")
    return await ended(platform, handle)


# The scheduling window


async def test_before_its_window_a_training_begins_nothing_then_goes_on(patient_platform: Platform) -> None:
    opens = datetime.now(UTC) + timedelta(hours=2)
    handle = await patient_platform.start_training(window={"not_before": opens.isoformat()})
    await patient_platform.pass_time(handle, 2 * HOUR - 30)
    await patient_platform.until_settled(handle)
    await assert_nothing_begun(patient_platform, handle)
    assert (await patient_platform.progress(handle))["status"] == "queued"
    await patient_platform.pass_time(handle, 40)
    ending = await finish(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, PRICE)


async def test_a_training_whose_window_has_closed_begins_nothing(quick_platform: Platform) -> None:
    closed = datetime.now(UTC) - timedelta(seconds=1)
    handle = await quick_platform.start_training(window={"not_after": closed.isoformat()})
    assert (await ended(quick_platform, handle)).code == "gpu_unavailable"
    await assert_nothing_begun(quick_platform, handle)


async def test_a_window_that_closes_before_the_start_gives_everything_back(patient_platform: Platform) -> None:
    """The credits service is away until the window has closed: what was created by then is never started."""
    payer = await new_payer(patient_platform)
    away = await patient_platform.simulators.admin.credits.fault(
        "error", route="pre_deduct", tenant_id=payer.tenant_id, times=None
    )
    closes = datetime.now(UTC) + timedelta(minutes=2)
    handle = await patient_platform.start(payer.training(window={"not_after": closes.isoformat()}))
    await patient_platform.until_hit("pre_deduct", away)
    assert patient_platform.snapshot_files(task_id_of(handle)) != []
    await patient_platform.pass_time(handle, 130)
    await patient_platform.simulators.admin.credits.remove_fault(away)
    await patient_platform.pass_time(handle, 40)
    assert (await ended(patient_platform, handle)).code == "gpu_unavailable"
    assert "start_training" not in await routes_called(patient_platform, handle)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel"]


async def test_a_start_that_is_not_confirmed_before_the_window_closes_ends_for_the_window(
    patient_platform: Platform,
) -> None:
    payer = await new_payer(patient_platform)
    away = await patient_platform.simulators.admin.comfyui.fault(
        "error", route="start_training", tenant_id=payer.tenant_id, times=None
    )
    closes = datetime.now(UTC) + timedelta(minutes=2)
    handle = await patient_platform.start(payer.training(window={"not_after": closes.isoformat()}))
    await patient_platform.until_hit("start_training", away)
    await patient_platform.pass_time(handle, 130)
    ending = await ended(patient_platform, handle)
    assert (ending.code, ending.charged) == ("gpu_unavailable", 0)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct", "cancel"]


@pytest.mark.parametrize("closes_in", [None, 20, HOUR], ids=["no window", "closes now", "closes later"])
async def test_a_failed_start_keeps_its_cause(monkeypatch: pytest.MonkeyPatch, closes_in: float | None) -> None:
    """An exception that is raised from itself has lost its cause, and whoever follows its causes never ends."""
    now, silence = datetime.now(UTC), ValueError("no answer")
    monkeypatch.setattr(workflow, "now", lambda: now)
    closes = GpuWindow(not_after=now + timedelta(seconds=closes_in)) if closes_in else None

    async def unanswered(*_: Any, **__: Any) -> None:
        raise TaskFailed(FailureCode.COMFYUI_UNAVAILABLE, "ComfyUI does not answer.") from silence

    call_for = CallFor(task_id="t", tenant_id="tenant", user_id="user", scene=Scene.MODEL_TRAIN)
    flow = SimpleNamespace(
        window=Window(closes, cast(InterruptibleWaits, None)),
        outside=SimpleNamespace(call_for=call_for, key=lambda step, n: f"t:{step}:{n}", setup=unanswered),
        attempts=SimpleNamespace(key_number=1),
        clock=SimpleNamespace(start=lambda: now),
        may_start_again=None,
    )
    with pytest.raises(TaskFailed) as raised:
        await TrainingWorkflow.start(cast(TrainingWorkflow, flow), TrainingAccepted(training_id="j", gpu_hours=1.0))
    failures = [raised.value]
    while isinstance(failures[-1].__cause__, TaskFailed) and len(failures) < 9:
        failures.append(failures[-1].__cause__)
    codes = ["gpu_unavailable", "comfyui_unavailable"] if closes_in == 20 else ["comfyui_unavailable"]
    assert [failure.code for failure in failures] == codes
    assert failures[-1].__cause__ is silence


@pytest.mark.parametrize(
    "window",
    [
        {"not_before": "0001-01-01T00:00:00Z", "not_after": "9999-12-31T23:59:59Z"},
        {"not_before": "2000-01-01T00:00:00Z"},
    ],
    ids=["of all time", "opened long ago"],
)
async def test_a_window_that_is_open_holds_nothing_up(quick_platform: Platform, window: Fields) -> None:
    ending = await ended(quick_platform, await quick_platform.start_training(window=window))
    assert ending.status is TaskStatus.COMPLETED


async def test_a_window_at_the_end_of_time_can_be_cancelled(quick_platform: Platform) -> None:
    handle = await quick_platform.start_training(window={"not_before": "9999-12-31T23:59:59Z"})
    await quick_platform.until_settled(handle)
    assert await quick_platform.cancel(handle) == "accepted"
    assert (await ended(quick_platform, handle)).status is TaskStatus.CANCELLED
    await assert_nothing_begun(quick_platform, handle)


# GPUs


@pytest.mark.parametrize("gpu_type", ["b300", None], ids=["none of the requested type", "none at all"])
async def test_without_a_gpu_nothing_starts(quick_platform: Platform, gpu_type: str | None) -> None:
    payer = await new_payer(quick_platform)
    if gpu_type is None:
        await quick_platform.simulators.admin.comfyui.fault(
            "answer", route="list_gpus", tenant_id=payer.tenant_id, status=200, body=[]
        )
    handle = await quick_platform.start(payer.training(gpu_type=gpu_type))
    ending = await ended(quick_platform, handle)
    assert ending.code == "gpu_unavailable"
    assert ending.kinds == ["task.accepted -", "task.failed -"]
    await assert_nothing_begun(quick_platform, handle)


async def test_no_free_gpu_only_lengthens_the_eta(patient_platform: Platform) -> None:
    comfyui = patient_platform.simulators.admin.comfyui
    task = patient_platform.training(gpu_type="h100")  # there is one
    await comfyui.fault("job_duration", route="create_training", task_id=task["task_id"], seconds=HOUR)
    first = await patient_platform.start(task)
    await until_started(patient_platform, first)
    await patient_platform.until_settled(first)
    await patient_platform.pass_time(first, 400)
    assert (await patient_platform.job(first)).phase == "working"

    second = await patient_platform.start_training(gpu_type="h100")
    await until_started(patient_platform, second)
    await patient_platform.until_settled(second)
    await patient_platform.pass_time(second, 310)  # by then it has been polled

    async def eta_is_longer() -> bool:
        """The 53 minutes that the one GPU is taken, and 40 of work."""
        eta: float = (await patient_platform.progress(second))["estimated_time"]
        return eta > 90

    await patient_platform.until(eta_is_longer)
    for handle in (first, second):
        assert (await finish(patient_platform, handle)).status is TaskStatus.COMPLETED


# The dataset


def no_folder(folder: Path) -> Fields:
    folder.rmdir()
    return {}


def no_file(_folder: Path) -> Fields:
    return {}


def file_missing(folder: Path) -> Fields:
    (folder / "0.txt").write_text("picture")
    return {"files": ["0.txt", "1.txt"]}


def link_out(folder: Path) -> Fields:
    stranger = folder.parents[1] / "tenant-other"
    stranger.mkdir(exist_ok=True)
    (stranger / "secret.txt").write_text("another tenant's")
    (folder / "0.txt").symlink_to(stranger / "secret.txt")
    return {}


@pytest.mark.parametrize("spoil", [no_folder, no_file, file_missing, link_out])
async def test_a_dataset_that_cannot_be_copied_is_invalid_and_nothing_begins(
    quick_platform: Platform, spoil: Callable[[Path], Fields]
) -> None:
    folder = quick_platform.folder / "datasets" / "tenant-demo" / spoil.__name__
    folder.mkdir(parents=True)
    dataset = {"dataset_id": "faces", "source_uri": folder.as_uri(), **spoil(folder)}
    handle = await quick_platform.start_training(dataset=dataset)
    ending = await ended(quick_platform, handle)
    assert ending.code == "dataset_invalid"
    assert ending.events[-1].message, "the sentence an operator needs"
    await assert_nothing_begun(quick_platform, handle)


FOREIGN = (
    "{root}/tenant-other/faces",
    "{root}/tenant-demo/../tenant-other/faces",
    "{root}/tenant-demo/faces/..",
    "{root}/tenant-demo/%2e%2e/tenant-other/faces",
    "{root}/tenant-demo/.%2E/tenant-other/faces",
    "{root}/tenant-demo/..%2Ftenant-other/faces",
    "{root}/tenant-demo/..\\tenant-other/faces",
    "{root}/tenant-demo/..%5Ctenant-other/faces",
    "{root}/tenant-demo-2/faces",
    "{root}/tenant-demo/",
    "s3://bucket/tenant-demo/faces",
    "file://elsewhere/tenant-demo/faces",
)
"""Addresses that are not below the tenant's own prefix `{root}/tenant-demo/`."""


@pytest.mark.parametrize("field", ["source_uri", "resume_from"])
async def test_an_address_outside_the_tenants_own_prefix_is_refused(quick_platform: Platform, field: str) -> None:
    root = (quick_platform.folder / "datasets").as_uri()

    async def refused(template: str) -> None:
        uri = template.replace("{root}", root)
        named: Fields = {"resume_from": uri}
        if field == "source_uri":
            named = {"dataset": {"dataset_id": "faces", "source_uri": uri}}
        handle = await quick_platform.start_training(**named)
        ending = await ended(quick_platform, handle)
        assert ending.code == "input_invalid", uri
        assert field in (ending.events[-1].message or ""), uri
        await assert_nothing_begun(quick_platform, handle)

    await asyncio.gather(*(refused(template) for template in FOREIGN))


async def body_sent(platform: Platform, handle: Handle) -> TrainingRequest:
    """The body that the service received: history has it without the list of files, which is stored beside the copy."""
    [order] = await sent(handle, "create_training")
    draft = TrainingDraft.model_validate(order["body"])
    assert draft.dataset.files is None
    body = draft.request(await DatasetSnapshots((platform.folder / "objects").as_uri()).whole(draft.dataset))
    [seen] = await platform.simulators.admin.comfyui.requests_seen("create_training", task_id_of(handle))
    assert seen.body_sha256 == hashlib.sha256(body.model_dump_json(exclude_none=True).encode()).hexdigest()
    return body


async def test_the_service_trains_on_a_copy_and_gets_its_checksums(quick_platform: Platform) -> None:
    """The copy is kept as long as the training runs, even if the source changes."""
    payer = await new_payer(quick_platform)
    task = payer.training()
    await quick_platform.simulators.admin.comfyui.fault(
        "job_stall", route="create_training", task_id=task["task_id"], at=0.3
    )
    handle = await quick_platform.start(task)
    await until_started(quick_platform, handle)
    source = quick_platform.folder / "datasets" / payer.tenant_id / "faces" / "0.txt"
    source.write_text("another picture")
    body = await body_sent(quick_platform, handle)
    [file] = body.dataset.files
    [copy] = [path for path in quick_platform.snapshot_files(task_id_of(handle)) if path.name == "0.txt"]
    assert copy.as_uri() == body.dataset.snapshot_uri + file.path
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == file.sha256
    assert (copy.read_text(), file.size_bytes) == ("a picture", len("a picture"))
    await quick_platform.until(lambda: is_over(quick_platform, handle))
    await ended(quick_platform, handle)


async def is_over(platform: Platform, handle: Handle) -> bool:
    """Resume a training that may not have reached the point where it stalls."""
    run = await platform.job(handle)
    return (await platform.simulators.admin.comfyui.act(run.run_id, "resume")).is_over


async def failed(platform: Platform, handle: Handle) -> None:
    await platform.simulators.admin.comfyui.act((await until_started(platform, handle)).run_id, "fail")


async def cancelled(platform: Platform, handle: Handle) -> None:
    assert await platform.cancel(handle) == "accepted"


async def cancelled_by_temporal(_platform: Platform, handle: Handle) -> None:
    await handle.cancel()


async def nothing(_platform: Platform, _handle: Handle) -> None:
    """It ends like this by itself."""


ENDS: dict[str, tuple[Fields, int, Callable[[Platform, Handle], Any], str | None]] = {
    "failed": ({}, PRICE, failed, "internal"),
    "cancelled": ({}, PRICE, cancelled, None),
    "cancelled by Temporal": ({}, PRICE, cancelled_by_temporal, None),
    "timed out": ({"options": {"deadline_factor": 0.001}}, PRICE, nothing, "timeout"),
    "unconfirmed": (
        {"max_credits": 1, "options": {"confirm_within_seconds": 0.2}},
        PRICE,
        nothing,
        "price_not_confirmed",
    ),
}
"""How a training ends other than well: its fields, the payer's balance, what ends it, the code."""


@pytest.mark.parametrize("how", ENDS)
async def test_the_copy_is_deleted_at_every_end_of_a_training(quick_platform: Platform, how: str) -> None:
    fields, balance, end_it, code = ENDS[how]
    payer = await new_payer(quick_platform, balance)
    task = payer.training(**fields)
    stalls = await quick_platform.simulators.admin.comfyui.fault(
        "job_stall", route="create_training", task_id=task["task_id"], at=0.3
    )
    handle = await quick_platform.start(task)
    await quick_platform.until_hit("create_training", stalls)
    await end_it(quick_platform, handle)
    ending = await ended(quick_platform, handle)
    assert ending.code == code
    assert await payer.balance() == balance
    assert await sent(handle, "snapshot") == await sent(handle, "delete_snapshot"), "one order, made and taken back"


async def test_a_training_that_the_service_refuses_leaves_nothing(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform)
    await quick_platform.simulators.admin.comfyui.fault(
        "job_refuse", route="create_training", tenant_id=payer.tenant_id, code="model_missing"
    )
    handle = await quick_platform.start(payer.training())
    assert (await ended(quick_platform, handle)).code == "model_missing"
    assert len(await sent(handle, "create_training")) == 1, "a definite refusal uses no attempt"


# The confirmation


async def test_an_unconfirmed_price_is_shown_by_query_and_event_until_it_is_confirmed(
    quick_platform: Platform,
) -> None:
    payer = await new_payer(quick_platform, 1_000)
    handle = await quick_platform.start(payer.training(max_credits=None))
    confirmation = await until_price_shown(quick_platform, handle)
    assert (confirmation["estimated_cost"], confirmation["current_balance"]) == (PRICE, 1_000)
    assert {option["priority"] for option in confirmation["options"]} == {"standard", "accelerated"}
    left = datetime.fromisoformat(confirmation["confirm_by"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(minutes=60)
    assert await holds_of(quick_platform, handle) == [], "nothing is held for an unconfirmed price"

    assert await handle.execute_update("confirm_price", {"max_credits": PRICE - 1}) == {"max_credits": PRICE - 1}
    assert await until_price_shown(quick_platform, handle) == confirmation, "less than the price confirms nothing"
    assert await handle.execute_update("confirm_price", {"max_credits": PRICE}) == {"max_credits": PRICE}
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, PRICE)
    [event] = [event for event in ending.events if event.confirmation]
    assert event.event is EventType.CREDITS and event.confirmation
    assert event.confirmation.model_dump(mode="json") == confirmation
    assert (await quick_platform.progress(handle))["confirmation"] is None
    order = ["estimate", "create_training", "pre_deduct", "start_training", "commit"]
    assert await routes_called(quick_platform, handle) == order


async def test_a_price_up_to_max_credits_is_confirmed_beforehand(quick_platform: Platform) -> None:
    ending = await ended(quick_platform, await quick_platform.start_training(max_credits=PRICE))
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, PRICE)
    assert not any(event.confirmation for event in ending.events)


async def test_a_price_can_be_confirmed_before_the_task_requests_it_and_only_raised(patient_platform: Platform) -> None:
    opens = datetime.now(UTC) + timedelta(minutes=10)
    handle = await patient_platform.start_training(max_credits=10, window={"not_before": opens.isoformat()})
    await patient_platform.until_settled(handle)
    for confirmed in (PRICE, 50):
        assert await handle.execute_update("confirm_price", {"max_credits": confirmed}) == {"max_credits": PRICE}
    await patient_platform.pass_time(handle, 610)
    ending = await finish(patient_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, PRICE)
    assert not any(event.confirmation for event in ending.events)


async def test_an_unconfirmed_price_ends_the_task_in_an_hour_or_with_its_window(
    patient_platform: Platform,
) -> None:
    closes = datetime.now(UTC) + timedelta(minutes=30)
    windows: list[Fields] = [{}, {"window": {"not_after": closes.isoformat()}}]
    handles = [await patient_platform.start_training(max_credits=None, **window) for window in windows]
    for handle, minutes in zip(handles, (60, 30), strict=True):
        await until_price_shown(patient_platform, handle)
        await patient_platform.pass_time(handle, minutes * 60 - 15)
        assert await until_price_shown(patient_platform, handle)
        await patient_platform.pass_time(handle, 20)
        ending = await ended(patient_platform, handle)
        assert ending.code == "price_not_confirmed"
        assert await kinds_of(patient_platform, handle) == []


# Start and resume


async def test_a_server_without_start_begins_by_itself(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform)
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("not_offered", route="start_training", tenant_id=payer.tenant_id, times=None)
    handle = await quick_platform.start(payer.training())
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (
        TaskStatus.COMPLETED,
        PRICE,
        ["route_not_offered"],
    )
    assert [record.key for record in ending.records] == ["route_not_offered:start"]
    [request] = await comfyui.requests_seen("start_training", task_id_of(handle))
    assert (request.status, request.outcome) == (404, "not_acted")


async def test_a_retried_training_resumes_from_its_last_checkpoint(quick_platform: Platform) -> None:
    quick_platform.policy["retry_after_seconds"] = [0.05]
    task = quick_platform.training()
    comfyui = quick_platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="create_training", task_id=task["task_id"], at=0.6)
    handle = await quick_platform.start(task)
    assert (await ended(quick_platform, handle)).status is TaskStatus.COMPLETED
    first, _second = await comfyui.jobs(task_id_of(handle))
    sources = [order["body"]["resume_from"] for order in await sent(handle, "create_training")]
    assert sources == [None, first.state["checkpoint"]["uri"]]
    assert len(await sent(handle, "snapshot")) == 1, "the same copy serves both"


async def test_without_dataset_roots_a_training_is_refused(quick_platform: Platform) -> None:
    quick_platform.policy["dataset_roots"] = []
    handle = await quick_platform.start_training()
    ending = await ended(quick_platform, handle)
    assert ending.code == "input_invalid"
    assert "COMFYUI_TEMPORAL_DATASET_ROOTS" in (ending.events[-1].message or "")
    await assert_nothing_begun(quick_platform, handle)


async def test_a_training_resumes_from_the_checkpoint_that_its_caller_names(quick_platform: Platform) -> None:
    """The service refuses a checkpoint it does not know: a completed training shows that it got the checkpoint."""
    first = await quick_platform.start_training()
    await ended(quick_platform, first)
    checkpoint = (await quick_platform.job(first)).state["checkpoint"]["uri"]
    datasets = f"{(quick_platform.folder / 'datasets').as_uri()}/tenant-demo/"
    quick_platform.policy["dataset_roots"] = [datasets, checkpoint.rpartition("/")[0] + "/"]
    second = await quick_platform.start_training(resume_from=checkpoint)
    assert (await ended(quick_platform, second)).status is TaskStatus.COMPLETED
    assert [order["body"]["resume_from"] for order in await sent(second, "create_training")] == [checkpoint]
    unknown = await quick_platform.start_training(resume_from=checkpoint + ".lost")
    assert (await ended(quick_platform, unknown)).code == "input_invalid"
