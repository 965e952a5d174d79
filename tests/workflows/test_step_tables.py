"""The two step tables on the good path, and what an operator sees of them."""

from __future__ import annotations

import pytest

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended
from tests.workflows.platform import Platform

both_caches = pytest.mark.parametrize("cached_workflows", [None, 0], ids=["as set", "replayed"], indirect=True)


@both_caches
async def test_an_image_is_delivered_and_charged_once(platform: Platform) -> None:
    handle = await platform.start_image(resolution="4k", priority="accelerated", extras={"hires_fix": True})
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.charged == 18 + 14 + 12 + 8
    assert ending.result["result_urls"]
    assert ending.kinds[0] == "task.accepted -"
    assert "task.running processing" in ending.kinds
    assert ending.kinds[-2:] == ["credits.updated delivery", "task.completed delivery"]


@both_caches
async def test_a_training_is_delivered_and_charged_by_its_hours(platform: Platform) -> None:
    handle = await platform.start_training()
    ending = await ended(platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["output"]["model_path"]
    assert ending.result["credits"]["charged"] > 0
    stages = [event.stage for event in ending.events if event.stage]
    assert list(dict.fromkeys(stages)) == ["data_ingest", "training", "evaluating", "publishing"]
    assert "task.checkpoint training" in ending.kinds
