"""What the first bytes of a file show, and what only looks like a file that tasks take."""

from __future__ import annotations

import pytest

from comfyui_temporal.contracts.uploads import (
    HEAD_BYTES,
    SUFFIXES,
    file_type,
    parts_folder,
    upload_address,
    upload_id_of,
)

WEBM = b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm"
MATROSKA = WEBM.replace(b"\x84webm", b"\x88matroska")
OPUS = b"OggS\x00\x02" + b"\x00" * 20 + b"\x01\x13OpusHead"
THEORA = b"OggS\x00\x02" + b"\x00" * 20 + b"\x01\x2a\x80theora"


@pytest.mark.parametrize(
    ("head", "content_type"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b"RIFF\x00\x00\x00\x00WAVE", "audio/wav"),
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "video/mp4"),
        (b"\x00\x00\x00\x14ftypqt  ", "video/quicktime"),
        (b"\x00\x00\x10\x00moov", "video/quicktime"),
        (WEBM, "video/webm"),
        (b"ID3\x04\x00", "audio/mpeg"),
        (b"\xff\xfb\x90\x64", "audio/mpeg"),
        (b"fLaC\x00", "audio/flac"),
        (OPUS, "audio/ogg"),
        # What must not be taken for one of them.
        (b"\x00\x00\x00\x20ftypheic", None),
        (b"\x00\x00\x00\x20ftypavif", None),
        (b"\x00\x00\x00\x20ftypM4A ", None),
        (b"RIFF\x00\x00\x00\x00AVI ", None),
        (MATROSKA, None),
        (THEORA, None),
        (b"\xff\xf1\x50\x80", None),
        (b"\xff\xfe\x00\x00", None),
        (b"\xff\xff\xff\xff", None),
        (b"<svg xmlns=", None),
        (b"MZ\x90\x00", None),
        (b"PK\x03\x04", None),
        (b"", None),
        (b"\x00" * HEAD_BYTES, None),
    ],
)
def test_a_file_is_known_by_its_first_bytes(head: bytes, content_type: str | None) -> None:
    found = file_type(head)
    assert (found.content_type if found else None) == content_type
    if found is not None:
        assert found.content_type.startswith(found.kind.value)
        assert found.content_type in SUFFIXES


def test_an_address_gives_its_id_back_and_no_other_text_gives_one() -> None:
    assert upload_id_of(upload_address("inline-3f9c_A")) == "inline-3f9c_A"
    for text in ("upload:", "upload:a/b", "upload:a\n", "Upload:a", " upload:a", "a", "https://upload:a", "upload:ä"):
        assert upload_id_of(text) is None, text
    assert upload_id_of(f"upload:{parts_folder('a')}") is None
