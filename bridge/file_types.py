"""Content types by file name, for what ComfyUI and local storage give none."""

from __future__ import annotations

import mimetypes
from typing import Final

FILE_TYPES: Final = {
    **{".webp": "image/webp", ".avif": "image/avif", ".exr": "image/x-exr", ".svg": "image/svg+xml"},
    **{".webm": "video/webm", ".mkv": "video/x-matroska", ".flac": "audio/flac", ".opus": "audio/ogg"},
    **{
        ".glb": "model/gltf-binary",
        ".gltf": "model/gltf+json",
        ".obj": "model/obj",
        ".ply": "application/octet-stream",
    },
}
"""What Python's table of names lacks on some systems."""


def type_of(filename: str, content_type: str) -> str:
    """A stored file's content type: by its name where the server gives none, as for much that it cannot show."""
    if content_type.partition(";")[0].strip().lower() not in ("", "application/octet-stream"):
        return content_type
    suffix = f".{filename.rpartition('.')[2].lower()}"
    return FILE_TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"
