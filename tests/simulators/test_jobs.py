"""Image jobs: the state machine, GPUs, prices, results, cancel (contract §2)."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from comfyui_temporal.contracts.comfyui import JobAccepted, JobState
from proof.simulators.serving import Simulators, running_simulators
from tests.simulators.platform import Caller, Receiver, new_task, refusal

SLOW = 1.0
"""At this speed nothing moves unless the clock is advanced."""


@pytest.fixture
async def still(simulators: Simulators) -> Simulators:
    await simulators.admin.set_speed(SLOW)
    return simulators


async def test_a_standard_job_waits_40_percent_of_8_minutes_then_works_and_delivers(
    caller: Caller, still: Simulators
) -> None:
    submitted = await caller.submit(new_task(), resolution="4k", extras={"upscaler": "4x", "seed": 7})
    accepted = JobAccepted.model_validate(submitted)
    assert (accepted.job_status, accepted.estimated_time) == ("queued", 8.0)
    assert accepted.estimated_cost == 18 + 14 + 6

    await still.admin.advance(8 * 60 * 0.4 - 5)
    queued = await caller.job(accepted.job_id)
    assert (queued["job_status"], queued["queue_position"]) == ("queued", 0)
    assert queued["stage_progress"] >= 95

    await still.admin.advance(10)
    working = await caller.job(accepted.job_id)
    assert (working["job_status"], working["queue_position"]) == ("processing", None)
    now = (await still.admin.comfyui.clock()).now
    assert timedelta(0) < datetime.fromisoformat(working["next_eta"]) - now < timedelta(minutes=4.8)

    await still.admin.advance(8 * 60 * 0.6)
    state = JobState.model_validate(await caller.job(accepted.job_id))
    assert state.has_succeeded()
    assert (state.actual_cost, state.stage_progress, state.next_eta) == (38, 100, None)


async def test_estimates_are_real_minutes_at_the_present_speed(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(10)
    assert (await caller.submit(new_task()))["estimated_time"] == pytest.approx(0.8, abs=0.001)
    assert (await caller.submit(new_task(), priority="accelerated"))["estimated_time"] == pytest.approx(0.3, abs=0.001)


async def test_the_sequence_rises_with_every_change_that_is_shown_and_only_then(
    caller: Caller, still: Simulators
) -> None:
    job_id = (await caller.submit(new_task()))["job_id"]
    first, again = await caller.job(job_id), await caller.job(job_id)
    assert first == again
    states = [again]
    for _ in range(9):
        await still.admin.advance(60)
        states.append(await caller.job(job_id))
    for before, after in itertools.pairwise(states):
        assert after["sequence"] >= before["sequence"]
        assert (after["sequence"] == before["sequence"]) == (after == before)


@pytest.mark.parametrize(("resolution", "side"), [("sd", 512), ("hd", 1024), ("4k", 2048)])
async def test_results_are_png_files_of_the_resolutions_size(
    caller: Caller, simulators: Simulators, resolution: str, side: int
) -> None:
    job_id = (await caller.submit(new_task(), resolution=resolution))["job_id"]
    assert (await caller.http.get(f"{simulators.comfyui_url}/results/{job_id}/1.png")).status_code == 404
    await simulators.admin.comfyui.act(job_id, "finish")
    [url] = (await caller.job(job_id))["result_urls"]

    answer = await caller.http.get(url)

    assert answer.headers["content-type"] == "image/png"
    with Image.open(BytesIO(answer.content)) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (side, side))
        assert len(set(picture.resize((32, 32)).getcolors(1024) or [])) > 50, "a picture, not a plain colour"


async def test_the_prompt_and_seed_make_the_picture(caller: Caller, simulators: Simulators) -> None:
    async def drawn(prompt: str) -> bytes:
        job_id = (await caller.submit(new_task(), prompt=prompt, resolution="sd", extras={"seed": 1}))["job_id"]
        await simulators.admin.comfyui.act(job_id, "finish")
        return (await caller.http.get((await caller.job(job_id))["result_urls"][0])).content

    assert await drawn("a harbour") == await drawn("a harbour")
    assert await drawn("a harbour") != await drawn("a forest")


async def test_accelerated_goes_before_standard_when_gpus_are_scarce(caller: Caller, still: Simulators) -> None:
    await still.admin.comfyui.set_gpus("rtx4090", 1)
    running = (await caller.submit(new_task()))["job_id"]
    await still.admin.advance(200)
    standard = [(await caller.submit(new_task()))["job_id"] for _ in range(2)]
    accelerated = (await caller.submit(new_task(), priority="accelerated"))["job_id"]

    positions = [(await caller.job(job_id))["queue_position"] for job_id in (*standard, accelerated)]
    assert positions == [1, 2, 0]
    gpu = next(row for row in (await caller.comfyui("GET", "/gpus")).json() if row["gpu_type"] == "rtx4090")
    assert (gpu["total"], gpu["available"]) == (1, 0)
    assert gpu["accelerated_wait"] == pytest.approx((480 - 200 + 108) / 60, abs=0.1)

    order: list[str] = []
    for _ in range(40):
        await still.admin.advance(60)
        jobs = {job.run_id: job for job in await still.admin.comfyui.jobs()}
        assert sum(job.holds_gpu for job in jobs.values()) <= 1
        order += [job_id for job_id, job in jobs.items() if job.is_over and job_id not in order]
    assert order == [running, accelerated, *standard]


async def test_one_long_jump_ends_in_what_many_short_ones_do(caller: Caller, still: Simulators) -> None:
    await still.admin.comfyui.set_gpus("rtx4090", 1)
    jobs = [(await caller.submit(new_task()))["job_id"] for _ in range(3)]
    await still.admin.advance(192 + 3 * 288 - 10)
    assert [(await caller.job(job_id))["job_status"] for job_id in jobs] == ["delivery", "delivery", "processing"]


async def test_a_cancelled_job_ends_as_cancelled_and_frees_its_gpu(caller: Caller, still: Simulators) -> None:
    task = new_task()
    job_id = (await caller.submit(task))["job_id"]
    await still.admin.advance(300)
    assert (await still.admin.comfyui.jobs(task))[0].holds_gpu

    first = (await caller.comfyui("POST", f"/jobs/{job_id}/cancel", {}, key=f"{task}:cancel:1")).json()
    second = (await caller.comfyui("POST", f"/jobs/{job_id}/cancel", {}, key=f"{task}:cancel:2")).json()

    assert first["error_details"]["code"] == "cancelled"
    assert first["job_status"] == "processing"
    assert second == first == await caller.job(job_id)
    assert not (await still.admin.comfyui.jobs(task))[0].holds_gpu


async def test_a_queued_job_can_be_cancelled_and_a_delivered_one_stays(caller: Caller, simulators: Simulators) -> None:
    await simulators.admin.set_speed(SLOW)
    task = new_task()
    queued, delivered = [(await caller.submit(task))["job_id"] for _ in range(2)]
    await simulators.admin.comfyui.act(delivered, "finish")
    for number, job_id in enumerate((queued, delivered), start=1):
        await caller.comfyui("POST", f"/jobs/{job_id}/cancel", {}, key=f"{task}:cancel:{number}")
    assert (await caller.job(queued))["error_details"]["code"] == "cancelled"
    assert JobState.model_validate(await caller.job(delivered)).has_succeeded()


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"resolution": "8k"}, ("42201", "payload_invalid"), "resolution"),
        ({"prompt": 5}, ("42201", "payload_invalid"), "prompt"),
        ({"extras": {"turbo": True}}, ("42201", "payload_invalid"), "turbo"),
        ({"loras": [{"model_path": "file:///x", "strength": 1.0}]}, ("42201", "payload_invalid"), "loras.0.model_path"),
        ({"callback_url": "ftp://x"}, ("42201", "payload_invalid"), "callback_url"),
        ({"template_id": "lora-train"}, ("40402", "template_not_found"), None),
        ({"tenant_id": "tenant-other"}, ("40302", "authorization_missing"), None),
    ],
)
async def test_what_cannot_be_submitted_is_refused_by_name(
    caller: Caller, change: dict[str, Any], code: tuple[str, str], named: str | None
) -> None:
    task = new_task()
    answer = await caller.comfyui("POST", "/jobs", caller.job_body(task) | change, key=f"{task}:submit:1")
    assert refusal(answer)[1:] == code
    assert named is None or named in answer.json()["detail"]["fields"][0]
    assert await caller.simulators.admin.comfyui.jobs(task) == []


async def test_bytes_that_are_no_json_are_refused(caller: Caller, simulators: Simulators) -> None:
    url = f"{simulators.comfyui_url}/comfyui/v1/jobs"
    answer = await caller.http.post(url, content=b'{"task_id": NaN', headers=caller.headers("x:submit:1"))
    assert refusal(answer)[2] == "payload_invalid"


async def test_scopes_and_tenants_guard_jobs(caller: Caller) -> None:
    task = new_task()
    job_id = (await caller.submit(task))["job_id"]
    body = caller.job_body(task)
    for method, path, key, needed in (
        ("POST", "/jobs", f"{task}:submit:9", "comfyui.image.generate"),
        ("GET", f"/jobs/{job_id}", None, "task.read"),
        ("POST", f"/jobs/{job_id}/cancel", f"{task}:cancel:9", "task.cancel"),
        ("GET", "/gpus", None, "task.read"),
    ):
        others = [scope for scope in ("comfyui.image.generate", "task.read", "task.cancel") if scope != needed]
        answer = await caller.comfyui(method, path, body if key else None, key=key, scopes=others)
        assert refusal(answer) == (403, "40302", "authorization_missing")
    caller.tenant_id, caller.user_id = "tenant-other", "user-other"
    assert refusal(await caller.comfyui("GET", f"/jobs/{job_id}")) == (404, "40401", "job_not_found")


async def test_a_job_is_no_training(caller: Caller) -> None:
    job_id = (await caller.submit(new_task()))["job_id"]
    assert refusal(await caller.comfyui("GET", f"/training/{job_id}")) == (404, "40401", "training_not_found")


async def test_results_are_at_the_public_address_if_one_is_set(
    receiver: Receiver, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """In containers the worker's address of the service is none that a caller can open."""
    async with running_simulators(tmp_path, public_url="http://results.example") as simulators:
        caller = Caller(simulators, receiver, http)
        job_id = (await caller.submit(new_task()))["job_id"]
        await simulators.admin.comfyui.act(job_id, "finish")
        assert (await caller.job(job_id))["result_urls"] == [f"http://results.example/results/{job_id}/1.png"]
