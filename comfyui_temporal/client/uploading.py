"""Sends a file to the gateway: a small one at once, a large one in parts that survive an interruption (tus 1.0)."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from comfyui_temporal.client.errors import InvalidInput, TaskError, Unavailable, UnexpectedReply
from comfyui_temporal.contracts.uploads import InputKind, UploadView, upload_id_of

UPLOADS: Final = "/api/v1/uploads"
PART_BYTES: Final = 8 * 1024 * 1024
"""Of a part, and of the largest file that is sent at once."""
PAUSES_SECONDS: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
_TUS: Final = {"tus-resumable": "1.0.0"}
_LEFT_BEHIND: Final = "upload_offset"
"""A part whose answer was lost had been taken."""

Ask = Callable[..., Awaitable[httpx.Response]]
"""One request to the gateway. Raises TaskError for any answer but 2xx."""


async def upload(
    ask: Ask, file: bytes | str | os.PathLike[str], kind: InputKind | None, *, patience_seconds: float
) -> UploadView:
    """Send a file: its bytes, or a path. `patience_seconds`: how long an interrupted one is tried again.

    Raises TaskError, and OSError where the file cannot be read.
    """
    with _opened(file) as source:
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
        if size <= PART_BYTES:
            params = {"kind": kind.value} if kind else {}
            return _read(
                await ask("POST", UPLOADS, headers={}, params=params, content=await asyncio.to_thread(source.read))
            )
        return await _in_parts(ask, source, size, kind, patience_seconds)


async def uploaded(ask: Ask, address: str) -> UploadView:
    """An upload by its address. Raises TaskError."""
    return _read(await ask("GET", f"{UPLOADS}/{quote(upload_id_of(address) or address, safe='')}", headers={}))


async def _in_parts(
    ask: Ask, source: BinaryIO, size: int, kind: InputKind | None, patience_seconds: float
) -> UploadView:
    metadata = {"upload-metadata": f"kind {base64.b64encode(kind.encode()).decode()}"} if kind else {}
    seen = _read(await ask("POST", UPLOADS, headers={**_TUS, "upload-length": str(size), **metadata}))
    path = f"{UPLOADS}/{seen.upload_id}"
    heard_at, tries = time.monotonic(), 0
    while not seen.is_whole:
        source.seek(seen.received_bytes)
        part = await asyncio.to_thread(source.read, min(PART_BYTES, size - seen.received_bytes))
        if not part and seen.received_bytes < size:
            raise InvalidInput("The file became shorter while it was sent: nothing was uploaded.")
        headers = {"upload-offset": str(seen.received_bytes), "content-type": "application/offset+octet-stream"}
        try:
            if part:
                await ask("PATCH", path, content=part, headers=_TUS | headers)
            else:  # all of it is there, and is being joined
                await asyncio.sleep(PAUSES_SECONDS[0])
            seen = _read(await ask("GET", path, headers={}))
            heard_at, tries = time.monotonic(), 0
        except TaskError as error:
            if error.code != _LEFT_BEHIND and not isinstance(error, Unavailable):
                raise
            if time.monotonic() - heard_at >= patience_seconds:
                raise
            await asyncio.sleep(PAUSES_SECONDS[min(tries, len(PAUSES_SECONDS) - 1)])
            tries += 1
            now = await _looked_at(ask, path) or seen
            if now.received_bytes > seen.received_bytes:  # it was cut, and part of it was taken
                heard_at, tries = time.monotonic(), 0
            seen = now
    return seen


async def _looked_at(ask: Ask, path: str) -> UploadView | None:
    """How far it is; None while nobody says so."""
    try:
        return _read(await ask("GET", path, headers={}))
    except Unavailable:
        return None


def _opened(file: bytes | str | os.PathLike[str]) -> AbstractContextManager[BinaryIO]:
    return io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb")


def _read(answer: httpx.Response) -> UploadView:
    try:
        return UploadView.model_validate_json(answer.content)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, issue["loc"])) or "body" for issue in error.errors()[:5])
        raise UnexpectedReply(f"The gateway's answer is not an UploadView: {places}.") from None
