"""Jobs that name uploads, as control images and as the files of a template's extras."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import Client

from bridge.calls import CLEAR_UP, FETCH_CONTROLS, workflow_of
from bridge.manifest import MAX_FILES
from bridge.template_library import SHIPPED, load_library, load_template
from bridge.templates import TemplateProblem
from comfyui_temporal.contracts.prices import PriceTable
from tests.bridge.https_host import HttpsHosts, https_hosts
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, BridgePlatform, Json, running_bridge
from tests.bridge.template_folders import empty_image, node, save, written
from tests.bridge.test_cleaning import bytes_left, is_closed
from tests.bridge.test_jobs import _is_cleared as is_cleared
from tests.bridge.test_jobs import _png as png
from tests.bridge.test_loras_by_address import HOST, reached
from tests.bridge.test_warm_up import is_warm

WAV = b"RIFF\x00\x00\x00\x00WAVEfmt sound"
MP4 = b"\x00\x00\x00\x20ftypisom" + b"a video." * 400_000
GRAPH = {
    "1": empty_image(),
    "2": node("LoadImageMask", "Mask", image="none.png", channel="red"),
    "3": node("MaskToImage", "Mask as picture", mask=["2", 0]),
    "4": save("Kept", "1"),
    "5": node("PrimitiveString", "Sound", value="no sound"),
    "6": node("PrimitiveString", "Film", value="no film"),
    "7": node("PreviewAny", "Told of sound", source=["5", 0]),
    "8": node("PreviewAny", "Told of film", source=["6", 0]),
}
MANIFEST = """
[extras.mask]
type = "mask"
inputs = ["Mask.image"]
set = { "Kept.images" = ["Mask as picture", 0] }

[extras.sound]
type = "audio"
inputs = ["Sound.value"]
seconds_factor = 2

[extras.film]
type = "video"
inputs = ["Film.value"]
"""


@pytest_asyncio.fixture
async def filed(temporal_client: Client, tmp_path: Path) -> AsyncIterator[BridgePlatform]:
    """A bridge with a template that takes a mask, a sound and a video."""
    written(
        tmp_path / "templates", "files", GRAPH, results=["Kept", "Told of sound", "Told of film"], manifest=MANIFEST
    )
    prices = PriceTable(extras={"mask": 0, "sound": 5, "film": 7})
    async with running_bridge(
        temporal_client, tmp_path, bridge_templates=[tmp_path / "templates"], prices=prices
    ) as bridge:
        yield bridge


def uploaded(bridge: BridgePlatform, upload_id: str, content: bytes, tenant_id: str = TENANT) -> str:
    """The address of a whole upload."""
    place = bridge.folder / "uploads" / tenant_id / upload_id
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return f"upload:{upload_id}"


async def test_an_upload_is_the_control_image_of_a_job(bridge: BridgePlatform, native: NativeServer) -> None:
    address = uploaded(bridge, "one", png())
    async with bridge.gpu(native):
        job = await bridge.submit(template_id="upscale", controls=[{"image_url": address, "strength": 1.0}])
        state = await bridge.ended(job["job_id"])
        assert state["error_details"] is None, state
        await bridge.until(lambda: is_cleared(bridge))


async def test_files_of_extras_reach_the_graph_by_their_kind_and_are_removed_afterwards(
    filed: BridgePlatform, native: NativeServer
) -> None:
    """A mask and a sound from uploads, a video from the tenant's own storage, beside nothing else."""
    film = filed.folder / "images" / TENANT / "a.mp4"
    film.parent.mkdir(parents=True)
    film.write_bytes(MP4)
    extras = {"sound": uploaded(filed, "s", WAV), "film": film.as_uri(), "mask": uploaded(filed, "m", png())}
    await native.admin.set(hold=True)
    async with filed.gpu(native):
        job = await filed.submit(template_id="files", extras=extras)
        assert job["estimated_cost"] == 18 + 0 + 5 + 7
        own = native.folder / "input" / "comfyui-temporal" / job["job_id"]

        async def runs() -> bool:
            return bool(await native.admin.runs())

        await filed.until(runs)
        assert {path.name: path.read_bytes() for path in own.iterdir()} == {
            "control-0.png": png(),
            "control-1.wav": WAV,
            "control-2.mp4": MP4,
        }
        await native.admin.set(hold=False)
        state = await filed.ended(job["job_id"])
        assert state["error_details"] is None, state
        await filed.until(lambda: is_closed(filed, job["job_id"]))
    below = f"comfyui-temporal/{job['job_id']}"
    assert await told(filed, state) == [f"{below}/control-1.wav", f"{below}/control-2.mp4"]
    assert "2" in (await native.admin.runs())[0].nodes
    left = bytes_left(native, job["job_id"], "input")
    assert len(left) == 3 and set(left.values()) == {0}, left
    await filed.until(lambda: is_cleared(filed))


async def told(bridge: BridgePlatform, state: Json) -> list[str]:
    """What the graph has loaded: the texts among a job's results."""
    return [(await bridge.http.get(url)).text for url in state["result_urls"][1:]]


async def test_a_file_that_is_not_given_changes_nothing(filed: BridgePlatform, native: NativeServer) -> None:
    async with filed.gpu(native):
        state = await filed.ended((await filed.submit(template_id="files"))["job_id"])
    assert state["error_details"] is None, state
    assert await told(filed, state) == ["no sound", "no film"]
    assert "2" not in (await native.admin.runs())[0].nodes


@pytest.mark.parametrize(
    ("extras", "problem"),
    [
        ({"mask": "upload:unknown"}, "extras.mask: there is no complete upload unknown of this tenant"),
        ({"mask": "upload:theirs"}, "extras.mask: there is no complete upload theirs of this tenant"),
        ({"mask": "upload:../tenant-other/theirs"}, "extras.mask: must be upload:UPLOAD_ID"),
        ({"mask": "file:///etc/passwd"}, "extras.mask: is not below a folder of the tenant's images"),
        ({"mask": "http://127.0.0.1/a.png"}, "extras.mask: must be an https:// address, an upload"),
        ({"mask": "comfyui-temporal/job-1/control-0.png"}, "extras.mask: must be an https:// address"),
        ({"mask": True}, "extras.mask: must be the address of a file of kind mask"),
        ({"sound": ""}, "extras.sound: must be the address of a file of kind audio"),
        ({"sound": "x" * 3_000}, "extras.sound: must be the address of a file of kind audio"),
    ],
)
async def test_a_file_that_cannot_be_used_is_refused_before_anything_is_queued(
    filed: BridgePlatform, extras: dict[str, Any], problem: str
) -> None:
    uploaded(filed, "theirs", png(), "tenant-other")
    answer = await filed.post("/jobs", filed.job_body(template_id="files", extras=extras))
    assert (answer.status_code, answer.json()["detail"]["message"]) == (422, "payload_invalid"), answer.text
    assert any(problem in field for field in answer.json()["detail"]["fields"]), answer.text


async def test_another_tenants_upload_is_no_control_image(bridge: BridgePlatform) -> None:
    address = uploaded(bridge, "theirs", png(), "tenant-other")
    body = bridge.job_body(template_id="upscale", controls=[{"image_url": address}])
    answer = await bridge.post("/jobs", body)
    assert answer.status_code == 422, answer.text
    assert "controls.0.image_url: there is no complete upload theirs" in answer.json()["detail"]["fields"][0]


async def test_a_file_of_another_kind_fails_the_job_by_the_extras_name(filed: BridgePlatform) -> None:
    """The gateway tells it before; a task that was started past it learns it here."""
    job = await filed.submit(template_id="files", extras={"sound": uploaded(filed, "film", MP4)})
    error = (await filed.ended(job["job_id"]))["error_details"]
    assert error["code"] == "workflow_invalid"
    assert error["message"] == "The file of extras.sound cannot be used: it is not a WAV, MP3, FLAC or Ogg sound."


async def test_the_list_of_templates_names_the_kinds_of_files(filed: BridgePlatform) -> None:
    row = next(row for row in (await filed.get("/templates")).json() if row["template_id"] == "files")
    assert row["extras"] == {
        "mask": {"type": "mask", "required": False, "points": 0},
        "sound": {"type": "audio", "required": False, "points": 5},
        "film": {"type": "video", "required": False, "points": 7},
    }


async def test_a_file_that_a_template_needs_must_be_given(temporal_client: Client, tmp_path: Path) -> None:
    manifest = '[extras.mask]\ntype = "mask"\ninputs = ["Mask.image"]\nrequired = true\n'
    written(tmp_path / "templates", "needs", GRAPH, results=["Kept"], manifest=manifest)
    async with running_bridge(temporal_client, tmp_path, bridge_templates=[tmp_path / "templates"]) as bridge:
        answer = await bridge.post("/jobs", bridge.job_body(template_id="needs"))
    assert answer.status_code == 422
    assert "extras.mask: template 'needs' needs it" in answer.json()["detail"]["fields"][0]


async def test_a_template_that_needs_a_mask_is_warmed_up_with_a_grey_one(
    bridge: BridgePlatform, native: NativeServer, tmp_path: Path
) -> None:
    manifest = MANIFEST.replace('type = "mask"', 'type = "mask"\nrequired = true')
    written(tmp_path / "templates", "needs", GRAPH, results=["Kept"], manifest=manifest)
    bridge.templates = list(load_library(SHIPPED, tmp_path / "templates"))
    async with bridge.gpu(native, warm_up=["needs"]) as worker:
        await is_warm(worker)
    assert [run.outcome for run in await native.admin.runs()] == ["success"]
    assert "2" in (await native.admin.runs())[0].nodes


def test_a_manifest_with_too_many_files_or_a_wrong_input_is_refused(tmp_path: Path) -> None:
    many = "".join(f'[extras.f{n}]\ntype = "image"\ninputs = ["Mask.image"]\n' for n in range(MAX_FILES + 1))
    wrong = '[extras.mask]\ntype = "mask"\ninputs = ["Mask.picture"]\n'
    for name, manifest, reason in (("many", many, f"at most {MAX_FILES}"), ("wrong", wrong, "has no input 'picture'")):
        folder = written(tmp_path, name, GRAPH, results=["Kept"], manifest=manifest)
        with pytest.raises(TemplateProblem, match=reason):
            load_template(folder)


@pytest_asyncio.fixture
async def hosted(temporal_client: Client, tmp_path: Path) -> AsyncIterator[tuple[BridgePlatform, HttpsHosts]]:
    """As `filed`, with a public host that files may come from."""
    written(
        tmp_path / "templates", "files", GRAPH, results=["Kept", "Told of sound", "Told of film"], manifest=MANIFEST
    )
    settings: dict[str, Any] = {"bridge_templates": [tmp_path / "templates"], "bridge_image_hosts": [HOST]}
    prices = PriceTable(extras={"mask": 0, "sound": 5, "film": 7})
    async with (
        https_hosts(tmp_path, HOST) as hosts,
        running_bridge(temporal_client, tmp_path, prices=prices, **settings) as bridge,
    ):
        reached(bridge.bridge.images.hosts, hosts)
        hosts.files |= {f"{HOST}/mask.png": png(), f"{HOST}/film.mp4": MP4}
        yield bridge, hosts


EXTRAS = {"mask": f"https://{HOST}/mask.png", "film": f"https://{HOST}/film.mp4"}


async def test_a_file_that_was_fetched_is_not_fetched_again_with_the_next_one(
    hosted: tuple[BridgePlatform, HttpsHosts], native: NativeServer
) -> None:
    bridge, hosts = hosted
    hosts.statuses[f"{HOST}/film.mp4"] = 503
    async with bridge.gpu(native):
        job = await bridge.submit(template_id="files", extras=EXTRAS)

        async def was_tried_again() -> bool:
            return hosts.requests.count(f"{HOST}/film.mp4") > 1

        await bridge.until(was_tried_again)
        del hosts.statuses[f"{HOST}/film.mp4"]
        state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None, state
    assert hosts.requests.count(f"{HOST}/mask.png") == 1


async def test_a_fetch_that_was_cancelled_leaves_nothing(hosted: tuple[BridgePlatform, HttpsHosts]) -> None:
    bridge, hosts = hosted
    rest = hosts.halfway[f"{HOST}/film.mp4"] = asyncio.Event()
    job = await bridge.submit(template_id="files", extras=EXTRAS)

    async def is_halfway() -> bool:
        return f"{HOST}/film.mp4" in hosts.requests

    await bridge.until(is_halfway)
    await bridge.cancel(job["job_id"])
    rest.set()
    await bridge.until(lambda: is_closed(bridge, job["job_id"]))
    history = await bridge.client.get_workflow_handle(workflow_of(job["job_id"])).fetch_history()
    scheduled = {
        event.activity_task_scheduled_event_attributes.activity_type.name: event.event_id for event in history.events
    }
    ended = next(
        event.event_id
        for event in history.events
        for end in (event.activity_task_canceled_event_attributes, event.activity_task_completed_event_attributes)
        if end.scheduled_event_id == scheduled[FETCH_CONTROLS]
    )
    cleared = scheduled[CLEAR_UP]
    assert ended < cleared, "what the fetch still wrote would stay"
    assert not list((bridge.folder / "objects" / "controls").rglob("*.*"))
    assert await is_cleared(bridge)
