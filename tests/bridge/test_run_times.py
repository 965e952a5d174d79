"""Estimates are of this job, follow its own progress, and learn from runs that were cut."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from temporalio.client import WorkflowHandle

from bridge import job_workflow, placement, ticks
from bridge.calls import ESTIMATE_UPDATE, MANIFEST_MEMO, SECONDS_MEMO, workflow_of
from bridge.orders import JobView, RunEstimate
from bridge.run_pace import UNSEEN_SECONDS, RunPace
from tests.bridge.native import NativeServer
from tests.bridge.platform import QUICK, TENANT, BridgePlatform, Json
from tests.bridge.test_jobs import _png as png
from tests.bridge.test_servers import until_running
from tests.bridge.test_trainings import MODELS, created, post_action


def handle_of(bridge: BridgePlatform, job: Json) -> WorkflowHandle[object, object]:
    return bridge.client.get_workflow_handle(workflow_of(job["job_id"]))


async def measured(bridge: BridgePlatform, template_id: str = "test-pattern") -> float:
    """How slow this template is seen to be, once Temporal lists the run."""

    async def slowness() -> float | None:
        bridge.bridge.forecast.forget()
        return await bridge.bridge.forecast.slowness(template_id)

    found = await bridge.until(slowness)
    assert found is not None
    return found


def revisions(pace: RunPace, seconds_per_percent: float, *, is_heard: bool = True, until: int = 100) -> list[float]:
    """All revisions of a run of this pace, looked at each second."""
    found = []
    second = 0.0
    while second < seconds_per_percent * until:
        percent = int(second / seconds_per_percent) if is_heard else 0
        revised = pace.revised(second, percent, is_heard=is_heard)
        if revised is not None:
            found.append(revised)
        second += 1.0
    return found


def test_a_run_as_fast_as_expected_is_never_revised() -> None:
    assert revisions(RunPace(100.0), 1.0, until=79) == []
    assert revisions(RunPace(100.0), 0.5) == []


@pytest.mark.parametrize("seconds_per_percent", [3.0, 30.0])
def test_a_slower_run_is_expected_to_take_as_long_as_it_does(seconds_per_percent: float) -> None:
    found = revisions(RunPace(20.0), seconds_per_percent)
    assert found[-1] == pytest.approx(100 * seconds_per_percent, rel=0.3)
    assert found[-1] >= 100 * seconds_per_percent * 0.99
    assert found == sorted(found)
    assert len(found) <= 12, "each revision is a callback"


def test_a_long_load_is_not_taken_for_the_pace_of_the_rest() -> None:
    pace = RunPace(60.0)
    for second in range(100):
        pace.revised(float(second), 0, is_heard=True)
    pace.revised(100.0, 5, is_heard=True)
    for percent in range(6, 60):
        pace.revised(97.5 + percent / 2, percent, is_heard=True)
    assert pace.expected_seconds <= 200.0


def test_without_messages_a_run_is_extended_but_not_for_ever() -> None:
    pace = RunPace(20.0)
    assert revisions(pace, 50.0, is_heard=False)[-1] == UNSEEN_SECONDS


async def test_a_run_that_takes_longer_says_so_and_its_ticks_go_on(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    """By callback and by poll; the numbers of ticks rise all the same."""
    await native.admin.set(step_seconds=0.4, models={"checkpoints": ["a.safetensors"]})
    async with bridge.gpu(native):
        job = await bridge.submit(template_id="text-to-image", resolution="sd")
        await until_running(bridge, native)
        before = await bridge.job(job["job_id"])
        view: JobView = await handle_of(bridge, job).execute_update(
            ESTIMATE_UPDATE, RunEstimate(left_seconds=600.0, percent=1), result_type=JobView
        )
        assert view.tick_base is not None
        after = await bridge.job(job["job_id"])
        assert before["estimated_time"] < 2
        assert after["estimated_time"] == pytest.approx(10.0, rel=0.1)
        assert after["sequence"] > before["sequence"]
        again: JobView = await handle_of(bridge, job).execute_update(
            ESTIMATE_UPDATE, RunEstimate(left_seconds=5.0, percent=2), result_type=JobView
        )
        assert again.fields["estimated_time"] == after["estimated_time"], "it never takes a promise back"
        assert (await bridge.ended(job["job_id"]))["error_details"] is None
    told = [body for body in bridge.receiver.genuine(job["task_id"]) if body["job_status"] == "processing"]
    assert any(body["estimated_time"] == pytest.approx(10.0, rel=0.1) for body in told)


@pytest.mark.slow
async def test_a_gpu_worker_tells_that_its_run_is_slow(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(step_seconds=4.0, models={"checkpoints": ["a.safetensors"]})
    async with bridge.gpu(native):
        job = await bridge.submit(template_id="text-to-image", resolution="sd")

        async def is_slow() -> Json | None:
            state = await bridge.job(job["job_id"])
            return state if state["job_status"] == "processing" and state["estimated_time"] > 1.2 else None

        slow = await bridge.until(is_slow, seconds=40)
        assert slow is not None
        seen = slow["sequence"]

        async def ticks_go_on() -> bool:
            told = bridge.receiver.genuine(job["task_id"])
            return any(body["sequence"] > seen and body["stage_progress"] > slow["stage_progress"] for body in told)

        await bridge.until(ticks_go_on, seconds=20)
        await bridge.cancel(job["job_id"])


async def test_a_job_whose_files_are_sent_for_long_gives_its_task_time(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks, "WAIT_TOLD_SECONDS", 0.5)
    monkeypatch.setattr(job_workflow, "LEAST_MINUTES", 0.0001)
    image = bridge.folder / "images" / TENANT / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png())
    await native.admin.set(models={"checkpoints": ["a.safetensors"]}, broken_routes={"/upload/*": 500})
    async with bridge.gpu(native, patience=replace(QUICK, silent=60.0)):
        job = await bridge.submit(
            template_id="image-to-image", controls=[{"image_url": image.as_uri(), "strength": 0.5}]
        )
        before = (await bridge.in_status(job["job_id"], "processing"))["estimated_time"]

        async def has_more_time() -> bool:
            return bool((await bridge.job(job["job_id"]))["estimated_time"] > before + 1 / 60)

        await bridge.until(has_more_time)
        await native.admin.set(broken_routes={})
        assert (await bridge.ended(job["job_id"]))["error_details"] is None


async def test_a_training_whose_dataset_is_sent_for_long_says_so(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "WAIT_TOLD_AFTER", timedelta(seconds=0.5))
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        training = await created(bridge)
        await native.admin.set(answer_delay_seconds=0.4)
        await post_action(bridge, training["training_id"], "start")

        async def said_again() -> bool:
            told = bridge.receiver.genuine(training["task_id"])
            return len([body for body in told if body["training_stage"] == "data_ingest"]) > 1

        await bridge.until(said_again)
        await post_action(bridge, training["training_id"], "cancel")


async def test_a_run_that_was_cut_is_measured(bridge: BridgePlatform, native: NativeServer) -> None:
    """Otherwise a task that runs out of time on a slow server does so again and again."""
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        job = await bridge.submit()
        await until_running(bridge, native)
        await handle_of(bridge, job).execute_update(
            ESTIMATE_UPDATE, RunEstimate(left_seconds=180.0, percent=30), result_type=JobView
        )
        await bridge.cancel(job["job_id"])
    assert await measured(bridge) == pytest.approx(90.0, rel=0.1), "the manifest says 2 s"
    larger = await bridge.submit(resolution="4k")
    assert larger["estimated_time"] == pytest.approx(6 * 90 / 60, rel=0.1), "the manifest says 6 s"


async def test_quick_runs_never_overrule_the_manifest_downwards(bridge: BridgePlatform, native: NativeServer) -> None:
    async with bridge.gpu(native):
        job = await bridge.submit()
        await bridge.ended(job["job_id"])
    assert await measured(bridge) == 1.0
    memo = await (await handle_of(bridge, job).describe()).memo()
    assert memo[SECONDS_MEMO] < memo[MANIFEST_MEMO] == 2.0


@pytest.mark.slow
async def test_a_job_that_waits_for_another_server_gives_its_task_time(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    """Its task's deadline runs since its first server took it."""
    await native.admin.set(broken_routes={"/prompt": 403})
    async with bridge.gpu(native):
        job = await bridge.submit()
        await bridge.in_status(job["job_id"], "processing")

        async def has_more_time() -> bool:
            return bool((await bridge.job(job["job_id"]))["estimated_time"] > 1.0)

        await bridge.until(has_more_time, seconds=60)
        assert bridge.receiver.genuine(job["task_id"])[-1]["job_status"] == "processing"
        await native.admin.set(broken_routes={})
        assert (await bridge.ended(job["job_id"]))["error_details"] is None
    assert len(await native.admin.runs()) >= 1
