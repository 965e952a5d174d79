"""The list of templates: over the API, on the command line, and after a change of the files."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from temporalio.client import Client

from bridge.template_library import SHIPPED, load_library
from bridge.template_list import servers_of
from bridge.template_watch import TemplateWatch
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json, running_bridge
from tests.bridge.template_folders import empty_image, save, written
from tests.bridge.test_fleet import servers_seen

GRAPH = {"1": empty_image(), "2": save("Kept", "1")}


async def test_the_list_has_inputs_types_prices_and_who_can_run_it(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native, name="rack-7-of-acme"):
        servers = await servers_seen(bridge, 1)
        answer = await bridge.get("/templates")
        scopeless = await bridge.get("/templates", scopes=[])
    assert (answer.status_code, scopeless.status_code) == (200, 403)
    rows: dict[str, Json] = {row["template_id"]: row for row in answer.json()}
    assert sorted(rows) == ["image-to-image", "lora-train", "test-pattern", "text-to-image", "upscale"]
    text = rows["text-to-image"]
    assert text["inputs"] == {"prompt": "text", "negative_prompt": "text", "seed": "integer"}
    ratios = ["1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16"]
    assert text["extras"] == {
        "hires_fix": {"type": "boolean", "points": 8},
        "aspect_ratio": {"type": "choice", "choices": ratios, "points": 0},
        "steps": {"type": "integer", "minimum": 1, "maximum": 60, "points": 0},
    }
    assert (text["images"], rows["test-pattern"]["images"]) == ({"most": 16}, {"most": 1})
    assert {name: row["points"] for name, row in text["resolutions"].items()} == {"sd": 18, "hd": 24, "4k": 32}
    assert text["servers"] == {"total": 1, "fit": 0, "well": 0}
    assert rows["test-pattern"]["servers"] == {"total": 1, "fit": 1, "well": 1}
    assert rows["upscale"]["controls"] == [{"kind": None, "required": True, "strength": False}]
    assert rows["lora-train"]["base_models"] == {"base": {"points": 0}, "sdxl": {"points": 30}}
    assert "rack-7" not in answer.text, "a server's name is no tenant's affair"
    by_server = {template.template_id: servers_of(template, servers) for template in bridge.templates}
    assert by_server["test-pattern"] == {"rack-7-of-acme": "ok"}
    assert "ckpt_name" in by_server["text-to-image"]["rack-7-of-acme"]


@pytest_asyncio.fixture
async def reloading(temporal_client: Client, tmp_path: Path) -> AsyncIterator[tuple[BridgePlatform, TemplateWatch]]:
    folder = tmp_path / "templates"
    written(folder, "first", GRAPH, results=["Kept"])
    async with running_bridge(temporal_client, tmp_path, bridge_templates=[folder]) as platform:
        watch = platform.bridge.template_watch()
        watch._every_seconds = 0.05
        async with watch.watched():
            yield platform, watch


async def offered(bridge: BridgePlatform) -> set[str]:
    return {row["template_id"] for row in (await bridge.get("/templates")).json()} - set(load_shipped())


def load_shipped() -> list[str]:
    return [template.template_id for template in load_library(SHIPPED)]


async def test_a_template_is_added_changed_and_removed_without_a_restart(
    reloading: tuple[BridgePlatform, TemplateWatch], native: NativeServer, tmp_path: Path
) -> None:
    bridge, watch = reloading
    folder = tmp_path / "templates"
    written(folder, "second", GRAPH, results=["Kept"])

    async def is_offered(*names: str) -> bool:
        return await offered(bridge) == set(names)

    await bridge.until(lambda: is_offered("first", "second"))
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit(template_id="second"))["job_id"])
        assert state["error_details"] is None
    # A template that is wrong changes nothing: neither it nor the others are lost.
    graph = folder / "second" / "graph.json"
    graph.write_text("{")
    (folder / "first" / "manifest.toml").write_text("nonsense = ")

    async def is_read() -> bool:
        return watch._read == watch._signature()

    await bridge.until(is_read)
    assert await is_offered("first", "second")
    for path in (folder / "first").iterdir():
        path.unlink()
    graph.write_text(json.dumps(GRAPH))
    await bridge.until(lambda: is_offered("second"))


async def test_a_gpu_worker_judges_what_is_added(bridge: BridgePlatform, native: NativeServer, tmp_path: Path) -> None:
    written(tmp_path, "odd", {"1": empty_image(), "2": save("Kept", "1")}, results=["Kept"])
    library = load_library(SHIPPED, tmp_path)
    async with bridge.gpu(native) as worker:
        watch = TemplateWatch(
            library,
            [SHIPPED, tmp_path],
            on_change=lambda: worker.fitness.replace(library),
            every_seconds=0.05,
        )
        async with watch.watched():
            graph = {"1": empty_image() | {"class_type": "NoSuchNode"}, "2": save("Kept", "1")}
            written(tmp_path, "impossible", graph, results=["Kept"])

            async def is_judged() -> bool:
                return "impossible" in worker.fitness.missing and "odd" in worker.fitness.fit

            await bridge.until(is_judged)


async def test_the_command_prints_every_template(bridge: BridgePlatform) -> None:
    settings = {
        "COMFYUI_TEMPORAL_TEMPORAL_ADDRESS": bridge.client.service_client.config.target_host,
        "COMFYUI_TEMPORAL_BRIDGE_TASK_QUEUE": bridge.settings.bridge_task_queue,
    }
    for arguments in (["--json"], []):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bridge", "templates", *arguments),
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd()), **settings},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        if arguments:
            assert {row["template_id"] for row in json.loads(out)} == set(load_shipped())
        else:
            assert "extras.hires_fix: boolean, 8 points" in out.decode()
            assert "on no server: -" in out.decode()
