"""Graphs of later ComfyUI versions: nodes that expand, block or are replaced, and inputs that bring others along."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bridge.file_types import type_of
from bridge.fitness import problems_of
from bridge.graph_check import graph_problems
from bridge.native import NativeServer as NativeClient
from bridge.native.history import result_of
from bridge.template_library import load_template
from bridge.templates import TemplateProblem
from comfyui_temporal.contracts.comfyui import JobRequest
from tests.bridge.native import NativeServer
from tests.bridge.native.definitions import RESIZE
from tests.bridge.platform import BridgePlatform

MANIFEST = """
template_id = "resize"
results = ["Save v1.5"]

[resolutions.sd]
seconds = 2
set = { "Resize.resize_type.width" = 512, "Save v1.5.filename_prefix" = "mine" }
[resolutions.hd]
seconds = 2
[resolutions.4k]
seconds = 2
"""
GRAPH: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {
        "class_type": "ResizeImageMaskNode",
        "inputs": {
            "input": ["1", 0],
            "resize_type": "scale dimensions",
            "resize_type.width": 64,
            "resize_type.height": 64,
            "others.image0": ["1", 0],
        },
        "_meta": {"title": "Resize"},
    },
    "3": {
        "class_type": "SaveImage",
        "inputs": {"images": ["2", 0], "filename_prefix": "resized"},
        "_meta": {"title": "Save v1.5"},
    },
}


def folder_of(tmp_path: Path, manifest: str = MANIFEST) -> Path:
    (tmp_path / "manifest.toml").write_text(manifest)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return tmp_path


def test_a_manifest_names_inputs_and_titles_with_dots(tmp_path: Path, bridge_request: JobRequest) -> None:
    rendered = load_template(folder_of(tmp_path)).render(bridge_request, job_id="job-1")
    assert rendered.graph["2"]["inputs"]["resize_type.width"] == 512  # type: ignore[index, call-overload]
    with pytest.raises(TemplateProblem, match=r"node 'Resize' has no input 'resize_type.depth'; it has input"):
        load_template(folder_of(tmp_path, MANIFEST.replace("type.width", "type.depth")))


@pytest.fixture
def bridge_request() -> JobRequest:
    return JobRequest(
        task_id="task-1",
        tenant_id="tenant-1",
        user_id="user-1",
        template_id="resize",
        prompt="",
        resolution="sd",
        priority="standard",
        callback_url="http://127.0.0.1/",
    )


async def test_a_graph_with_dynamic_inputs_is_right_for_the_check_and_the_server(
    native: NativeServer, tmp_path: Path
) -> None:
    template = load_template(folder_of(tmp_path))
    async with NativeClient(native.url) as server:
        assert problems_of(template, await server.node_types()) == []
        await server.submit(template.graph, "00000000-0000-4000-8000-000000000002")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"resize_type": "by magic"}, "'by magic' is not a choice"),
        ({"resize_type.height": None}, "input 'resize_type.height': missing"),
        ({"resize_type.width": 99_999}, "99999 is not between 0 and 16384"),
        ({"resize_type": "scale by multiplier"}, "input 'resize_type.multiplier': missing"),
        ({"others.image0": None}, "input 'others': missing"),
    ],
)
async def test_what_is_wrong_with_a_dynamic_input_is_found(
    native: NativeServer, changes: dict[str, Any], problem: str
) -> None:
    graph = copy.deepcopy(GRAPH)
    inputs = {**graph["2"]["inputs"], **changes}
    graph["2"]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    async with NativeClient(native.url) as server:
        found = graph_problems(graph, await server.node_types(), ["3"])
    assert any(problem in line for line in found), found


async def test_results_of_nodes_that_expand_or_loop_are_found(bridge: BridgePlatform, native: NativeServer) -> None:
    """Their files are in the history under ids that are not in the graph."""
    await native.admin.set(expanding=3)
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit())["job_id"])
    assert state["error_details"] is None
    assert len(state["result_urls"]) == 3


def test_a_file_is_a_result_once_and_of_its_own_node_only() -> None:
    file = {"filename": "a.png", "subfolder": "", "type": "output"}
    other = {"filename": "b.png", "subfolder": "", "type": "output"}
    entry = {
        "outputs": {"save": {"images": [file]}, "other.0.0.1": {"images": [other]}},
        "meta": {"save": {"display_node": "save"}, "other.0.0.1": {"display_node": "other"}},
    }
    assert [found.filename for found in result_of(entry, ["save"]).files] == ["a.png"]
    assert [found.filename for found in result_of(entry, ["other"]).files] == ["b.png"]


async def test_a_run_whose_results_a_node_blocked_ends_with_its_reason_and_is_not_tried_again(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(blocked="the picture is not safe")
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit())["job_id"])
    details = state["error_details"]
    assert (details["code"], details["retryable"]) == ("node_error", False)
    assert "the picture is not safe" in details["message"]


async def test_a_node_that_the_server_replaces_is_not_missing(bridge: BridgePlatform, native: NativeServer) -> None:
    graph = copy.deepcopy(GRAPH) | {"2": {"class_type": "OldInvert", "inputs": {"image": ["1", 0]}}}
    async with NativeClient(native.url) as server:
        assert any("OldInvert" in line for line in graph_problems(graph, await server.node_types(), ["3"]))
        await native.admin.set(replaced_nodes={"OldInvert": "ImageInvert"})
        assert graph_problems(graph, await server.node_types(), ["3"]) == []
        await server.submit(graph, "00000000-0000-4000-8000-000000000003")


@pytest.mark.parametrize(
    ("filename", "given", "stored"),
    [
        ("a.glb", "application/octet-stream", "model/gltf-binary"),
        ("a.flac", "", "audio/flac"),
        ("a.webp", "application/octet-stream; charset=utf-8", "image/webp"),
        ("a.png", "image/png", "image/png"),
        ("without", "application/octet-stream", "application/octet-stream"),
    ],
)
def test_a_stored_file_has_a_type_though_the_server_gives_none(filename: str, given: str, stored: str) -> None:
    assert type_of(filename, given) == stored


def test_the_stand_ins_dynamic_node_has_both_kinds_of_dynamic_inputs() -> None:
    kinds = {spec[0] for spec in RESIZE["input"]["required"].values()}
    assert {"COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"} <= kinds
