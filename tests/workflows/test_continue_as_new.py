"""Runs that are made to continue as new: nothing is lost or requested twice, there is one result (pitfall 22).

A run here gets only the messages that a scenario sends; `books.ended` checks every run of the chain.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, TaskStatus
from proof.simulators.admin_wire import Fault
from store import TaskStore
from tests.cable import Cable
from tests.workflows.books import ended, ended_without_its_run, give_back, runs_of
from tests.workflows.payers import (
    holds_of,
    kinds_of,
    new_payer,
    refuse_cancels,
    start_long_training,
    until_kinds,
    until_price_shown,
    until_started,
)
from tests.workflows.platform import Handle, Platform, running_platform, sent, task_id_of
from workflows import outside_call

URL = "https://example.org/1.png"
OUTPUT = {"model_path": "file:///models/1", "version": "1", "metrics": {"loss": 0.1}}
FORGED = ("job_runs_out",)
"""A delivery that the scenario forged: the service does not know it, and its job runs on."""
SIGNALS = 3
"""After so many signals a run continues as new."""
LONG_RUNS = {"continue_as_new_signals": SIGNALS, "retry_after_seconds": [0.05, 0.05]}
STAGES = ["data_ingest", "training", "evaluating", "publishing"]


@pytest.fixture
def platform(direct_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    """`direct_platform`, whose runs are short and wait less for a call before they continue."""
    monkeypatch.setattr(outside_call, "NEW_FOR", timedelta(seconds=0.3))
    before = direct_platform.policy
    direct_platform.policy = before | LONG_RUNS
    yield direct_platform
    direct_platform.policy = before


async def until_progress(platform: Platform, handle: Handle, **fields: Any) -> None:
    """Wait until the task shows these fields."""

    async def shown() -> bool:
        progress = await platform.progress(handle)
        return all(progress[name] == value for name, value in fields.items())

    await platform.until(shown)


async def until_runs(platform: Platform, handle: Handle, number: int) -> None:
    """Wait until the task is in its `number`th run."""

    async def begun() -> bool:
        return len(await runs_of(platform, handle)) >= number

    await platform.until(begun)


async def tick(platform: Platform, handle: Handle, run_id: str, sequence: int, **fields: Any) -> None:
    """Send a message and wait until the task has applied it."""
    kind = {"job_id": run_id, "job_status": "processing"}
    if "training_status" in fields:
        kind = {"training_id": run_id}
    await platform.callback(handle, **kind, sequence=sequence, stage_progress=sequence, **fields)
    await until_progress(platform, handle, progress=float(sequence))


def delivery(job_id: str, **fields: Any) -> dict[str, Any]:
    return {"job_id": job_id, "job_status": "delivery", "sequence": 1_000, "result_urls": [URL], **fields}


def model(training_id: str, **fields: Any) -> dict[str, Any]:
    status = {"training_status": "completed", "training_stage": "publishing", "output": OUTPUT}
    return {"training_id": training_id, "sequence": 1_000, **status, **fields}


async def started(platform: Platform, handle: Handle) -> str:
    """Wait until the credits are held and the work has begun; the id of the job or training."""
    run_id = (await until_started(platform, handle)).run_id
    await until_progress(platform, handle, job_id=run_id)
    return run_id


async def started_again(platform: Platform, handle: Handle, number: int) -> str:
    """Wait until the task follows its `number`th job; its id. The one before may still be running."""

    async def followed() -> str | None:
        runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        job_id = (await platform.progress(handle))["job_id"]
        return job_id if len(runs) == number and runs[-1].run_id == job_id else None

    job_id = await platform.until(followed)
    assert job_id is not None
    return job_id


async def assert_requested_once(platform: Platform, handle: Handle, **times: int) -> None:
    """Every call that changes something was made once over all runs of the task, unless `times` says otherwise."""
    admin, task_id = platform.simulators.admin, task_id_of(handle)
    seen = [*await admin.comfyui.requests_seen(None, task_id), *await admin.credits.requests_seen(None, task_id)]
    changing = [request.route for request in seen if request.method == "POST"]
    assert {route: changing.count(route) for route in changing} == dict.fromkeys(set(changing), 1) | times


async def test_an_image_of_many_runs_is_one_task(platform: Platform) -> None:
    """Its attempts, hold, refusals and progress are carried to the next run."""
    handle = await platform.start_image()
    first = await started(platform, handle)
    for sequence in range(1, 8):
        await tick(platform, handle, first, sequence)
        await handle.signal(CALLBACK_SIGNAL, "no message")
    await until_progress(platform, handle, callbacks_refused=7)
    details = {"code": "gpu_preempted", "message": "gone"}
    await platform.callback(handle, job_id=first, job_status="processing", sequence=8, error_details=details)
    await until_progress(platform, handle, attempts=2)
    second = await started_again(platform, handle, 2)
    for sequence in range(1, 5):
        await tick(platform, handle, second, sequence)
        await platform.callback(handle, **delivery(first))
    await until_progress(platform, handle, callbacks_refused=7 + 4)
    await platform.callback(handle, **delivery(second))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    assert (ending.result["attempts"], ending.result["result_urls"]) == (2, [URL])
    assert len(await runs_of(platform, handle)) >= 5
    assert await kinds_of(platform, handle) == ["pre_deduct", "commit"]
    await assert_requested_once(platform, handle, submit_job=2, estimate=2)


async def until_holds(platform: Platform, handle: Handle, *amounts: int) -> None:
    """Wait until these points are held, oldest hold first, and nothing else."""

    async def held() -> bool:
        return [hold.amount for hold in await holds_of(platform, handle) if hold.phase == "open"] == [*amounts]

    await platform.until(held)


async def written_checkpoint(platform: Platform, handle: Handle) -> str:
    """Wait until the training has written a checkpoint; its uri."""

    async def written() -> str | None:
        checkpoint: dict[str, str] | None = (await platform.job(handle)).state["checkpoint"]
        return checkpoint["uri"] if checkpoint else None

    uri = await platform.until(written)
    assert uri is not None
    return uri


async def test_a_training_of_many_runs_keeps_its_hours_its_price_and_its_copy(platform: Platform) -> None:
    """Charged are the hours up to the checkpoint that its second attempt resumed from, and that attempt's own."""
    task = platform.training(max_credits=None)
    comfyui, running = platform.simulators.admin.comfyui, {"training_status": "running", "training_stage": "training"}
    await comfyui.fault("job_duration", route="create_training", task_id=task["task_id"], seconds=2)
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"], at=0.3)
    handle = await platform.start(task)
    await until_price_shown(platform, handle, 120)
    await handle.execute_update("confirm_price", {"max_credits": 130})
    first = await started(platform, handle)
    checkpoint = {"uri": await written_checkpoint(platform, handle), "epoch": 1, "step": 100, "gpu_hours_used": 1.0}
    for sequence in range(1, 5):
        await tick(platform, handle, first, sequence, **running)
    await platform.callback(handle, training_id=first, sequence=5, **running, checkpoint=checkpoint)
    details = {"code": "gpu_preempted", "message": "gone"}
    await platform.callback(handle, training_id=first, sequence=6, **running, error_details=details)

    await until_price_shown(platform, handle, 147)  # the hour before the checkpoint and 0.45 to come
    await handle.execute_update("confirm_price", {"max_credits": 200})
    second = await started_again(platform, handle, 2)
    await tick(platform, handle, second, 1, **running, gpu_hours=1.2)
    await until_holds(platform, handle, 192)
    await tick(platform, handle, second, 2, **running, gpu_hours=2.0)
    await until_price_shown(platform, handle, 240)
    before = len(await runs_of(platform, handle))
    sequences = iter(range(3, 40))
    while len(await runs_of(platform, handle)) < before + 2:
        await tick(platform, handle, second, next(sequences), **running)
    await until_price_shown(platform, handle, 240)
    await handle.execute_update("confirm_price", {"max_credits": 1_000})
    await until_holds(platform, handle, 240)
    assert platform.snapshot_files(task["task_id"]) != []
    await platform.callback(handle, **model(second, gpu_hours_used=0.5))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120 + 30)
    assert ending.result["output"] == OUTPUT | {"sha256": None}
    await assert_requested_once(
        platform, handle, create_training=2, estimate=3, start_training=2, pre_deduct=5, cancel_hold=4
    )


async def test_messages_that_overtake_the_submitting_call_are_carried_on(platform: Platform) -> None:
    """They alone make the run long: it continues as new before it has waited once."""
    task = platform.image()
    await platform.simulators.admin.comfyui.fault(
        "delay", route="submit_job", task_id=task["task_id"], when="after", seconds=0.7
    )
    handle = await platform.start(task)
    job_id = (await platform.job(handle)).run_id
    for sequence in range(1, SIGNALS + 1):
        await platform.callback(
            handle, job_id=job_id, job_status="processing", sequence=sequence, stage_progress=10 * sequence
        )
    assert (await platform.progress(handle))["job_id"] is None, "the call has not answered yet"
    await until_runs(platform, handle, 2)
    await until_progress(platform, handle, progress=10.0 * SIGNALS, stage="processing")
    await platform.callback(handle, **delivery(job_id))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    await assert_requested_once(platform, handle)


async def test_a_history_of_many_events_continues_as_new(platform: Platform) -> None:
    platform.policy = platform.policy | {"continue_as_new_signals": 5_000, "continue_as_new_events": 60}
    handle = await platform.start_image()
    job_id = await started(platform, handle)
    for sequence in range(1, 41):
        await tick(platform, handle, job_id, sequence)
    await platform.callback(handle, **delivery(job_id))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    runs = await runs_of(platform, handle)
    assert len(runs) >= 3
    lengths = [(await run.describe()).history_length for run in runs]
    assert max(lengths) < 60 + 40, lengths


# What hangs while a run becomes long: stopped, and resumed by the next run


async def until_more_runs(platform: Platform, handle: Handle, number: int, run_id: str, **fields: Any) -> None:
    """Send messages of this job until the task has continued as new this many times."""
    wanted = len(await runs_of(platform, handle)) + number
    for sequence in range(2, 90):
        if len(await runs_of(platform, handle)) >= wanted:
            return
        await tick(platform, handle, run_id, sequence, **fields)
    raise AssertionError("it did not continue as new")


async def away(platform: Platform, route: str, task_id: str, **match: Any) -> Fault:
    """From now on this route does not answer for this task; returns once it was tried."""
    service = platform.service_of(route)
    return await service.fault("error", route=route, task_id=task_id, times=None, status=503, **match)


RUNNING = {"training_status": "running", "training_stage": "training"}


@pytest.mark.on_both_profiles
async def test_a_run_continues_as_new_while_a_renewal_hangs(platform: Platform) -> None:
    """The next run repeats the request of the one before with the same key and body: one hold results."""
    task = platform.training()
    handle = await platform.start(task)
    training_id = await started(platform, handle)
    fault = await away(platform, "pre_deduct", task["task_id"])
    await tick(platform, handle, training_id, 1, **RUNNING, gpu_hours=3.0)
    await platform.until_hit("pre_deduct", fault)
    await until_more_runs(platform, handle, 2, training_id, **RUNNING)
    await platform.simulators.admin.credits.remove_fault(fault)
    await until_holds(platform, handle, 240)
    await platform.callback(handle, **model(training_id, gpu_hours_used=3.0))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 240)
    seen = await platform.simulators.admin.credits.requests_seen("pre_deduct", task["task_id"])
    assert len({request.key for request in seen}) == len({request.body_sha256 for request in seen}) == 2
    assert len({run.run_id for run in await runs_of(platform, handle)}) >= 3


async def test_a_hold_that_is_due_is_requested_by_runs_that_are_long_from_their_first_task_on(
    platform: Platform,
) -> None:
    """As under a flood of callbacks that lasts."""
    platform.policy |= {"continue_as_new_signals": 0}
    handle = await platform.start(platform.training())
    training_id = await started(platform, handle)
    for sequence in range(1, 4):
        await platform.callback(handle, training_id=training_id, sequence=sequence, **RUNNING, gpu_hours=3.0)
    await until_holds(platform, handle, 240)
    await platform.callback(handle, **model(training_id, gpu_hours_used=3.0))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 240)


async def test_a_delivery_after_continuing_as_new_finds_the_renewal_that_hung(platform: Platform) -> None:
    """It finishes before anything is settled, in whichever run it began."""
    task = platform.training()
    handle = await platform.start(task)
    training_id = await started(platform, handle)
    fault = await away(platform, "pre_deduct", task["task_id"])
    await tick(platform, handle, training_id, 1, **RUNNING, gpu_hours=3.0)
    await platform.until_hit("pre_deduct", fault)
    await until_more_runs(platform, handle, 1, training_id, **RUNNING)
    await platform.callback(handle, **model(training_id, gpu_hours_used=3.0))
    await platform.simulators.admin.credits.remove_fault(fault)
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 240)


async def test_a_run_continues_as_new_while_an_old_hold_cannot_be_given_back(platform: Platform) -> None:
    task = platform.training()
    fault = await away(platform, "cancel_hold", task["task_id"])
    handle = await platform.start(task)
    training_id = await started(platform, handle)
    await tick(platform, handle, training_id, 1, **RUNNING, gpu_hours=3.0)
    await platform.until_hit("cancel_hold", fault)
    await until_more_runs(platform, handle, 2, training_id, **RUNNING)
    await platform.simulators.admin.credits.remove_fault(fault)
    await until_holds(platform, handle, 240)
    await platform.callback(handle, **model(training_id, gpu_hours_used=3.0))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 240)
    assert await kinds_of(platform, handle) == ["pre_deduct", "pre_deduct", "cancel", "commit"]


async def test_a_run_continues_as_new_while_the_points_of_the_old_hold_are_awaited(
    patient_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The balance is too short for two holds. The next run waits for the points too, although a checkpoint came."""
    monkeypatch.setattr(outside_call, "NEW_FOR", timedelta(seconds=0.3))
    patient_platform.policy = LONG_RUNS
    payer = await new_payer(patient_platform, 120)
    task = payer.training()
    await patient_platform.simulators.admin.comfyui.fault("callback_withhold", task_id=task["task_id"], times=None)
    handle = await start_long_training(patient_platform, task)
    training_id = await started(patient_platform, handle)
    await patient_platform.pass_time(handle, 1_810)
    await patient_platform.pass_time(handle, 1_700)
    assert await kinds_of(patient_platform, handle) == ["pre_deduct"]
    fault = await away(patient_platform, "cancel_hold", task["task_id"])
    await patient_platform.pass_time(handle, 60)
    await patient_platform.until_hit("cancel_hold", fault)
    checkpoint = {"uri": "file:///checkpoints/1", "epoch": 1, "step": 1, "gpu_hours_used": 0.1}
    more = itertools.count(900)

    async def is_continued() -> bool:
        message = {**RUNNING, "sequence": next(more), "checkpoint": checkpoint}
        await patient_platform.callback(handle, training_id=training_id, **message)
        return len(await runs_of(patient_platform, handle)) >= 2

    await patient_platform.until(is_continued)
    await patient_platform.simulators.admin.credits.remove_fault(fault)
    await until_kinds(patient_platform, handle, ["pre_deduct", "cancel", "pre_deduct"])
    await patient_platform.callback(handle, **model(training_id, gpu_hours_used=0.5))
    ending = await ended(patient_platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged, await payer.balance()) == (TaskStatus.COMPLETED, 120, 0)
    assert "uncovered" in ending.exceptions


@pytest.mark.parametrize(("times", "outcome"), [(1, "given_back"), (2, "settlement_unknown")])
async def test_a_give_back_cancels_a_hold_that_a_run_before_the_last_had_left_to_its_expiry(
    platform: Platform, times: int, outcome: str
) -> None:
    """The service refuses the old hold's cancel so many times."""
    handle = await platform.start(platform.training())
    training_id = await started(platform, handle)
    await refuse_cancels(platform, handle, times=times)
    await tick(platform, handle, training_id, 1, **RUNNING, gpu_hours=3.0)
    await until_holds(platform, handle, 120, 240)
    await until_more_runs(platform, handle, 2, training_id, **RUNNING)
    await platform.client.get_workflow_handle(handle.id).terminate()
    giving_back = await give_back(platform, handle)
    assert (await giving_back.result())["outcome"] == outcome
    phases = [hold.phase for hold in await holds_of(platform, handle)]
    assert phases == (["cancelled", "cancelled"] if times == 1 else ["open", "cancelled"])
    await ended_without_its_run(platform, task_id_of(handle), exempt={"hold_expires"} if times == 2 else ())


async def test_a_run_continues_as_new_while_an_old_job_cannot_be_cancelled(platform: Platform) -> None:
    task = platform.image()
    fault = await away(platform, "cancel_job", task["task_id"])
    handle = await platform.start(task)
    first = await started(platform, handle)
    await platform.callback(handle, **gone(first, 1))
    await until_progress(platform, handle, attempts=2)
    second = await started_again(platform, handle, 2)
    await platform.until_hit("cancel_job", fault)
    await until_more_runs(platform, handle, 2, second)
    await platform.simulators.admin.comfyui.remove_fault(fault)
    await platform.callback(handle, **delivery(second))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.result["attempts"]) == (TaskStatus.COMPLETED, 2)
    runs = await platform.simulators.admin.comfyui.jobs(task["task_id"])
    assert [run.is_over for run in runs] == [True, False], "the first was cancelled for certain"


def gone(job_id: str, sequence: int) -> dict[str, Any]:
    details = {"code": "gpu_preempted", "message": "gone"}
    return {"job_id": job_id, "job_status": "processing", "sequence": sequence, "error_details": details}


async def test_a_run_continues_as_new_between_two_attempts(platform: Platform) -> None:
    """The pause goes on where it was: one retry is reported, and the next job follows once."""
    platform.policy = platform.policy | {"retry_after_seconds": [2.0]}
    handle = await platform.start_image()
    first = await started(platform, handle)
    await platform.callback(handle, **gone(first, 1))

    async def is_continued() -> bool:
        """A run waits for the old job's cancel first, so the messages go on until then."""
        sequence = 2 + next(more)
        await platform.callback(handle, job_id=first, job_status="processing", sequence=sequence)
        return len(await runs_of(platform, handle)) >= 2

    more = itertools.count()
    await platform.until(is_continued)
    assert (await platform.progress(handle))["attempts"] == 1
    await until_progress(platform, handle, attempts=2)
    second = await started_again(platform, handle, 2)
    await platform.callback(handle, **delivery(second))
    ending = await ended(platform, handle, exempt=FORGED)
    assert (ending.status, ending.result["attempts"]) == (TaskStatus.COMPLETED, 2)
    assert sum(event.error is not None for event in ending.events) == 1
    assert len(await runs_of(platform, handle)) >= 2
    await assert_requested_once(platform, handle, submit_job=2, estimate=2)


async def test_a_cancel_while_the_calls_of_a_long_run_hang_takes_effect(platform: Platform) -> None:
    task = platform.training()
    handle = await platform.start(task)
    training_id = await started(platform, handle)
    fault = await away(platform, "pre_deduct", task["task_id"])
    await tick(platform, handle, training_id, 1, **RUNNING, gpu_hours=3.0)
    await platform.until_hit("pre_deduct", fault)
    await until_more_runs(platform, handle, 1, training_id, **RUNNING)
    assert await platform.cancel(handle) == "accepted"
    await platform.simulators.admin.credits.remove_fault(fault)
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.CANCELLED


# Facts that are not written yet


@pytest_asyncio.fixture
async def storeless(
    temporal_env: WorkflowEnvironment, postgres_dsn: str, cable: Cable, tmp_path: Path
) -> AsyncIterator[Platform]:
    """A platform of short runs whose store is reached by `cable`."""
    store = TaskStore(cable.dsn)
    async with running_platform(temporal_env, store, tmp_path, speed=1.0, gateway=False) as platform:
        await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
        platform.policy = {"poll_after_seconds": 3_600.0, "poll_at_most_seconds": 3_600.0, **LONG_RUNS}
        async with platform.worker():
            yield platform
    await store.close()


@pytest.mark.slow
async def test_facts_that_wait_for_the_store_are_carried_on_and_written_in_order(
    storeless: Platform, cable: Cable
) -> None:
    """A whole training while the store is away: it is paid for in time, and its events follow later without a gap."""
    handle = await storeless.start_training()
    training_id = await started(storeless, handle)
    cable.pull()
    sequence = 0
    for stage in STAGES:
        for _ in range(2):
            sequence += 1
            fields: dict[str, Any] = {"training_status": "running", "training_stage": stage}
            if stage == "training":
                uri = f"file:///checkpoints/{sequence}"
                fields["checkpoint"] = {"uri": uri, "epoch": 1, "step": sequence, "gpu_hours_used": 0.1}
            await tick(storeless, handle, training_id, sequence, **fields)
    assert len(await runs_of(storeless, handle)) >= 3
    await storeless.callback(handle, **model(training_id, gpu_hours_used=0.6))

    async def is_paid() -> bool:
        return await kinds_of(storeless, handle) == ["pre_deduct", "commit"]

    await storeless.until(is_paid)
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "it ends once its end is written"
    cable.plug_in()
    ending = await ended(storeless, handle, exempt=FORGED)
    assert ending.status is TaskStatus.COMPLETED
    progress = [event for event in ending.events if event.event in (EventType.RUNNING, EventType.CHECKPOINT)]
    assert list(dict.fromkeys(event.stage for event in progress)) == STAGES
    assert [event.message for event in progress if event.event is EventType.CHECKPOINT] == [
        f"Checkpoint at epoch 1, step {step}." for step in (3, 4)
    ]


# What comes together with the signals that make a run long


@pytest_asyncio.fixture
async def idle(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform of short runs without a worker: what is sent while there is none comes in one workflow task."""
    async with running_platform(temporal_env, task_store, tmp_path, speed=1.0, gateway=False) as platform:
        await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
        platform.policy = {"poll_after_seconds": 3_600.0, "poll_at_most_seconds": 3_600.0, **LONG_RUNS}
        yield platform


async def is_pending(handle: Handle) -> bool:
    return (await handle.describe()).raw_description.HasField("pending_workflow_task")


async def ticks(platform: Platform, handle: Handle, job_id: str) -> None:
    for sequence in range(1, 2 * SIGNALS):
        await platform.callback(handle, job_id=job_id, job_status="processing", sequence=sequence)


async def test_a_cancel_among_the_signals_that_make_a_run_long_takes_effect(idle: Platform) -> None:
    """It comes before, among or after them, as an update or from Temporal; nothing else is left to end the task."""
    ways = [(way, when) for way in ("temporal", "update") for when in ("before", "among", "after")]
    async with idle.worker():
        handles = [await idle.start_image() for _ in ways]
        jobs = [await started(idle, handle) for handle in handles]
        for handle in handles:
            await idle.until_settled(handle)
    updates: list[asyncio.Task[str]] = []
    for (way, when), handle, job_id in zip(ways, handles, jobs, strict=True):
        if when != "before":
            await ticks(idle, handle, job_id)
        if way == "temporal":
            await handle.cancel()
        else:
            updates.append(asyncio.create_task(idle.cancel(handle)))
            await idle.until(lambda handle=handle: is_pending(handle))  # type: ignore[misc]
        if when != "after":
            await ticks(idle, handle, job_id)
    async with idle.worker():
        for (way, _when), handle in zip(ways, handles, strict=True):
            ending = await ended(idle, handle)
            assert ending.status is TaskStatus.CANCELLED
            expected = WorkflowExecutionStatus.CANCELED if way == "temporal" else WorkflowExecutionStatus.COMPLETED
            assert (await handle.describe()).status is expected
        assert await asyncio.gather(*updates) == ["accepted"] * 3


async def test_a_delivery_among_the_signals_that_make_a_run_long_ends_it(idle: Platform) -> None:
    async with idle.worker():
        handle = await idle.start_image()
        job_id = await started(idle, handle)
        await idle.until_settled(handle)
    await ticks(idle, handle, job_id)
    await idle.callback(handle, **delivery(job_id))
    await idle.callback(handle, job_id=job_id, job_status="processing", sequence=2_000)
    async with idle.worker():
        ending = await ended(idle, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    assert len(await sent(handle, "commit")) == 1
