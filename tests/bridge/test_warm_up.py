"""Warm-up runs: models are loaded before a job needs them, no job waits for that, and it costs nobody anything."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge.fitness import TemplateState
from bridge.gpu_worker import GpuWorker
from bridge.native import NativeServer as NativeClient
from bridge.server import QueueState, ServerUnavailable
from bridge.template_list import servers_of
from bridge.warm_up import MOST_LOSSES, PROMPT
from tests.bridge.native import NativeServer
from tests.bridge.platform import QUICK_WARM_UP, TENANT, BridgePlatform
from tests.bridge.test_cleaning import history_of
from tests.bridge.test_fleet import servers_seen
from tests.bridge.test_jobs import _png as png
from tests.bridge.test_servers import until_running
from tests.conftest import unique
from tests.waiting import comes_true

Servers = tuple[NativeServer, NativeServer]
MODELS = {"checkpoints": ["sd.safetensors"]}


async def is_warm(worker: GpuWorker) -> None:
    await comes_true(
        lambda: not worker.warm_ups.cold and not worker.slot.is_held, "the server is warm", within_seconds=20
    )
    assert worker.warm_ups.failed == {}


async def outcomes(native: NativeServer) -> list[str]:
    return [run.outcome for run in await native.admin.runs()]


async def delivered(bridge: BridgePlatform, **fields: str) -> None:
    state = await bridge.ended((await bridge.submit(**fields))["job_id"])
    assert state["error_details"] is None, state


async def state_shown(bridge: BridgePlatform, template_id: str) -> str:
    """What `python -m bridge templates` says of the only server."""
    bridge.bridge.forecast.forget()
    servers = await servers_seen(bridge, 1)
    [template] = [template for template in bridge.templates if template.template_id == template_id]
    return next(iter(servers_of(template, servers).values()))


async def test_a_server_that_comes_up_runs_the_template_once_and_keeps_nothing_of_it(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS, extra_outputs=["temp"])
    before = set(native.folder.rglob("*"))
    async with bridge.gpu(native, warm_up=["text-to-image", "image-to-image"]) as worker:
        await is_warm(worker)
        first, second = await native.admin.sent()
        assert first.graph["positive"]["inputs"]["text"] == second.graph["positive"]["inputs"]["text"] == PROMPT
        assert first.graph["canvas"]["inputs"]["width"] == second.graph["fitted"]["inputs"]["width"] == 512
        assert first.graph["checkpoint"]["inputs"]["ckpt_name"] == "sd.safetensors"
        assert await outcomes(native) == ["success", "success"]
        assert await history_of(bridge, native) == {}
        left = [path for path in {*native.folder.rglob("*")} - before if path.is_file() and "warm-up" in str(path)]
        written = [path for path in left if "output" in str(path)]
        assert len(written) == 2 and not any(path.stat().st_size for path in written)
        assert await bridge.bridge.forecast.slowness("text-to-image") is None, "it is no measured run"
        query = f"TaskQueue = '{bridge.settings.bridge_task_queue}' AND WorkflowType = 'ComfyUIJobWorkflow'"
        assert [found async for found in bridge.client.list_workflows(query)] == []
        assert bridge.receiver.arrivals == {}
        await bridge.until(lambda: _is_shown(bridge, "ok"))
        await delivered(bridge, template_id="text-to-image")
    assert len(await native.admin.submissions()) == 3, "no job brings another warm-up"


async def _is_shown(bridge: BridgePlatform, state: str) -> bool:
    return await state_shown(bridge, "text-to-image") == state


async def test_without_the_setting_nothing_is_run(bridge: BridgePlatform, native: NativeServer) -> None:
    async with bridge.gpu(native):
        await delivered(bridge)
    assert len(await native.admin.submissions()) == 1


async def test_a_job_that_waits_has_the_server_within_seconds_and_the_warm_up_comes_afterwards(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native, warm_up=["test-pattern"]) as worker:
        await until_running(bridge, native)
        assert "not warmed up yet" in await state_shown(bridge, "test-pattern")
        job = await bridge.submit(template_id="upscale", controls=[{"image_url": _picture(bridge)}])
        await bridge.until(lambda: _has_outcomes(native, ["interrupted", "running"]))
        assert worker.warm_ups.cold == ["test-pattern"]
        await native.admin.set(hold=False)
        assert (await bridge.ended(job["job_id"]))["error_details"] is None
        await is_warm(worker)
    assert await outcomes(native) == ["interrupted", "success", "success"]
    assert await history_of(bridge, native) == {}


async def _has_outcomes(native: NativeServer, wanted: list[str]) -> bool:
    return await outcomes(native) == wanted


def _picture(bridge: BridgePlatform) -> str:
    image = bridge.folder / "images" / TENANT / "a.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(png())
    return image.as_uri()


async def test_a_job_goes_to_a_server_that_is_free_and_not_to_one_that_warms_up(
    bridge: BridgePlatform, servers: Servers
) -> None:
    first, second = servers
    await first.admin.set(hold=True)
    async with bridge.gpu(first, warm_up=["test-pattern"]), bridge.gpu(second):
        await until_running(bridge, first)
        for _ in range(3):
            await delivered(bridge)
        assert await outcomes(first) == ["running"], "nothing waited, so it went on"
    assert await outcomes(second) == ["success"] * 3
    assert await outcomes(first) == ["interrupted"], "the worker was stopped"


@pytest.mark.slow
async def test_a_job_that_did_the_same_first_saves_the_warm_up(bridge: BridgePlatform, native: NativeServer) -> None:
    job = await bridge.submit()
    await bridge.until(lambda: _is_seen_waiting(bridge))
    async with bridge.gpu(native, warm_up=["test-pattern"]) as worker:
        assert (await bridge.ended(job["job_id"]))["error_details"] is None
        await is_warm(worker)
    assert len(await native.admin.submissions()) == 1


async def _is_seen_waiting(bridge: BridgePlatform) -> bool:
    """Temporal counts what waits every few seconds."""
    return (await bridge.bridge.forecast.backlog("default")).standard > 0


async def test_a_server_that_was_restarted_or_was_sick_is_warmed_up_again(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native, warm_up=["test-pattern"]) as worker:
        await is_warm(worker)
        await native.kill()
        await comes_true(lambda: worker.warm_ups._was_away, "its absence is noticed", within_seconds=10)
        await native.start()
        await comes_true(lambda: not worker.warm_ups._was_away, within_seconds=10)
        await is_warm(worker)
        assert len(await native.admin.submissions()) == 1, "counted from the restart"
        worker.health.fell_sick("in a test")
        await comes_true(lambda: worker.health.sickness is None, within_seconds=10)
        await bridge.until(lambda: _has_submitted(native, 3))
        await is_warm(worker)
        await delivered(bridge)


async def _has_submitted(native: NativeServer, number: int) -> bool:
    return len(await native.admin.submissions()) == number


async def test_a_warm_up_that_fails_is_shown_and_jobs_run_all_the_same(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS, fail_nodes={"KSampler": "no such sampler"})
    async with bridge.gpu(native, warm_up=["text-to-image"]) as worker:
        await comes_true(lambda: bool(worker.warm_ups.failed), "it failed", within_seconds=20)

        async def is_shown() -> bool:
            shown = await state_shown(bridge, "text-to-image")
            return shown.startswith("ok, but its warm-up failed: ") and "no such sampler" in shown

        await bridge.until(is_shown)
        assert worker.report().summary().endswith("well, warm-up failed: text-to-image")
        await delivered(bridge)
        assert worker.health.problem is None
        assert len(await native.admin.submissions()) == 2, "it is not tried again and again"
        await native.admin.set(fail_nodes={})
        await delivered(bridge, template_id="text-to-image")
        assert worker.warm_ups.failed == {}


async def test_a_warm_up_that_never_ends_makes_the_server_sick_until_it_does(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(stuck=True)
    quick = replace(QUICK_WARM_UP, within=1.0, stop=1.0)
    async with bridge.gpu(native, warm_up=["test-pattern"], warm_up_pace=quick) as worker:
        await comes_true(lambda: worker.health.sickness is not None, "it is sick", within_seconds=20)
        assert worker.health.sickness is not None and "did not stop" in worker.health.sickness.reason
        assert "did not end within 1 s" in worker.warm_ups.failed["test-pattern"]
        await native.admin.set(stuck=False)
        await comes_true(lambda: worker.health.sickness is None, "it is well again", within_seconds=20)
        await delivered(bridge)


class LateToQueue(NativeClient):
    """Its answers to submits are lost, and the prompts are queued half a second later."""

    def __init__(self, url: str) -> None:
        super().__init__(url, read_seconds=1.0)
        self.late: list[asyncio.Task[None]] = []

    async def submit(self, graph: Mapping[str, Any], prompt_id: str, result_nodes: Sequence[str] = ()) -> None:
        async def later() -> None:
            await asyncio.sleep(0.5)
            await super(LateToQueue, self).submit(graph, prompt_id, result_nodes)

        self.late.append(asyncio.create_task(later()))
        raise ServerUnavailable("no answer")


async def test_a_warm_up_that_is_queued_late_does_not_run_on(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    async with LateToQueue(native.url) as server, bridge.gpu_of(server, warm_up=["test-pattern"]) as worker:
        is_over = lambda: len(server.late) == MOST_LOSSES and not worker.slot.is_held  # noqa: E731
        await comes_true(is_over, within_seconds=20)
        assert all(late.done() for late in server.late)
        assert (await server.queue()).is_empty, "nobody waits for it"


class SometimesSilent(NativeClient):
    """It does not answer one look at its queue while it loads a model."""

    silent = 0
    looks = 0

    async def queue(self) -> QueueState:
        self.looks += 1
        if self.silent:
            self.silent -= 1
            raise ServerUnavailable("no answer in time")
        return await super().queue()


async def test_one_late_answer_makes_no_template_cold(bridge: BridgePlatform, native: NativeServer) -> None:
    async with (
        SometimesSilent(native.url, read_seconds=1.0) as server,
        bridge.gpu_of(server, warm_up=["test-pattern"]) as worker,
    ):
        await is_warm(worker)
        server.silent, looks = 3, server.looks
        await comes_true(lambda: server.looks > looks + 6, within_seconds=10)
        assert worker.warm_ups.cold == []
        assert len(await native.admin.submissions()) == 1


async def test_a_graph_that_takes_the_server_down_is_not_run_for_ever(bridge: BridgePlatform, tmp_path: Path) -> None:
    async with NativeServer(tmp_path, hold=True) as native, bridge.gpu(native, warm_up=["test-pattern"]) as worker:
        for _ in range(MOST_LOSSES):
            await until_running(bridge, native)
            await native.restart()
        await comes_true(lambda: not worker.warm_ups.cold and not worker.warm_ups._was_away, within_seconds=20)
        assert "test-pattern" in worker.warm_ups.failed
        await native.admin.set(hold=False)
        await delivered(bridge)
        assert worker.warm_ups.failed == {}
        assert len(await native.admin.submissions()) == 1


async def test_a_template_that_lacks_its_model_waits_for_it(bridge: BridgePlatform, native: NativeServer) -> None:
    async with bridge.gpu(native, warm_up=["text-to-image"]) as worker:
        await delivered(bridge)
        assert worker.fitness.state_of("text-to-image") is TemplateState.UNFIT
        assert (worker.warm_ups.cold, worker.warm_ups.failed) == (["text-to-image"], {})
        await native.admin.set(models=MODELS)
        await asyncio.sleep(2.0)  # within it a reading is not repeated
        await worker.fitness.refresh()
        await is_warm(worker)
    assert len(await native.admin.submissions()) == 2


async def test_a_name_that_no_template_of_images_has_is_a_sentence() -> None:
    for wanted, reason in (("text-to-imag", "there are image-to-image"), ("lora-train", "which no template of images")):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bridge.gpu_worker", "--server", "http://127.0.0.1:9", "--name", unique("gpu")),
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(Path.cwd()),
                "COMFYUI_TEMPORAL_BRIDGE_WARM_UP": f"test-pattern, {wanted}",
            },
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert f"BRIDGE_WARM_UP names {wanted}, which" in errors.decode() and reason in errors.decode()
