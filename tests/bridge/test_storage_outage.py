"""Object storage that is away: servers run nothing for it, and what they have run is delivered afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest

from bridge import job_workflow, placement, result_copies
from bridge.calls import COPY_RESULTS, TAKE_SERVER, workflow_of
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, BridgePlatform, Json
from tests.bridge.test_jobs import _png as png


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait changes the estimate at once, and an estimate may be as short as the wait."""
    monkeypatch.setattr(placement, "WAIT_TOLD_AFTER", timedelta(seconds=0.5))
    monkeypatch.setattr(job_workflow, "LEAST_MINUTES", 0.0001)


@contextmanager
def away(bridge: BridgePlatform, *methods: str) -> Iterator[None]:
    """These methods of the bridge's storage fail."""

    async def refused(*_: Any, **__: Any) -> Any:
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        for method in methods:
            patch.setattr(bridge.bridge.storage, method, refused)
        yield


async def has_tried(bridge: BridgePlatform, job: Json, call: str, times: int = 2) -> bool:
    """Whether a call of the job is being tried for that many times at least."""
    described = await bridge.client.get_workflow_handle(workflow_of(job["job_id"])).describe()
    pending = described.raw_description.pending_activities
    return any(call == each.activity_type.name and each.attempt >= times for each in pending)


async def test_while_storage_is_away_no_server_takes_a_job_and_all_are_delivered_afterwards(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native) as worker:
        with away(bridge, "write"):
            first = await bridge.submit()
            await bridge.until(lambda: has_tried(bridge, first, COPY_RESULTS))
            before = (await bridge.job(first["job_id"]))["estimated_time"]
            waiting = [await bridge.submit() for _ in range(2)]

            async def has_more_time() -> bool:
                return bool((await bridge.job(first["job_id"]))["estimated_time"] > 2 * before)

            await bridge.until(has_more_time, seconds=30)
            assert [(await bridge.job(job["job_id"]))["job_status"] for job in waiting] == ["queued", "queued"]
            assert len(await native.admin.runs()) == 1
            assert "Object storage" in (await worker.missing())[0]
            assert worker.report().sick_since is not None
        for job in [first, *waiting]:
            state = await bridge.ended(job["job_id"])
            assert state["error_details"] is None, state
        assert await worker.missing() == []
    assert len(await native.admin.runs()) == 3


async def test_a_job_whose_files_cannot_be_read_now_waits_for_a_server_again(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    image = bridge.folder / "images" / TENANT / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png())
    await native.admin.set(models={"checkpoints": ["a.safetensors"]})
    async with bridge.gpu(native):
        with away(bridge, "size_bytes", "read_whole"):
            job = await bridge.submit(
                template_id="image-to-image", controls=[{"image_url": image.as_uri(), "strength": 0.5}]
            )
            await bridge.in_status(job["job_id"], "processing")
            await bridge.until(lambda: has_tried(bridge, job, TAKE_SERVER, 1))
            another = await bridge.submit()
            await bridge.until(lambda: has_tried(bridge, another, TAKE_SERVER, 1))
            assert (await bridge.job(another["job_id"]))["job_status"] == "queued"
            assert await native.admin.submissions() == []
        for each in (job, another):
            state = await bridge.ended(each["job_id"])
            assert state["error_details"] is None, state
    assert len(await native.admin.submissions()) == 2


async def test_a_job_one_of_whose_files_cannot_be_read_ends_and_other_jobs_go_on(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bridge.folder / "images" / TENANT / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png())
    await native.admin.set(models={"checkpoints": ["a.safetensors"]})
    reads = 0

    async def unreadable(_: str) -> AsyncIterator[bytes]:
        nonlocal reads
        reads += 1
        raise OSError("input/output error")
        yield b""

    async with bridge.gpu(native) as worker:
        monkeypatch.setattr(bridge.bridge.storage, "read", unreadable)
        job = await bridge.submit(
            template_id="image-to-image", controls=[{"image_url": image.as_uri(), "strength": 0.5}]
        )
        error = (await bridge.ended(job["job_id"]))["error_details"]
        assert (error["code"], error["retryable"]) == ("internal", True)
        assert "cannot be read" in error["message"]
        assert reads == placement.MAX_FAILED_RUNS
        assert await worker.missing() == []
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None
    assert len(await native.admin.submissions()) == 1


async def test_a_copy_waits_for_its_silent_server_and_then_moves_on(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_copies, "SILENT_SECONDS", 2.0)
    await native.admin.set(broken_routes={"/view": 500})
    async with bridge.gpu(native):
        job = await bridge.submit()
        await bridge.until(lambda: has_tried(bridge, job, COPY_RESULTS))

        async def waits_again() -> bool:
            return (await bridge.job(job["job_id"]))["job_status"] == "processing" and not await has_tried(
                bridge, job, COPY_RESULTS, 2
            )

        await bridge.until(waits_again)
        await native.admin.set(broken_routes={})
        state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None, state
