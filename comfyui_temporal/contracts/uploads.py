"""Uploaded files (contract §6): how a task names one, where it lies, and what its first bytes show it to be."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final, NamedTuple

from pydantic import Field

from comfyui_temporal.contracts.fields import Instant, OwnModel

UPLOAD_PREFIX: Final = "upload:"
HEAD_BYTES: Final = 512
"""So many first bytes show what a file is."""
MAX_IMAGE_BYTES: Final = 20 * 1024 * 1024
_UPLOAD_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PARTS: Final = ".parts"
"""Not in any id: no upload lies where the parts of another do."""
_UPLOAD_PATH: Final = re.compile(rf"{_UPLOAD_ID.pattern}/{_UPLOAD_ID.pattern}(?:{re.escape(_PARTS)}/[^/]+)?")


class FileKind(StrEnum):
    """What a file is."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"


class InputKind(StrEnum):
    """What a template takes. A mask is an image."""

    IMAGE = "image"
    MASK = "mask"
    VIDEO = "video"
    AUDIO = "audio"

    @property
    def file(self) -> FileKind:
        return FileKind.IMAGE if self is InputKind.MASK else FileKind(self.value)


class FileType(NamedTuple):
    """What the first bytes of a file show."""

    kind: FileKind
    content_type: str


class UploadView(OwnModel):
    """An upload. `kind` and `content_type` are those of its bytes, null until enough of them are there."""

    upload_id: str
    address: str
    """`upload:UPLOAD_ID`: how a task names it."""
    kind: FileKind | None = None
    content_type: str | None = None
    size_bytes: int = Field(ge=0)
    received_bytes: int = Field(ge=0)
    is_whole: bool
    """Whether a task may name it."""
    sha256: str | None = None
    expires_at: Instant


def upload_address(upload_id: str) -> str:
    """How a task names an upload."""
    return UPLOAD_PREFIX + upload_id


def is_upload(address: str) -> bool:
    """Whether an address names an upload, rightly or not."""
    return address.startswith(UPLOAD_PREFIX)


def upload_id_of(address: str) -> str | None:
    """The id in an upload's address; None if it is none."""
    upload_id = address.removeprefix(UPLOAD_PREFIX)
    return upload_id if is_upload(address) and _UPLOAD_ID.fullmatch(upload_id) else None


def upload_path(tenant_id: str, upload_id: str) -> str:
    """Where a whole upload lies, below the address of all uploads. A tenant's task can name none of another's."""
    return f"{tenant_id}/{upload_id}"


def is_upload_path(path: str) -> bool:
    """Whether a whole upload or a part of one may lie here, below the address of all uploads."""
    return _UPLOAD_PATH.fullmatch(path) is not None


def parts_folder(upload_id: str) -> str:
    """Where the parts of an upload lie that is not whole yet, below its tenant's folder."""
    return upload_id + _PARTS


_PICTURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)
_MP4_BRANDS: Final = frozenset(
    {b"isom", b"iso2", b"iso3", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"M4V ", b"MSNV", b"dash"}
)
"""HEIC and AVIF pictures begin like MP4, and differ in this."""
_OLD_MOV: Final = frozenset({b"moov", b"mdat", b"wide"})
_EBML: Final = b"\x1aE\xdf\xa3"
_OGG_CODECS: Final = (b"vorbis", b"OpusHead", b"FLAC", b"Speex   ")


def file_type(head: bytes) -> FileType | None:
    """What the first bytes of a file (`HEAD_BYTES`, or all) show it to be; None if nothing that tasks take.

    Neither a name nor a stated type is asked: the sender chose them.
    """
    for signature, content_type in _PICTURES:
        if head.startswith(signature):
            return FileType(FileKind.IMAGE, content_type)
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE"):
        is_picture = head[8:12] == b"WEBP"
        return FileType(FileKind.IMAGE, "image/webp") if is_picture else FileType(FileKind.AUDIO, "audio/wav")
    return _video_type(head) or _audio_type(head)


def _video_type(head: bytes) -> FileType | None:
    if head[4:8] == b"ftyp" and head[8:12] in _MP4_BRANDS:
        return FileType(FileKind.VIDEO, "video/mp4")
    if (head[4:8] == b"ftyp" and head[8:12] == b"qt  ") or head[4:8] in _OLD_MOV:
        return FileType(FileKind.VIDEO, "video/quicktime")
    if head.startswith(_EBML) and b"webm" in head[:64]:
        return FileType(FileKind.VIDEO, "video/webm")
    return None


def _audio_type(head: bytes) -> FileType | None:
    if head.startswith(b"fLaC"):
        return FileType(FileKind.AUDIO, "audio/flac")
    if head.startswith(b"OggS") and any(codec in head[:64] for codec in _OGG_CODECS):
        return FileType(FileKind.AUDIO, "audio/ogg")
    if head.startswith(b"ID3") or _is_mp3_frame(head):
        return FileType(FileKind.AUDIO, "audio/mpeg")
    return None


def _is_mp3_frame(head: bytes) -> bool:
    """Whether a frame of MPEG layer III begins here: its 11 bits of sync, and no reserved value in the rest."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer == 1 and bitrate not in (0, 15) and rate != 3


SUFFIXES: Final = {
    **{"image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/webp": ".webp"},
    **{"video/mp4": ".mp4", "video/quicktime": ".mov", "video/webm": ".webm"},
    **{"audio/wav": ".wav", "audio/mpeg": ".mp3", "audio/flac": ".flac", "audio/ogg": ".ogg"},
}
"""Content type → the end of a file's name: ComfyUI's loaders go by it."""
KIND_NAMES: Final = {
    FileKind.IMAGE: "a PNG, JPEG, GIF or WebP picture",
    FileKind.VIDEO: "an MP4, WebM or MOV video",
    FileKind.AUDIO: "a WAV, MP3, FLAC or Ogg sound",
}
