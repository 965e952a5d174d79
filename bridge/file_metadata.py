"""What ComfyUI writes into a result beside the picture: the whole graph, with the prompt and every file's name.

PNG   tEXt, zTXt, iTXt, eXIf         WebP  EXIF, XMP
JPEG  APP1 (EXIF, XMP), comments     MP4, MOV  `udta` and `meta` of the film and its tracks
FLAC  comments                       WebM, MKV  tags            MP3  ID3v2
Ogg   comments of Opus and Vorbis

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
_OGG: Final = b"OggS"
_OGG_TEXTS: Final = {b"OpusHead": (b"OpusTags", b""), b"\x01vorbis": (b"\x03vorbis", b"\x01")}
"""How a stream begins → how its comments begin, and what ends an empty list of them."""
_OGG_POLYNOMIAL: Final = 0x04C11DB7
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
        (head.startswith(_OGG), _ogg),
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


def _ogg(file: IO[bytes]) -> Iterator[Cut]:
    """The comments are the second packet, on pages of their own. They become empty, and zeros that readers skip."""
    first = _ogg_page(file, 0)
    content = first[27 + first[26] :]
    texts = next((of_texts for begin, of_texts in _OGG_TEXTS.items() if content.startswith(begin)), None)
    if texts is None:
        return
    magic, end_of_list = texts
    instead = magic + bytes(8) + end_of_list
    at, written = len(first), 0
    for _ in range(_MOST_BLOCKS):
        page = _ogg_page(file, at)
        lengths = page[27 : 27 + page[26]]
        if page[14:18] != first[14:18] or (not written and not page[27 + page[26] :].startswith(magic)):
            return
        is_last = any(length < 255 for length in lengths)
        own = lengths[: next(n for n, length in enumerate(lengths, 1) if length < 255)] if is_last else lengths
        start, size = 27 + page[26], sum(own)
        blank = instead[written : written + size].ljust(size, b"\0")
        yield Cut(at, at + len(page), _ogg_checked(page[:start] + blank + page[start + size :]))
        at, written = at + len(page), written + size
        if is_last:
            return


def _ogg_page(file: IO[bytes], at: int) -> bytes:
    """Raises ValueError where no whole page begins."""
    head = _at(file, at, 27)
    if len(head) < 27 or not head.startswith(_OGG):
        raise ValueError("no page of Ogg")
    length = 27 + head[26] + sum(_at(file, at + 27, head[26]))
    page = _at(file, at, length)
    if len(page) < length:
        raise ValueError("half a page of Ogg")
    return page


def _ogg_checked(page: bytes) -> bytes:
    """The page with its checksum: readers drop one whose checksum is wrong."""
    page = page[:22] + bytes(4) + page[26:]
    checksum = 0
    for byte in page:
        checksum = checksum << 8 & 0xFFFFFFFF ^ _OGG_CHECKSUMS[checksum >> 24 ^ byte]
    return page[:22] + struct.pack("<I", checksum) + page[26:]


def _ogg_checksum(byte: int) -> int:
    checksum = byte << 24
    for _ in range(8):
        checksum = checksum << 1 & 0xFFFFFFFF ^ (_OGG_POLYNOMIAL if checksum & 0x80000000 else 0)
    return checksum


_OGG_CHECKSUMS: Final = [_ogg_checksum(byte) for byte in range(256)]
