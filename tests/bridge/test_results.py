"""What a job delivers: all of what its template names, in whatever number, and nothing else."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest
import pytest_asyncio
from PIL import Image
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from bridge.graphs import file_names
from bridge.job_activities import JobActivities
from bridge.orders import StoredResult
from bridge.result_files import own_names
from bridge.server import ResultFile
from bridge.storage import Storage
from bridge.template_library import load_template
from bridge.templates import TemplateProblem
from comfyui_temporal.contracts.comfyui import JobState
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


# Many results


@pytest.fixture
def many(templates: Path) -> None:
    for count in (65, 1_001):
        graph = {"1": empty_image(batch_size=count), "2": save("Kept", "1")}
        written(templates, f"many-{count}", graph, results=["Kept"])


@pytest.mark.usefixtures("many")
async def test_more_results_than_a_job_names_are_delivered_in_a_bundle(
    two_results: BridgePlatform, native: NativeServer
) -> None:
    async with two_results.gpu(native):
        state = await two_results.ended((await two_results.submit(template_id="many-65"))["job_id"])
    assert state["error_details"] is None, state
    JobState.model_validate(state)
    urls = state["result_urls"]
    assert len(urls) == 64
    bundle = zipfile.ZipFile(io.BytesIO((await two_results.http.get(urls[-1])).content))
    assert bundle.namelist() == ["kept-64.png", "kept-65.png"]
    for content in [(await two_results.http.get(urls[0])).content, bundle.read("kept-65.png")]:
        assert Image.open(io.BytesIO(content)).size == (64, 64)


@pytest.mark.usefixtures("many")
async def test_more_than_can_be_delivered_ends_the_job_and_costs_nothing(
    two_results: BridgePlatform, native: NativeServer
) -> None:
    async with two_results.gpu(native):
        state = await two_results.ended((await two_results.submit(template_id="many-1001"))["job_id"])
    assert (state["error_details"]["code"], state["error_details"]["retryable"]) == ("workflow_invalid", False)
    assert "1001 results" in state["error_details"]["message"]
    assert (state["result_urls"], state["actual_cost"]) == ([], None)


async def test_texts_that_are_too_long_end_the_job(two_results: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(extra_outputs=["text"], text_bytes=2 * 1024 * 1024)
    async with two_results.gpu(native):
        state = await two_results.ended((await two_results.submit(template_id="two-results"))["job_id"])
    assert state["error_details"]["code"] == "workflow_invalid"
    assert "at most 1,048,576 can be delivered" in state["error_details"]["message"]


async def test_an_address_that_the_store_makes_too_long_is_the_bridges_own(two_results: BridgePlatform) -> None:
    storage = LongAddresses(two_results.bridge.storage.url)
    jobs = JobActivities(storage, two_results.bridge.images, two_results.bridge.loras, two_results.bridge.signed)
    await storage.write("results/job-1/a.png", b"picture")
    urls = await jobs.sign_results([StoredResult(path="results/job-1/a.png", content_type="image/png", size_bytes=7)])
    assert [len(url) < 2_048 for url in urls] == [True]
    assert (await two_results.http.get(urls[0])).content == b"picture"


class LongAddresses(Storage):
    """A store that signs with an address of 3,000 bytes, as with a session's token in it."""

    async def signed_by_store(self, path: str, seconds: int) -> str | None:
        return f"https://store.example/{path}?token={'x' * 3_000}"


@pytest.mark.parametrize("count", [65, 64])
async def test_a_delivery_that_no_job_can_carry_is_refused_for_good(bridge: BridgePlatform, count: int) -> None:
    jobs = JobActivities(bridge.bridge.storage, bridge.bridge.images, bridge.bridge.loras, bridge.bridge.signed)
    stored = [StoredResult(path=f"results/job-1/{n}.png", content_type="image/png", size_bytes=7) for n in range(count)]
    if count == 64:
        assert len(await jobs.sign_results(stored)) == 64
        return
    with pytest.raises(ApplicationError) as refused:
        await jobs.sign_results(stored)
    assert (refused.value.type, refused.value.non_retryable) == ("workflow_invalid", True)


# Names


def file(name: str, subfolder: str = "comfyui-temporal/job-1") -> ResultFile:
    return ResultFile(node="9", kind="images", filename=name, subfolder=subfolder)


def test_names_are_readable_and_never_equal() -> None:
    files = [file("save-image_00001_.png"), file("a b.png"), file("a_b.png"), file("A_B.PNG"), file("text-1.txt")]
    assert own_names(files, 1, "job-1") == [
        *("save-image-1.png", "a_b.png", "a_b-2.png", "A_B-3.PNG", "text-1.txt"),
        "text-1-2.txt",
    ]
    assert own_names([file("a.png", ""), file("a.png", "deep/er")], 0, "job-1") == ["a.png", "deep/er/a.png"]


def test_a_long_name_in_any_script_makes_no_long_address() -> None:
    (name,) = own_names([file("画" * 110 + ".png", "/".join(["夹" * 100] * 9))], 0, "job-1")
    assert name.endswith(".png")
    assert len(quote(name)) <= 480


def test_files_have_the_names_of_their_nodes() -> None:
    graph = {"8": save("Große Bilder!", "1"), "9": save("Save", "1"), "10": save("Save", "1"), "11": save("画", "1")}
    assert file_names(graph, list(graph)) == {"8": "gro-e-bilder", "9": "save-9", "10": "save-10", "11": "11"}


# Files over HTTP


@pytest_asyncio.fixture
async def stored(bridge: BridgePlatform) -> str:
    """The address of a result of ten bytes."""
    await bridge.bridge.storage.write("results/job-1/a.mp4", b"0123456789")
    return bridge.bridge.signed.address("results/job-1/a.mp4", expires=int(time.time()) + 60)


@pytest.mark.parametrize(
    ("asked", "status", "content", "part"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
        ("bytes=4-2", 200, b"0123456789", None),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
    ],
)
async def test_a_part_of_a_result_is_what_a_player_asks_for(
    bridge: BridgePlatform, stored: str, asked: str, status: int, content: bytes, part: str | None
) -> None:
    answer = await bridge.http.get(stored, headers={"Range": asked})
    assert (answer.status_code, answer.content, answer.headers.get("content-range")) == (status, content, part)


async def test_a_head_says_what_a_get_would_bring(bridge: BridgePlatform, stored: str) -> None:
    head = await bridge.http.head(stored)
    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["content-length"], head.headers["accept-ranges"]) == ("10", "bytes")
    assert head.headers["content-type"] == "video/mp4"
    assert 'filename="a.mp4"' in head.headers["content-disposition"]
    assert (await bridge.http.head(stored.replace("signature=", "signature=0"))).status_code == 404
