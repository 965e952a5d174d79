"""The bridge's own object storage: results and control images, below one address (`file://`, `s3://`, `gs://`, `az://`).

    results/{job_id}/…              results of a job, and small pictures of them (thumbnails.py)
    controls/{job_id}/{n}           control images, deleted when the job has ended
    checkpoints/{tenant_id}/…       checkpoints of trainings
    models/{tenant_id}/…            what they trained
    datasets/{training_id}/…        long lists of files to train on
    lora-caches/…                   which models each server has (lora_cache.py)
    probes/…                        whether storage can be used (storage_health.py)

The bridge keeps the rest: `python -m store purge` and `forget` delete it (store/task_files.py).

Addresses of results expire. The store signs them if it can (`s3`, `gs`, `az`), otherwise the bridge does
(`/comfyui/files/…`). By setting the bridge signs them all, and leads on to the store's: then pictures have small copies
there too.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store, from_url

from comfyui_temporal.contracts.paths import is_plain

STORAGE_ERRORS: Final = (BaseError, OSError, ValueError)
"""What obstore raises. A missing object is FileNotFoundError."""
SCHEMES: Final = ("file", "s3", "gs", "az")
RESULT_SECONDS: Final = 7 * 24 * 3600
"""S3's limit for signed addresses."""
RESULTS_PATH: Final = "/comfyui/files"
PART_BYTES: Final = 5 * 1024 * 1024


class Storage:
    """One object store. Raises ValueError for an unusable address. Every method raises STORAGE_ERRORS."""

    def __init__(self, url: str, *, setting: str = "BRIDGE_STORE_URL") -> None:
        parts = urlsplit(url)
        # Also an empty query: the path of every object would be read as part of it.
        if parts.scheme not in SCHEMES or "?" in url or "#" in url or "@" in parts.netloc:
            raise ValueError(
                f"COMFYUI_TEMPORAL_{setting} must be a file://, s3://, gs:// or az:// address, without credentials."
            )
        self.url = url.rstrip("/")
        self._local: Path | None = None
        if parts.scheme == "file":
            self._local = Path(unquote(parts.netloc + parts.path)).absolute()
            self.url = self._local.as_uri()
            self._store: ObjectStore = LocalStore(self._local, mkdir=True, automatic_cleanup=True)
        else:
            self._store = from_url(self.url)

    def address(self, path: str) -> str:
        """The object's own address, for clients with the store's credentials."""
        return f"{self.url}/{path}"

    def path_of(self, address: str) -> str | None:
        """The path of an address below this storage, or None."""
        prefix = self.url + "/"
        path = address.removeprefix(prefix)
        return path if address.startswith(prefix) and is_plain(path) else None

    async def write(self, path: str, content: AsyncIterator[bytes] | bytes, content_type: str | None = None) -> int:
        """Write an object, completely or not at all. Returns its size in bytes."""
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            if isinstance(content, bytes):
                size = len(content)
                yield content
                return
            async for chunk in content:
                size += len(chunk)
                yield chunk

        # A local folder cannot store a content type.
        attributes = {"Content-Type": content_type} if content_type and self._local is None else None
        await obstore.put_async(self._store, path, counted(), attributes=attributes, chunk_size=PART_BYTES)
        return size

    async def read(self, path: str) -> AsyncIterator[bytes]:
        result = await obstore.get_async(self._store, path)
        async for chunk in result.stream(min_chunk_size=1024 * 1024):
            yield bytes(chunk)

    async def read_part(self, path: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, but not including, `end`."""
        while start < end:
            until = min(end, start + PART_BYTES)
            part = bytes(await obstore.get_range_async(self._store, path, start=start, end=until))
            if not part:
                return
            yield part
            start += len(part)

    async def read_whole(self, path: str) -> bytes:
        result = await obstore.get_async(self._store, path)
        return bytes(await result.bytes_async())

    async def size_bytes(self, path: str) -> int:
        return (await obstore.head_async(self._store, path))["size"]

    def keeps_inside(self, path: str) -> bool:
        """Whether a path stays below this storage, symbolic links included."""
        if self._local is None:
            return is_plain(path)
        return is_plain(path) and (self._local / path).resolve().is_relative_to(self._local.resolve())

    async def delete(self, path: str) -> None:
        """Delete an object. A missing one is no error."""
        with suppress(FileNotFoundError):
            await obstore.delete_async(self._store, path)

    @property
    def signs(self) -> bool:
        """Whether the store itself signs addresses."""
        return isinstance(self._store, S3Store | GCSStore | AzureStore)

    async def signed_by_store(self, path: str, seconds: int) -> str | None:
        """An expiring address signed by the store itself, or None if it cannot sign."""
        if not isinstance(self._store, S3Store | GCSStore | AzureStore):
            return None
        return await obstore.sign_async(self._store, "GET", path, timedelta(seconds=seconds))


class SignedAddresses:
    """Expiring addresses of results that the bridge serves itself, for stores that sign none."""

    def __init__(self, base_url: str, secret: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._key = hmac.new(secret.encode(), b"comfyui-temporal bridge results", hashlib.sha256).digest()

    def address(self, path: str, *, expires: int) -> str:
        """`expires` in seconds since the epoch."""
        return (
            f"{self.base_url}{RESULTS_PATH}/{quote(path)}?expires={expires}&signature={self._signature(path, expires)}"
        )

    def is_valid(self, path: str, *, expires: int, signature: str) -> bool:
        """Whether the signature is ours and has not expired."""
        expected = self._signature(path, expires)
        return hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")) and time.time() < expires

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._key, f"{expires}:{path}".encode(), hashlib.sha256).hexdigest()


def safe_name(name: str) -> str:
    """A file name that is valid in every store and URL."""
    kept = "".join(character if character.isalnum() or character in "._-" else "_" for character in name)
    return kept.lstrip(".")[-120:] or "file"
