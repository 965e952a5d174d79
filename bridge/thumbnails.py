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

log = structlog.get_logger(__name__)


class Thumbnails:
    """Small pictures of the results in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._places = asyncio.Semaphore(AT_ONCE)

    async def of(self, path: str, size_bytes: int, width: int) -> bytes | None:
        """The result at `path` in a width of `WIDTHS`; None where its own file is to be delivered.

        Raises STORAGE_ERRORS if the result cannot be read.
        """
        if width not in WIDTHS or type_of(path, "") not in PICTURES or size_bytes > MAX_FILE_BYTES:
            return None
        folder, _, name = path.rpartition("/")
        stored = f"{folder}/{_FOLDER}/{width}/{name}.webp"
        with suppress(*STORAGE_ERRORS):
            return await self._storage.read_whole(stored)
        async with self._places:
            with suppress(*STORAGE_ERRORS):
                return await self._storage.read_whole(stored)
            small = await asyncio.to_thread(_made_small, await self._storage.read_whole(path), width)
        if small is not None:
            try:
                await self._storage.write(stored, small, MEDIA_TYPE)
            except STORAGE_ERRORS as error:
                log.warning("thumbnail_not_stored", reason=type(error).__name__)
        return small


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
