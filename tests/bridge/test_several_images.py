"""Several images of one task: one run, each at the price of one, delivered together or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from temporalio.client import Client

from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, running_bridge
from tests.bridge.template_folders import empty_image, save, written
from tests.bridge.test_trainings import MODELS

HD = 18 + 6


@pytest_asyncio.fixture
async def wrong(temporal_client: Client, tmp_path: Path) -> AsyncIterator[BridgePlatform]:
    """A bridge with a template whose manifest binds the number of images to an input that does not make them."""
    graph = {"1": empty_image(), "2": save("Kept", "1")}
    manifest = '[images]\ninputs = ["1.color"]\n'
    written(tmp_path / "templates", "wrong", graph, results=["Kept"], manifest=manifest)
    async with running_bridge(temporal_client, tmp_path, bridge_templates=[tmp_path / "templates"]) as platform:
        yield platform


async def test_three_images_are_delivered_by_one_run_at_three_times_the_price(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        job = await bridge.submit(template_id="text-to-image", resolution="hd", images=3)
        state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None
    assert len(set(state["result_urls"])) == 3
    assert job["estimated_cost"] == state["actual_cost"] == 3 * HD
    assert len(await native.admin.runs()) == 1


async def test_fewer_images_than_were_asked_for_are_none(wrong: BridgePlatform, native: NativeServer) -> None:
    async with wrong.gpu(native):
        state = await wrong.ended((await wrong.submit(template_id="wrong", images=2))["job_id"])
    assert state["error_details"]["code"] == "internal"
    assert state["error_details"]["message"] == "2 images were asked for, and ComfyUI returned 1."
    assert (state["result_urls"], state["actual_cost"]) == ([], None)


async def test_more_images_than_a_template_makes_are_refused_before_the_queue(bridge: BridgePlatform) -> None:
    for images in (2, 0, 17, "2", True):
        refused = await bridge.post("/jobs", bridge.job_body(template_id="test-pattern", images=images))
        assert refused.status_code == 422, images
        assert "images: " in str(refused.json()["detail"]["fields"]), images
