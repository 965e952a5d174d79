"""What a job delivers: all of what its template names, in whatever number, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import Client

from bridge.templates import TemplateProblem, load_template
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, running_bridge
from tests.bridge.template_folders import TWO_RESULTS, empty_image, node, save, written


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    folder = tmp_path / "templates"
    folder.mkdir()
    written(folder, "two-results", TWO_RESULTS, results=["First picture", "Second picture"])
    return folder


@pytest_asyncio.fixture
async def two_results(temporal_client: Client, tmp_path: Path, templates: Path) -> AsyncIterator[BridgePlatform]:
    async with running_bridge(temporal_client, tmp_path / "bridge", bridge_templates=[templates]) as platform:
        yield platform


async def test_a_half_result_is_none(two_results: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(lost_outputs=["9"])
    async with two_results.gpu(native):
        state = await two_results.ended((await two_results.submit(template_id="two-results"))["job_id"])
    assert state["error_details"]["code"] == "internal"
    assert state["error_details"]["node"] == "9"
    assert "'Second picture'" in state["error_details"]["message"]
    assert (state["result_urls"], state["actual_cost"]) == ([], None)


async def test_only_what_is_asked_for_runs(two_results: BridgePlatform, native: NativeServer) -> None:
    """Also where the server does not know `partial_execution_targets`: nodes that no result needs are not sent."""
    async with two_results.gpu(native):
        state = await two_results.ended((await two_results.submit(template_id="two-results"))["job_id"])
    assert len(state["result_urls"]) == 2
    (run,) = await native.admin.runs()
    assert sorted(run.nodes) == ["1", "2", "8", "9"]
    assert [submission.targets for submission in await native.admin.sent()] == [["8", "9"]]
    assert [submission.nodes for submission in await native.admin.sent()] == [["1", "2", "8", "9"]]


@pytest.mark.parametrize(
    ("last", "named"),
    [
        (node("PreviewImage", "Shown", images=["1", 0]), "'Shown' gives no result: PreviewImage only shows"),
        (node("PreviewAudio", "Shown", audio=["1", 0]), "'Shown' gives no result: PreviewAudio only shows"),
        (node("VHS_VideoCombine", "Shown", images=["1", 0], save_output=False), "'save_output' is false"),
    ],
)
def test_a_template_whose_result_is_a_preview_is_refused(tmp_path: Path, last: dict[str, object], named: str) -> None:
    folder = written(tmp_path, "shown", {"1": empty_image(), "2": last}, results=["Shown"])
    with pytest.raises(TemplateProblem, match=named):
        load_template(folder)


def test_a_result_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "twice", {"1": empty_image(), "2": save("Kept", "1")}, results=["Kept", "2"])
    with pytest.raises(TemplateProblem, match="named twice"):
        load_template(folder)
