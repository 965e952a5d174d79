"""What of a dataset is trained on, and that nothing is left out in silence."""

from __future__ import annotations

import hashlib
import io

import pytest
from PIL import Image

from bridge.datasets import CorruptPicture, plan_of, read_picture
from comfyui_temporal.contracts.comfyui import DatasetFile
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json
from tests.bridge.test_trainings import MODELS, ended, post_action, training_body


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 90, 20)).save(file, kind)
    return file.getvalue()


def with_files(bridge: BridgePlatform, files: dict[str, bytes]) -> Json:
    """A request for a training whose snapshot has just these files."""
    body = training_body(bridge, pictures=0)
    folder = bridge.folder / "store" / "snapshots" / body["task_id"] / "cats" / "files"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        body["dataset"]["files"].append(
            {"path": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        )
    return body


MIXED = {
    **{f"bmp-{n}.bmp": picture("BMP") for n in range(10)},
    **{f"bmp-{n}.caption": b"a cat" for n in range(10)},
    "a.png": picture("PNG"),
    "a.txt": b"a dog",
    "b.avif": picture("AVIF"),
    "c.webp": picture("WEBP"),
    "alone.caption": b"of nothing",
    "notes.md": b"notes",
    "one/two/deep.png": picture("PNG"),
}


async def test_every_kind_is_trained_on_and_the_rest_is_said_to_be_left_out(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    body = with_files(bridge, MIXED)
    async with bridge.gpu(native):
        answer = await bridge.post("/training", body)
        assert answer.status_code == 202, answer.text
        summary = answer.json()["dataset_summary"]
        assert summary.startswith("Dataset: 13 pictures, 11 with a caption. 11 of them are converted to PNG.")
        assert "captions without a picture of their name: 1 file (alone.caption)" in summary
        assert "in a folder within a folder: 1 file (one/two/deep.png)" in summary
        assert "1 file (notes.md)" in summary
        training_id = answer.json()["training_id"]
        await native.admin.set(hold=True)
        await post_action(bridge, training_id, "start")

        async def ingested() -> set[str]:
            folder = native.folder / "input" / "comfyui-temporal" / training_id
            runs = await native.admin.runs()
            return {path.name for path in folder.rglob("*.*") if path.stat().st_size} if runs else set()

        found = await bridge.until(ingested)
        assert len(found) == 13 + 11
        assert {"bmp-0.png", "bmp-0.txt", "a.png", "a.txt", "b.png", "c.webp"} <= found
        await native.admin.set(hold=False)
        state = await ended(bridge, training_id)
    assert state["error_details"] is None, state
    assert state["checkpoint"]["step"] == 3 * 7, "thirteen pictures, two at a time"
    lines = [line["message"] for body in bridge.receiver.genuine(body["task_id"]) for line in body.get("log", [])]
    assert summary in lines


async def test_files_that_are_no_pictures_are_named_before_a_price_is_shown(bridge: BridgePlatform) -> None:
    files = {f"cat-{n}.png": b"<html>" for n in range(10)} | {"dog.png": picture("PNG")}
    answer = await bridge.post("/training", with_files(bridge, files))
    assert answer.status_code == 422, answer.text
    (field,) = answer.json()["detail"]["fields"]
    assert field.startswith("dataset.files: cat-0.png, cat-1.png")
    assert field.endswith("cat-7.png and 2 more: no pictures, whatever their names say")


async def test_a_picture_that_breaks_off_ends_the_training_by_name(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    body = with_files(bridge, {"a.png": picture("PNG"), "b.png": picture("PNG")[:-40]})
    async with bridge.gpu(native):
        training_id = (await bridge.post("/training", body)).json()["training_id"]
        await post_action(bridge, training_id, "start")
        state = await ended(bridge, training_id)
    assert state["error_details"]["code"] == "workflow_invalid"
    assert state["error_details"]["message"] == "dataset.files: b.png cannot be read: no pictures, or broken off."
    assert await native.admin.submissions() == []


def plan(*paths: str) -> dict[str, list[str]]:
    files = [DatasetFile(path=path, size_bytes=1, sha256="0" * 64) for path in paths]
    targets: dict[str, list[str]] = {}
    for placed in plan_of(files).placed:
        targets.setdefault(placed.file.path, []).append(placed.target)
    return targets


def test_a_converted_picture_never_replaces_another_and_keeps_its_caption() -> None:
    assert plan("a.png", "a.bmp", "a.avif", "a.txt") == {
        "a.png": ["a.png"],
        "a.bmp": ["a-bmp.png"],
        "a.avif": ["a-avif.png"],
        "a.txt": ["a-avif.txt", "a-bmp.txt", "a.txt"],
    }
    assert plan("b.bmp", "b.avif", "b.caption") == {
        "b.avif": ["b.png"],
        "b.bmp": ["b-bmp.png"],
        "b.caption": ["b.txt", "b-bmp.txt"],
    }


def test_the_better_caption_counts_and_the_other_is_left_out() -> None:
    files = [DatasetFile(path=path, size_bytes=1, sha256="0" * 64) for path in ("a.PNG", "a.caption", "a.txt")]
    found = plan_of(files)
    assert [(placed.file.path, placed.target) for placed in found.captions] == [("a.txt", "a.txt")]
    assert found.left_out == {"captions beside one in .txt": ["a.caption"]}
    assert found.uncaptioned == 0


@pytest.mark.parametrize("kind", ["BMP", "AVIF", "TIFF"])
def test_a_picture_of_another_kind_becomes_png(kind: str) -> None:
    with Image.open(io.BytesIO(read_picture(picture(kind), as_png=True))) as found:
        assert (found.format, found.size) == ("PNG", (16, 16))
    with pytest.raises(CorruptPicture):
        read_picture(picture(kind)[:60], as_png=True)
