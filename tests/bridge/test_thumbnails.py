"""Small pictures on results' own addresses."""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from temporalio.client import Client

from bridge import thumbnails
from bridge.storage import Storage
from tests.activities.s3_bucket import BUCKET, s3
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, running_bridge

PROMPT = "a prompt that stays here"


def png(width: int = 2048, height: int = 1024, *, mode: str = "RGB") -> bytes:
    """A picture with a graph in it, as ComfyUI writes one."""
    text = PngInfo()
    text.add_text("prompt", PROMPT)
    out = io.BytesIO()
    picture = Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 20).convert(mode)
    if mode == "RGBA":
        picture.putalpha(128)
    picture.save(out, "PNG", pnginfo=text)
    return out.getvalue()


def photo() -> bytes:
    """A JPEG that lies on its side, with a name in its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = PROMPT
    out = io.BytesIO()
    Image.new("RGB", (2000, 1000), "navy").save(out, "JPEG", exif=exif)
    return out.getvalue()


async def stored(bridge: BridgePlatform, path: str, content: bytes) -> str:
    await bridge.bridge.storage.write(path, content)
    return bridge.bridge.signed.address(path, expires=int(time.time()) + 60)


async def test_a_picture_is_delivered_small_without_what_was_written_into_it(bridge: BridgePlatform) -> None:
    address = await stored(bridge, "results/job-small/a.png", png(mode="RGBA"))
    answer = await bridge.http.get(f"{address}&width=512")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert answer.headers["x-content-type-options"] == "nosniff"
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.size, picture.format, picture.mode) == ((512, 256), "WEBP", "RGBA")
    assert PROMPT.encode() not in answer.content
    whole = await bridge.http.get(address)
    assert whole.headers["content-type"] == "image/png" and PROMPT.encode() in whole.content
    head = await bridge.http.head(f"{address}&width=512")
    assert (head.content, int(head.headers["content-length"])) == (b"", len(answer.content))


async def test_a_photo_stands_upright_and_says_nothing_of_its_camera(bridge: BridgePlatform) -> None:
    address = await stored(bridge, "results/job-photo/a.jpg", photo())
    answer = await bridge.http.get(f"{address}&width=512")
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.size == (512, 1024), "upright"
    assert not picture.getexif() and PROMPT.encode() not in answer.content


async def test_it_is_made_once_and_lies_with_its_result(
    bridge: BridgePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = await stored(bridge, "results/job-once/a.png", png())
    first = await bridge.http.get(f"{address}&width=512")

    def never(content: bytes, width: int) -> bytes | None:
        raise AssertionError("it was made before")

    monkeypatch.setattr(thumbnails, "_made_small", never)
    again = await bridge.http.get(f"{address}&width=512")
    assert again.content == first.content
    assert await bridge.bridge.storage.size_bytes("results/job-once/.thumbnails/512/a.png.webp") == len(first.content)


@pytest.mark.parametrize(
    ("name", "content", "width"),
    [
        ("small.png", png(300, 300), 512),
        ("odd-width.png", png(), 777),
        ("broken.png", b"\x89PNG\r\n\x1a\n and nothing else", 512),
        ("video.mp4", b"0123456789", 512),
        ("scalable.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 512),
    ],
)
async def test_what_cannot_be_made_small_is_delivered_as_it_is(
    bridge: BridgePlatform, name: str, content: bytes, width: int
) -> None:
    address = await stored(bridge, f"results/job-whole/{name}", content)
    answer = await bridge.http.get(f"{address}&width={width}")
    assert (answer.status_code, answer.content) == (200, content)


async def test_a_width_opens_no_address_that_is_not_signed(bridge: BridgePlatform) -> None:
    address = await stored(bridge, "results/job-shut/a.png", png())
    for wrong in (address.replace("signature=", "signature=0"), address.replace("a.png", "b.png")):
        assert (await bridge.http.get(f"{wrong}&width=512")).status_code == 404


async def test_a_picture_of_too_many_points_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path.as_uri())
    await storage.write("results/job/a.png", content := png())
    monkeypatch.setattr(thumbnails, "MAX_PIXELS", 1_000_000)
    assert await thumbnails.Thumbnails(storage).of("results/job/a.png", len(content), 512) is None
    assert await thumbnails.Thumbnails(storage).of("results/job/a.png", 2**40, 512) is None


# Where the store signs addresses itself


@pytest_asyncio.fixture
async def on_s3(
    temporal_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[BridgePlatform]:
    """A bridge on a bucket, which signs the addresses of results itself."""
    async with (
        s3(monkeypatch),
        running_bridge(
            temporal_client, tmp_path, bridge_store_url=f"s3://{BUCKET}/kept", bridge_result_addresses="bridge"
        ) as platform,
    ):
        yield platform


async def test_a_result_in_a_bucket_is_led_on_to_and_has_a_small_picture_there(
    on_s3: BridgePlatform, native: NativeServer
) -> None:
    async with on_s3.gpu(native):
        state = await on_s3.ended((await on_s3.submit(resolution="4k"))["job_id"])
    (address,) = state["result_urls"]
    assert address.startswith(f"{on_s3.url}/comfyui/files/results/"), "the page knows it as one with small pictures"
    led = await on_s3.http.get(address)
    assert (led.status_code, led.content) == (307, b"")
    assert f"/{BUCKET}/kept/results/" in led.headers["location"] and "X-Amz-Signature" in led.headers["location"]
    whole = await on_s3.http.get(address, follow_redirects=True)
    small = await on_s3.http.get(f"{address}&width=512", follow_redirects=True)
    assert (whole.headers["content-type"], small.headers["content-type"]) == ("image/png", "image/webp")
    assert Image.open(io.BytesIO(small.content)).width == 512 < Image.open(io.BytesIO(whole.content)).width
    assert len(small.content) < len(whole.content)
    head = await on_s3.http.head(address)
    assert (head.status_code, int(head.headers["content-length"])) == (200, len(whole.content))


async def test_it_is_made_once_in_a_bucket_and_a_small_picture_is_not_read_again(
    on_s3: BridgePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = await stored(on_s3, "results/job-once/a.png", png())
    tiny = await stored(on_s3, "results/job-once/b.png", png(300, 300))
    first = [await on_s3.http.get(f"{address}&width=512", follow_redirects=True) for address in (large, tiny)]

    def never(content: bytes, width: int) -> bytes | None:
        raise AssertionError("it was looked at before")

    monkeypatch.setattr(thumbnails, "_made_small", never)
    again = [await on_s3.http.get(f"{address}&width=512", follow_redirects=True) for address in (large, tiny)]
    assert [answer.status_code for answer in again] == [200, 200]
    assert [answer.content for answer in again] == [answer.content for answer in first]
    assert first[1].headers["content-type"] != "image/webp"


async def test_a_bucket_is_led_on_to_by_a_signed_address_alone(on_s3: BridgePlatform) -> None:
    address = await stored(on_s3, "results/job-shut/a.png", png())
    for wrong in (address.replace("signature=", "signature=0"), address.replace("a.png", "b.png")):
        assert (await on_s3.http.get(f"{wrong}&width=512")).status_code == 404
    gone = on_s3.bridge.signed.address("results/job-shut/gone.png", expires=int(time.time()) + 60)
    assert (await on_s3.http.get(gone)).status_code == 404


async def test_by_default_a_store_that_signs_gives_the_addresses(
    temporal_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: NativeServer
) -> None:
    async with (
        s3(monkeypatch),
        running_bridge(temporal_client, tmp_path, bridge_store_url=f"s3://{BUCKET}/kept") as platform,
        platform.gpu(native),
    ):
        state = await platform.ended((await platform.submit())["job_id"])
    assert ["X-Amz-Signature" in url for url in state["result_urls"]] == [True]
