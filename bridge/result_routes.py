"""Result files by their signed addresses: whole, in part, or as a small picture (thumbnails.py).

Where the store signs addresses itself, a GET is led on to one of the store's, which lives for `LEAD_SECONDS`: the bytes
do not go through the bridge.
"""

from __future__ import annotations

import json
import re
from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from bridge.file_types import type_of
from bridge.storage import RESULTS_PATH, STORAGE_ERRORS, SignedAddresses, Storage
from bridge.thumbnails import MEDIA_TYPE, Thumbnails
from comfyui_temporal.contracts.paths import is_plain

SHOWN_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif", "video/mp4", "video/webm"})
"""Browsers may show these. All other results are downloads."""
GUARDED: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, max-age=3600",
}
"""What keeps a browser from running what is in a file, and others from keeping it."""
LEAD_SECONDS: Final = 3600
LED_ON: Final = {"Cache-Control": f"private, max-age={LEAD_SECONDS // 2}", "Referrer-Policy": "no-referrer"}
"""A kept answer never leads to an address that has expired."""
UNSATISFIABLE: Final = (0, 0)
"""The part that a `Range` asks for when the result has no such bytes."""


def result_routes(storage: Storage, signed: SignedAddresses) -> APIRouter:
    router = APIRouter()
    thumbnails = Thumbnails(storage)

    async def at_store(path: str, size: int, width: int) -> str | None:
        """The store's own address of a result or of its small picture; None where the bridge delivers it."""
        if not storage.signs:
            return None
        small = await thumbnails.stored(path, size, width) if width else None
        return await storage.signed_by_store(small or path, LEAD_SECONDS)

    @router.api_route(RESULTS_PATH + "/{path:path}", methods=["GET", "HEAD"])
    async def result(request: Request, path: str, expires: int = 0, signature: str = "", width: int = 0) -> Response:
        """A result, whole or in part, if its signed address has not expired. Otherwise 404, as for an unknown one.

        `width`: a picture may be delivered in one of `WIDTHS`, as WebP.
        """
        if not is_plain(path) or not signed.is_valid(path, expires=expires, signature=signature):
            return _detail(404, "There is no such result, or its address has expired.")
        try:
            size = await storage.size_bytes(path)
            # An address that a store signs is for GET alone.
            if request.method == "GET" and (address := await at_store(path, size, width)):
                return RedirectResponse(address, 307, headers=LED_ON)
            small = await thumbnails.of(path, size, width) if width else None
        except FileNotFoundError:
            return _detail(404, "There is no such result, or its address has expired.")
        except STORAGE_ERRORS:
            return _detail(503, "The storage of results cannot be read now.")
        if small is not None:
            return Response(
                b"" if request.method == "HEAD" else small, headers=_small_headers(small), media_type=MEDIA_TYPE
            )
        headers = _result_headers(path)
        part = asked_part(request.headers.get("range") if request.method == "GET" else None, size)
        if part == UNSATISFIABLE:
            headers["Content-Range"] = f"bytes */{size}"
            return Response(status_code=416, headers=headers)
        start, end = part or (0, size)
        headers["Content-Length"] = str(end - start)
        if part is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        kind, status = type_of(path, ""), 200 if part is None else 206
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=kind)
        content = storage.read(path) if part is None else storage.read_part(path, start, end)
        return StreamingResponse(content, status, headers=headers, media_type=kind)

    return router


def _small_headers(small: bytes) -> dict[str, str]:
    """A made picture has no name of its own, and is the same as long as its result is there."""
    return {**GUARDED, "Content-Length": str(len(small))}


def _result_headers(path: str) -> dict[str, str]:
    """A result's file name, and whether a browser shows it."""
    name = path.rpartition("/")[2]
    shown = "inline" if type_of(path, "") in SHOWN_TYPES else "attachment"
    plain = "".join(character if character.isascii() else "_" for character in name)
    return {
        **GUARDED,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"{shown}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
    }


def asked_part(header: str | None, size: int) -> tuple[int, int] | None:
    """The part [start, end) that a `Range` asks for; None for the whole.

    Several parts in one request and other units are answered with the whole, as RFC 9110 allows.
    """
    found = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", header or "")
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    return (start, end) if start < end else UNSATISFIABLE


def _detail(status: int, sentence: str) -> Response:
    return Response(json.dumps({"detail": sentence}), status, media_type="application/json")
