"""Small pictures of results, for lists and cards: `?width=512` on a result's address.

A small picture is made when it is first asked for, and stored beside its result (`results/{job_id}/.thumbnails/…`).
There are few widths, and it is deleted with its task. It holds nothing but the picture: ComfyUI writes the whole graph,
with the prompt, into files. Whatever cannot be made small is delivered as it is.
"""

from __future__ import annotations

import asyncio
import io
import warnings
from contextlib import suppress
from typing import Final

import structlog
from PIL import ExifTags, Image, ImageOps

from bridge.file_types import type_of
from bridge.storage import STORAGE_ERRORS, Storage

WIDTHS: Final = (512, 1024)
PICTURES: Final = frozenset({"image/png", "image/jpeg", "image/webp"})
MEDIA_TYPE: Final = "image/webp"
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_PIXELS: Final = 48_000_000
AT_ONCE: Final = 2
"""A decoded picture takes up to 200 MB."""
SIDEWAYS: Final = 5
"""EXIF's orientations from here on turn a picture by a quarter."""
_FOLDER: Final = ".thumbnails"
"""No name of a result begins with a dot (storage.safe_name)."""
_QUALITY: Final = 82
MAX_REMEMBERED: Final = 10_000

log = structlog.get_logger(__name__)


class Thumbnails:
    """Small pictures of the results in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._places = asyncio.Semaphore(AT_ONCE)
        self._no_smaller: dict[tuple[str, int], None] = {}
        """Pictures that were found to be small enough: a store elsewhere need not be read again to know it."""

    async def of(self, path: str, size_bytes: int, width: int) -> bytes | None:
        """The result at `path` in a width of `WIDTHS`; None where its own file is to be delivered.

        Raises STORAGE_ERRORS if the result cannot be read.
        """
        if not _may_be_small(path, size_bytes, width):
            return None
        stored = _stored_path(path, width)
        with suppress(*STORAGE_ERRORS):
            return await self._storage.read_whole(stored)
        async with self._places:
            with suppress(*STORAGE_ERRORS):
                return await self._storage.read_whole(stored)
            small = await asyncio.to_thread(_made_small, await self._storage.read_whole(path), width)
        if small is not None:
            await self._is_written(stored, small)
        return small

    async def stored(self, path: str, size_bytes: int, width: int) -> str | None:
        """Where the store has the small picture, for whoever fetches it there; None where the result's own file is to
        be fetched. Raises STORAGE_ERRORS if the result cannot be read.
        """
        if not _may_be_small(path, size_bytes, width) or (path, width) in self._no_smaller:
            return None
        stored = _stored_path(path, width)
        if await self._is_there(stored):
            return stored
        async with self._places:
            if await self._is_there(stored):
                return stored
            small = await asyncio.to_thread(_made_small, await self._storage.read_whole(path), width)
        if small is None:
            self._no_smaller[path, width] = None
            while len(self._no_smaller) > MAX_REMEMBERED:
                del self._no_smaller[next(iter(self._no_smaller))]
            return None
        return stored if await self._is_written(stored, small) else None

    async def _is_there(self, stored: str) -> bool:
        with suppress(*STORAGE_ERRORS):
            return await self._storage.size_bytes(stored) > 0
        return False

    async def _is_written(self, stored: str, small: bytes) -> bool:
        try:
            await self._storage.write(stored, small, MEDIA_TYPE)
        except STORAGE_ERRORS as error:
            log.warning("thumbnail_not_stored", reason=type(error).__name__)
            return False
        return True


def _may_be_small(path: str, size_bytes: int, width: int) -> bool:
    return width in WIDTHS and type_of(path, "") in PICTURES and size_bytes <= MAX_FILE_BYTES


def _stored_path(path: str, width: int) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{_FOLDER}/{width}/{name}.webp"


def _made_small(content: bytes, width: int) -> bytes | None:
    """A WebP of this width without any metadata; None for what is no larger, too large, or no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as picture:
                is_on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) >= SIDEWAYS
                across = picture.height if is_on_its_side else picture.width
                if across <= width or picture.width * picture.height > MAX_PIXELS:
                    return None
                picture.draft("RGB", (width, width))
                upright = ImageOps.exif_transpose(picture)
                has_alpha = "A" in upright.mode or "transparency" in upright.info
                drawn = upright.convert("RGBA" if has_alpha else "RGB")
        drawn.thumbnail((width, drawn.height), Image.Resampling.LANCZOS, reducing_gap=2.0)
        # A new picture: what was written into the old one stays behind.
        clean = Image.new(drawn.mode, drawn.size)
        clean.paste(drawn)
        out = io.BytesIO()
        clean.save(out, "WEBP", quality=_QUALITY)
        return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
