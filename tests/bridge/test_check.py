"""A GPU worker's check of templates reports only what its server would really refuse."""

from __future__ import annotations

from pathlib import Path

from bridge.gpu_worker import check_templates
from bridge.native import NativeServer as NativeClient
from bridge.template_library import SHIPPED, load_library
from tests.bridge.native import NativeServer


async def problems_on(native: NativeServer, *folders: Path) -> list[str]:
    async with NativeClient(native.url) as server:
        return await check_templates(server, load_library(SHIPPED, *folders), "default")


async def test_a_server_with_a_checkpoint_can_run_every_shipped_template(native: NativeServer) -> None:
    await native.admin.set(models={"checkpoints": ["whatever.safetensors"]})
    assert await problems_on(native) == []


async def test_without_a_checkpoint_the_templates_that_need_one_are_named(native: NativeServer) -> None:
    problems = await problems_on(native)
    assert len(problems) == 3
    for template_id, problem in zip(("image-to-image", "lora-train", "text-to-image"), sorted(problems), strict=True):
        assert problem.startswith(f"template {template_id!r}: node ")
        assert "no installed model fits" in problem
        assert "this server has none at all" in problem
