"""Results without the graph and the prompt that ComfyUI writes into them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from temporalio.client import Client

from bridge.file_metadata import _ogg_checked, without_metadata
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, running_bridge
from tests.bridge.template_folders import empty_image, save, written

SECRET = b"a lighthouse at dusk, class_type"


def stripped(content: bytes) -> bytes:
    return b"".join(without_metadata(io.BytesIO(content)))


def picture(kind: str) -> bytes:
    image, file = Image.linear_gradient("L").convert("RGB"), io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    if kind == "PNG":
        texts = PngInfo()
        for compressed in (False, True):
            texts.add_text("prompt", SECRET.decode(), zip=compressed)
        texts.add_itxt("workflow", SECRET.decode())
        image.save(file, kind, pnginfo=texts, exif=exif)
    elif kind == "JPEG":
        image.save(file, kind, exif=exif, comment=SECRET)
    else:
        image.save(file, kind, exif=exif, xmp=b"<x>" + SECRET + b"</x>")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_keeps_its_pixels_and_nothing_else(kind: str) -> None:
    content = picture(kind)
    assert SECRET in content
    with Image.open(io.BytesIO(content)) as before, Image.open(io.BytesIO(stripped(content))) as after:
        assert SECRET not in stripped(content)
        assert after.tobytes() == before.tobytes()
        assert not after.getexif()
        assert not {"prompt", "workflow", "comment", "exif", "xmp"} & set(after.info)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def element(number: int, content: bytes) -> bytes:
    return bytes.fromhex(f"{number:x}") + struct.pack(">Q", len(content) | 1 << 56) + content


FRAMES = b"frames" * 50
FILM = (
    box(b"ftyp", b"isom\0\0\0\0isom")
    + box(
        b"moov",
        box(b"mvhd", b"\0" * 20)
        + box(b"trak", box(b"tkhd", b"\0" * 20) + box(b"udta", SECRET))
        + box(b"udta", box(b"meta", SECRET)),
    )
    + box(b"mdat", FRAMES)
)
WEBM = element(0x1A45DFA3, b"head") + element(
    0x18538067, element(0x1549A966, b"info") + element(0x1254C367, SECRET) + element(0x1F43B675, FRAMES)
)


def ogg_page(content: bytes, number: int, lengths: list[int], flags: int = 0) -> bytes:
    head = b"OggS" + struct.pack("<BBQIII", 0, flags, 0, 7, number, 0) + bytes([len(lengths), *lengths])
    return _ogg_checked(head + content)


def ogg(begin: bytes, magic: bytes) -> bytes:
    """A stream whose comments need two pages."""
    texts = magic + struct.pack("<I", 4) + b"Lavf" + struct.pack("<I", 1) + struct.pack("<I", 70_000) + SECRET * 2_200
    texts, rest = texts[: 255 * 255], texts[255 * 255 :]
    lengths = [255] * (len(rest) // 255) + [len(rest) % 255]
    return (
        ogg_page(begin + b"identity", 0, [len(begin) + 8], flags=2)
        + ogg_page(texts, 1, [255] * 255)
        + ogg_page(rest, 2, lengths, flags=1)
        + ogg_page(FRAMES, 3, [255, len(FRAMES) - 255])
    )


OPUS, VORBIS = ogg(b"OpusHead", b"OpusTags"), ogg(b"\x01vorbis", b"\x03vorbis")
FLAC = b"fLaC" + b"\0\0\0\x22" + b"\0" * 34 + b"\x84" + len(SECRET).to_bytes(3, "big") + SECRET + FRAMES


@pytest.mark.parametrize("content", [FILM, WEBM, FLAC, OPUS, VORBIS])
def test_a_film_or_sound_loses_its_notes_and_nothing_moves(content: bytes) -> None:
    found = stripped(content)
    assert SECRET not in found
    assert (len(found), found.index(FRAMES)) == (len(content), content.index(FRAMES))


def test_an_empty_list_of_comments_ends_as_its_kind_does_and_each_page_has_its_checksum() -> None:
    pages = stripped(VORBIS).split(b"OggS")[1:]
    assert pages[1][27 - 4 + 255 :].startswith(b"\x03vorbis" + bytes(8) + b"\x01\0")
    assert all(_ogg_checked(b"OggS" + page) == b"OggS" + page for page in pages)


def test_an_mp3_loses_its_notes() -> None:
    assert stripped(b"ID3\4\0\0" + bytes([0, 0, 0, len(SECRET)]) + SECRET + FRAMES) == FRAMES


@pytest.mark.parametrize(
    "whole", [picture("PNG"), picture("JPEG"), picture("WEBP"), FILM, WEBM, FLAC, OPUS, b"ID3", b"", SECRET]
)
def test_a_file_that_ends_anywhere_is_copied_without_a_failure(whole: bytes) -> None:
    for length in range(0, min(len(whole), 400)):
        stripped(whole[:length])


@pytest.mark.parametrize("is_wanted", [False, True])
async def test_a_result_has_its_graph_only_if_the_template_says_so(
    temporal_client: Client, tmp_path: Path, native: NativeServer, is_wanted: bool
) -> None:
    manifest = "keep_metadata = true" if is_wanted else ""
    graph = {"1": empty_image(), "2": save("Kept", "1")}
    written(tmp_path / "templates", "kept", graph, results=["Kept"], manifest=manifest)
    async with running_bridge(temporal_client, tmp_path, bridge_templates=[tmp_path / "templates"]) as platform:
        content = await _delivered(platform, native)
    assert (b"SaveImage" in content) is is_wanted


async def _delivered(platform: BridgePlatform, native: NativeServer) -> bytes:
    async with platform.gpu(native):
        state = await platform.ended((await platform.submit(template_id="kept"))["job_id"])
    return (await platform.http.get(state["result_urls"][0])).content
