"""What ComfyUI writes into a result beside the picture: the whole graph, with the prompt and every file's name.

PNG   tEXt, zTXt, iTXt, eXIf         WebP  EXIF, XMP
JPEG  APP1 (EXIF, XMP), comments     MP4, MOV  `udta` and `meta` of the film and its tracks
FLAC  comments                       WebM, MKV  tags            MP3  ID3v2

Each kind is read as a list of cuts, so that a file of any size is copied in pieces. Where a cut would move what the
file refers to by its offset, zeros of the same length take its place, under the name of a block that readers skip.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Final

PIECE_BYTES: Final = 1024 * 1024
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt", b"eXIf"})
_WEBP_TEXTS: Final = frozenset({b"EXIF", b"XMP "})
_EXIF_AND_XMP_FLAGS: Final = 0x08 | 0x04
_MP4_OUTER: Final = frozenset({b"moov", b"trak"})
_MP4_TEXTS: Final = frozenset({b"udta", b"meta"})
_MKV_SEGMENT: Final = 0x18538067
_MKV_TAGS: Final = 0x1254C367
_MOST_BLOCKS: Final = 100_000


@dataclass(frozen=True)
class Cut:
    """Bytes from `start` to `end` that are left out, and what comes instead.

    `is_filled`: zeros follow, so that nothing after it moves.
    """

    start: int
    end: int
    instead: bytes = b""
    is_filled: bool = False


def without_metadata(file: IO[bytes]) -> Iterator[bytes]:
    """The file in pieces, without what its kind keeps beside the content. A file of another kind is unchanged."""
    try:
        cuts = sorted(_cuts_of(file), key=lambda cut: cut.start)
    except (struct.error, IndexError, ValueError):
        # It ends in the middle of a block: whoever reads it finds out.
        cuts = []
    at, size = 0, file.seek(0, 2)
    for cut in cuts:
        yield from _pieces(file, at, cut.start)
        yield cut.instead
        at = min(cut.end, size)
        if cut.is_filled:
            yield from _zeros(at - cut.start - len(cut.instead))
    yield from _pieces(file, at, None)


def _zeros(length: int) -> Iterator[bytes]:
    for start in range(0, length, PIECE_BYTES):
        yield bytes(min(PIECE_BYTES, length - start))


def _pieces(file: IO[bytes], start: int, end: int | None) -> Iterator[bytes]:
    file.seek(start)
    while end is None or start < end:
        piece = file.read(PIECE_BYTES if end is None else min(PIECE_BYTES, end - start))
        if not piece:
            return
        start += len(piece)
        yield piece


def _cuts_of(file: IO[bytes]) -> list[Cut]:
    head = _at(file, 0, 12)
    readers: list[tuple[bool, Callable[[IO[bytes]], Iterator[Cut]]]] = [
        (head.startswith(_PNG), _png),
        (head[:4] == b"RIFF" and head[8:12] == b"WEBP", _webp),
        (head.startswith(b"\xff\xd8"), _jpeg),
        (head[4:8] == b"ftyp", lambda film: _mp4(film, 0, None)),
        (head.startswith(b"fLaC"), _flac),
        (head.startswith(b"\x1a\x45\xdf\xa3"), _mkv),
        (head.startswith(b"ID3"), _mp3),
    ]
    return next((list(cuts(file)) for is_kind, cuts in readers if is_kind), [])


def _at(file: IO[bytes], start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _png(file: IO[bytes]) -> Iterator[Cut]:
    at = len(_PNG)
    for _ in range(_MOST_BLOCKS):
        head = _at(file, at, 8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        end = at + 12 + length
        if kind in _PNG_TEXTS:
            yield Cut(at, end)
        at = end


def _webp(file: IO[bytes]) -> Iterator[Cut]:
    at, removed = 12, 0
    flags_at: int | None = None
    for _ in range(_MOST_BLOCKS):
        head = _at(file, at, 8)
        if len(head) < 8:
            break
        kind, length = struct.unpack("<4sI", head)
        end = at + 8 + length + length % 2
        if kind == b"VP8X":
            flags_at = at + 8
        if kind in _WEBP_TEXTS:
            removed += end - at
            yield Cut(at, end)
        at = end
    if removed:
        (size,) = struct.unpack("<I", _at(file, 4, 4))
        yield Cut(4, 8, struct.pack("<I", size - removed))
        if flags_at is not None:
            flags = _at(file, flags_at, 1)[0]
            yield Cut(flags_at, flags_at + 1, bytes([flags & ~_EXIF_AND_XMP_FLAGS]))


def _jpeg(file: IO[bytes]) -> Iterator[Cut]:
    at = 2
    for _ in range(_MOST_BLOCKS):
        head = _at(file, at, 4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xDA, 0xD9):
            return
        end = at + 2 + int(struct.unpack(">H", head[2:])[0])
        if head[1] in (0xE1, 0xFE):
            yield Cut(at, end)
        at = end


def _mp4(file: IO[bytes], at: int, until: int | None) -> Iterator[Cut]:
    for _ in range(_MOST_BLOCKS):
        head = _at(file, at, 16)
        if len(head) < 8 or (until is not None and at >= until):
            return
        size, kind = struct.unpack(">I4s", head[:8])
        first = 8
        if size == 1:
            (size,), first = struct.unpack(">Q", head[8:16]), 16
        if size < first:
            return
        if kind in _MP4_OUTER:
            yield from _mp4(file, at + first, at + size)
        elif kind in _MP4_TEXTS and until is not None:
            yield Cut(at + 4, at + 8, b"free")
            yield Cut(at + first, at + size, is_filled=True)
        at += size


def _flac(file: IO[bytes]) -> Iterator[Cut]:
    at = 4
    for _ in range(_MOST_BLOCKS):
        kind, *length = _at(file, at, 4)
        size = int.from_bytes(bytes(length), "big")
        if kind & 0x7F == 4:
            yield Cut(at, at + 1, bytes([kind & 0x80 | 1]))
            yield Cut(at + 4, at + 4 + size, is_filled=True)
        if kind & 0x80:
            return
        at += 4 + size


def _mkv(file: IO[bytes]) -> Iterator[Cut]:
    at, within = 0, 0
    for _ in range(_MOST_BLOCKS):
        head = _at(file, at, 16)
        if len(head) < 2:
            return
        id_length = 9 - head[0].bit_length()
        kind = int.from_bytes(head[:id_length], "big")
        size_length = 9 - head[id_length].bit_length()
        size = int.from_bytes(head[id_length : id_length + size_length], "big") & ((1 << 7 * size_length) - 1)
        first = id_length + size_length
        if kind == _MKV_SEGMENT and not within:
            within, at = 1, at + first
            continue
        if size == (1 << 7 * size_length) - 1:
            # Of unknown length, as in a live stream: nothing after it can be found.
            return
        if kind == _MKV_TAGS and first + size >= 9:
            void = b"\xec" + struct.pack(">Q", first + size - 9 | 1 << 56)
            yield Cut(at, at + first + size, void, is_filled=True)
        at += first + size


def _mp3(file: IO[bytes]) -> Iterator[Cut]:
    size = 0
    for byte in _at(file, 6, 4):
        size = size << 7 | byte & 0x7F
    yield Cut(0, 10 + size)
