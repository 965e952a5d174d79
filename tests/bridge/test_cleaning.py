"""What a job or training leaves on a server: nothing that another task could read."""

from __future__ import annotations

from pathlib import Path

from temporalio.client import Client

from bridge.calls import workflow_of
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, BridgePlatform, Json, running_bridge
from tests.bridge.template_folders import node, save, written
from tests.bridge.test_jobs import _png as png
from tests.bridge.test_trainings import MODELS, created, ended, file_of, post_action


def bytes_left(native: NativeServer, run_id: str, *folders: str) -> dict[str, int]:
    """Path below the server's folder → size, of every file of a job or training."""
    found = {}
    for folder in folders:
        for path in (native.folder / folder / "comfyui-temporal" / run_id).rglob("*"):
            if path.is_file():
                found[str(path.relative_to(native.folder))] = path.stat().st_size
    return found


async def is_closed(bridge: BridgePlatform, run_id: str) -> bool:
    described = await bridge.client.get_workflow_handle(workflow_of(run_id)).describe()
    return described.close_time is not None


async def history_of(bridge: BridgePlatform, native: NativeServer) -> Json:
    found: Json = (await bridge.http.get(f"{native.url}/history")).json()
    return found


async def test_a_delivered_job_leaves_no_picture_and_no_history(
    temporal_client: Client, tmp_path: Path, native: NativeServer
) -> None:
    graph = {
        "1": node("LoadImage", "Control", image="x.png"),
        "2": save("Kept", "1"),
        "3": node("PreviewImage", "Shown", images=["1", 0]),
    }
    manifest = '[[controls]]\nimage = "Control.image"\n'
    written(tmp_path / "templates", "seen", graph, results=["Kept"], manifest=manifest)
    theirs = native.folder / "output" / "theirs.png"
    theirs.write_bytes(b"of someone who uses this ComfyUI")
    async with running_bridge(temporal_client, tmp_path, bridge_templates=[tmp_path / "templates"]) as bridge:
        image = bridge.folder / "images" / TENANT / "a.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(png())
        await native.admin.set(extra_outputs=["temp", "subfolder"])
        async with bridge.gpu(native):
            job = await bridge.submit(template_id="seen", controls=[{"image_url": image.as_uri(), "strength": 1.0}])
            state = await bridge.ended(job["job_id"])
            assert state["error_details"] is None, state
            await bridge.until(lambda: is_closed(bridge, job["job_id"]))
        left = bytes_left(native, job["job_id"], "output", "input")
        assert len(left) == 2 and set(left.values()) == {0}, left
        assert not [path for path in (native.folder / "temp").rglob(f"*{job['job_id']}*/*") if path.stat().st_size]
        assert await history_of(bridge, native) == {}
        for url in state["result_urls"]:
            assert (await bridge.http.get(url)).content.startswith(b"\x89PNG")
    assert theirs.read_bytes() == b"of someone who uses this ComfyUI"


async def test_a_cancelled_job_leaves_nothing_either(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(hold=True)
    async with bridge.gpu(native):
        job = await bridge.submit()
        await bridge.until(lambda: is_running(native))
        await bridge.cancel(job["job_id"])
        await bridge.until(lambda: is_closed(bridge, job["job_id"]))
    assert await history_of(bridge, native) == {}


async def is_running(native: NativeServer) -> bool:
    return bool(await native.admin.runs())


async def test_what_is_trained_is_not_left_between_chunks_nor_afterwards(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        training = await created(bridge)
        training_id = training["training_id"]
        await post_action(bridge, training_id, "start")
        await bridge.until(lambda: has_chunk(native, 1))
        await native.admin.set(step_seconds=0.5)
        await bridge.until(lambda: has_chunk(native, 2))

        async def is_erased() -> bool:
            left = bytes_left(native, training_id, "output/loras")
            firsts = [size for name, size in left.items() if "epoch-0001" in name]
            return bool(firsts) and set(firsts) == {0}

        await native.admin.set(step_seconds=0.005)
        state = await ended(bridge, training_id)
        await bridge.until(is_erased)
        await bridge.until(lambda: is_closed(bridge, training_id))
    assert state["error_details"] is None, state
    left = bytes_left(native, training_id, "input", "output/loras")
    assert len(left) > 8 and set(left.values()) == {0}, left
    assert file_of(state["output"]["model_path"]).stat().st_size > 0


async def has_chunk(native: NativeServer, number: int) -> bool:
    return len(await native.admin.runs()) >= number


async def test_a_job_whose_server_is_away_is_delivered_all_the_same(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native):
        await native.admin.set(broken_routes={"/upload/*": 500, "/history": 500})
        state = await bridge.ended((await bridge.submit())["job_id"])
        assert state["error_details"] is None, state
        assert len(state["result_urls"]) == 1
