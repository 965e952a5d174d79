"""A cancel at every step, each way it can come: charged once, or nothing charged and no result delivered.

Jobs here take so long that none ends by itself: only the scenario delivers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulators.credits_profile import CreditsProfile
from store import TaskStore
from tests.workflows.books import Ending, ended
from tests.workflows.platform import Handle, Platform, running_platform

COMPLETED, CANCELED = WorkflowExecutionStatus.COMPLETED, WorkflowExecutionStatus.CANCELED
WAYS: Final = {
    "update": {COMPLETED},
    "temporal": {CANCELED},
    "two updates": {COMPLETED},
    "both": {COMPLETED, CANCELED},
}
"""How a cancel comes, and what the run may end as; of two that come together either may be seen first."""
CALLS: Final = [
    *(("image", route) for route in ("submit_job", "estimate", "pre_deduct")),
    *(("training", route) for route in ("create_training", "estimate", "pre_deduct", "start_training")),
]
OBEYED_WITHIN_SECONDS: Final = 5.0
"""How long a cancel may take in an outage: the attempt in flight, and a short local try."""


@pytest_asyncio.fixture
async def bare_platform(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path, credits_profile: CreditsProfile
) -> AsyncIterator[Platform]:
    """A platform without a worker, where an image takes 24 s and a training more than 2 minutes."""
    running = running_platform(temporal_env, task_store, tmp_path, speed=20.0, credits_profile=credits_profile)
    async with running as platform:
        yield platform


@pytest_asyncio.fixture
async def working(bare_platform: Platform) -> AsyncIterator[Platform]:
    """`bare_platform` with a worker."""
    async with bare_platform.worker():
        yield bare_platform


async def start(platform: Platform, kind: str, **fields: Any) -> Handle:
    return await (platform.start_image(**fields) if kind == "image" else platform.start_training(**fields))


async def cancel(platform: Platform, handle: Handle, way: str) -> list[str]:
    """Send the cancels together; the outcomes of the updates among them. One may be just too late for the run."""
    if way in ("temporal", "both"):
        await handle.cancel()
    updates = {"update": 1, "temporal": 0, "two updates": 2, "both": 1}[way]
    answers = await asyncio.gather(*(platform.cancel(handle) for _ in range(updates)), return_exceptions=True)
    outcomes = [answer for answer in answers if isinstance(answer, str)]
    for error in answers:
        if isinstance(error, BaseException):
            assert isinstance(error, RPCError) and error.status is RPCStatusCode.NOT_FOUND, error
            assert outcomes or way == "both"
    return outcomes


async def ended_cancelled(platform: Platform, handle: Handle, way: str, outcomes: list[str]) -> Ending:
    """The end of a task that was cancelled: nothing is left of it, and every answer says the same."""
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.CANCELLED, ending
    assert set(outcomes) <= {"accepted"}
    assert (await handle.describe()).status in WAYS[way]
    assert platform.snapshot_files(handle.id.removeprefix("task-")) == []
    return ending


async def each_way(platform: Platform, kind: str, **fields: Any) -> dict[str, Handle]:
    """A task to be cancelled for each way."""
    return {way: await start(platform, kind, **fields) for way in WAYS}


async def cancelled_while_hanging(platform: Platform, kind: str, route: str, when: str, way: str) -> None:
    task = platform.image() if kind == "image" else platform.training()
    fault = await platform.service_of(route).fault(
        "delay", route=route, seconds=1.0, when=when, task_id=task["task_id"]
    )
    handle = await platform.start(task)
    await platform.until_hit(route, fault)
    await ended_cancelled(platform, handle, way, await cancel(platform, handle, way))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
async def test_cancelled_while_a_call_hangs_before_and_after_it_acted(working: Platform, when: str) -> None:
    """Two kinds of cancel a call, so that both runs together cover every call with every kind."""
    ways = list(WAYS) if when == "before" else list(WAYS)[::-1]
    scenarios: list[Coroutine[Any, Any, None]] = []
    for n, (kind, route) in enumerate(CALLS):
        for way in (ways[n % 2], ways[n % 2 + 2]):
            scenarios.append(cancelled_while_hanging(working, kind, route, when, way))
    await asyncio.gather(*scenarios)


async def cancelled_while_retried(platform: Platform, kind: str, route: str, way: str) -> tuple[Handle, list[str]]:
    """Its first request acts and its answer is lost; after that the service is away."""
    task = platform.image() if kind == "image" else platform.training()
    service, named = platform.service_of(route), {"route": route, "task_id": task["task_id"]}
    await service.fault("drop", **named)
    away = await service.fault("error", times=None, **named)
    handle = await platform.start(task)
    await platform.until_hit(route, away)
    began = asyncio.get_running_loop().time()
    outcomes = await cancel(platform, handle, way)
    assert asyncio.get_running_loop().time() - began < OBEYED_WITHIN_SECONDS, (route, way)
    return handle, outcomes


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(("update", "temporal"), id="once"),
        pytest.param(("two updates", "both"), id="twice", marks=pytest.mark.slow),
    ],
)
async def test_cancelled_while_a_call_is_retried_in_an_outage(working: Platform, ways: tuple[str, str]) -> None:
    """A cancel does not wait for an outage to end; what the lost call did is given back afterwards."""
    scenarios = [(kind, route, way) for kind, route in CALLS for way in ways]
    cancelled = await asyncio.gather(*(cancelled_while_retried(working, *scenario) for scenario in scenarios))
    await working.simulators.admin.remove_faults()
    for (_, _, way), (handle, outcomes) in zip(scenarios, cancelled, strict=True):
        await ended_cancelled(working, handle, way, outcomes)


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_cancel_that_comes_while_a_delivery_is_charged_is_too_late(working: Platform, kind: str) -> None:
    """It is answered at once, though the credits service is away."""
    handle = await start(working, kind)
    task_id = handle.id.removeprefix("task-")
    await working.until_held(task_id)
    credits = working.simulators.admin.credits
    away = await credits.fault("error", route="commit", task_id=task_id, status=503, times=None)
    await working.simulators.admin.comfyui.act((await working.job(handle)).run_id, "finish")
    await working.until_hit("commit", away)
    async with asyncio.timeout(10):
        assert await working.cancel(handle) == "too_late"
    await credits.remove_fault(away)
    ending = await ended(working, handle)
    assert ending.status is TaskStatus.COMPLETED and ending.charged > 0


async def test_cancelled_while_the_gpu_list_is_requested(working: Platform) -> None:
    await working.simulators.admin.comfyui.fault("error", route="list_gpus", times=None)
    for way, handle in (await each_way(working, "training")).items():
        ending = await ended_cancelled(working, handle, way, await cancel(working, handle, way))
        assert not ending.result or ending.result["attempts"] == 0


async def test_cancelled_while_the_dataset_is_copied(working: Platform) -> None:
    """Copying is cut short, and what was half copied is deleted."""
    many = working.folder / "datasets" / "tenant-demo" / "many"
    many.mkdir(parents=True)
    for n in range(1_500):
        (many / f"{n}.txt").write_text("picture")

    async def cancelled_during_copy(way: str) -> None:
        handle = await working.start_training(dataset={"dataset_id": "many", "source_uri": many.as_uri()})
        task_id = handle.id.removeprefix("task-")

        async def is_copied() -> bool:
            return bool(working.snapshot_files(task_id))

        await working.until(is_copied)
        await ended_cancelled(working, handle, way, await cancel(working, handle, way))
        assert await working.simulators.admin.comfyui.jobs(task_id) == []

    await asyncio.gather(*(cancelled_during_copy(way) for way in ("temporal", "two updates")))


async def test_cancelled_while_object_storage_is_away(working: Platform) -> None:
    """Nothing can be deleted while it is away: the run ends once it is back, its credits long given back."""
    snapshots = working.folder / "objects" / "snapshots"
    snapshots.parent.mkdir(exist_ok=True)
    snapshots.write_text("no folder")
    handle = await working.start_training()

    async def is_retried() -> bool:
        pending = (await handle.describe()).raw_description.pending_activities
        return any(activity.attempt > 1 for activity in pending)

    await working.until(is_retried)
    assert await working.cancel(handle) == "accepted"
    snapshots.unlink()
    await ended_cancelled(working, handle, "update", ["accepted"])


async def waiting_image(platform: Platform) -> Handle:
    """Held, and waiting for its job."""
    handle = await platform.start_image()
    await platform.until_held(handle.id.removeprefix("task-"))
    return handle


async def image_between_attempts(platform: Platform) -> Handle:
    """Its job was preempted; the next one follows in 30 s."""
    handle = await waiting_image(platform)
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "preempt")
    await platform.until(lambda: has_error(platform, handle, "gpu_preempted"))
    return handle


async def image_being_polled(platform: Platform) -> Handle:
    """Its callbacks are withheld, and the poll hangs."""
    task = platform.image(options={"poll_after_seconds": 0.2})
    await platform.simulators.admin.comfyui.fault("callback_withhold", task_id=task["task_id"], times=None)
    fault = await platform.simulators.admin.comfyui.fault(
        "delay", route="get_job", task_id=task["task_id"], seconds=2.0
    )
    handle = await platform.start(task)
    await platform.until_hit("get_job", fault)
    return handle


async def training_before_its_window(platform: Platform) -> Handle:
    opens = datetime.now(UTC) + timedelta(hours=1)
    handle = await platform.start_training(window={"not_before": opens.isoformat()})
    await platform.until(lambda: waits_for(handle, "0 wait: the window opens"))
    return handle


async def unconfirmed_training(platform: Platform) -> Handle:
    handle = await platform.start_training(max_credits=None)
    await platform.until(lambda: asks_to_confirm(platform, handle))
    return handle


async def running_training(platform: Platform) -> Handle:
    handle = await platform.start_training()
    await platform.until(lambda: has_started(platform, handle))
    return handle


async def training_between_attempts(platform: Platform) -> Handle:
    handle = await running_training(platform)
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "preempt")
    await platform.until(lambda: has_error(platform, handle, "gpu_preempted"))
    return handle


async def training_with_a_renewal_in_flight(platform: Platform) -> Handle:
    """Its price rose: the larger hold is requested, and the answer hangs."""
    task = platform.training()
    fault = await platform.simulators.admin.credits.fault(
        "delay", route="pre_deduct", task_id=task["task_id"], nth=2, seconds=1.0, when="after"
    )
    handle = await platform.start(task)
    await platform.until(lambda: has_started(platform, handle))
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "gpu_hours", gpu_hours=3.0)
    await platform.until_hit("pre_deduct", fault)
    return handle


WAITS: Final = {
    "an image's job": waiting_image,
    "an image's next attempt": image_between_attempts,
    "an image's poll": image_being_polled,
    "the window": training_before_its_window,
    "the confirmation": unconfirmed_training,
    "a training": running_training,
    "a training's next attempt": training_between_attempts,
    "a renewal": training_with_a_renewal_in_flight,
}


async def has_started(platform: Platform, handle: Handle) -> bool:
    return (await platform.job(handle)).phase != "idle"


async def has_error(platform: Platform, handle: Handle, code: str) -> bool:
    error = (await platform.progress(handle))["error_details"]
    return bool(error) and error["code"] == code


async def waits_for(handle: Handle, summary: str) -> bool:
    """Whether a timer of this summary was started."""
    return summary in [
        json.loads(event.user_metadata.summary.data)
        async for event in handle.fetch_history_events()
        if event.HasField("timer_started_event_attributes")
    ]


async def asks_to_confirm(platform: Platform, handle: Handle) -> bool:
    return bool((await platform.progress(handle)).get("confirmation"))


@pytest.mark.parametrize(
    "way", ["update", "temporal", *(pytest.param(way, marks=pytest.mark.slow) for way in ("two updates", "both"))]
)
async def test_cancelled_while_it_waits(working: Platform, way: str) -> None:
    async def cancelled_waiting_for(what: str) -> None:
        handle = await WAITS[what](working)
        await ended_cancelled(working, handle, way, await cancel(working, handle, way))

    await asyncio.gather(*(cancelled_waiting_for(what) for what in WAITS))
