"""One folder of object storage, named by an address: `file://`, `s3://`, `gs://`, `az://`.

Endpoints, regions and keys come from obstore's usual environment variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
`GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, …). A store without TLS in a private network also needs
`AWS_ALLOW_HTTP=true`. `file://` addresses may be relative to the working directory; they are percent-decoded like any
URL's path.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from comfyui_temporal.contracts.paths import leaves_folder, spellings

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

SCHEMES: Final = frozenset({"file", "s3", "gs", "az"})
READ_BYTES: Final = 1024 * 1024
PART_BYTES: Final = 5 * 1024 * 1024
PARTS_AT_ONCE: Final = 2
"""Bounds the memory of one upload: at most these parts, and the one that is being filled."""
DELETES_AT_ONCE: Final = 16
_LEFTOVER: Final = re.compile(r"#[0-9]+$")
REMOTE: Final[ClientConfig] = {"connect_timeout": timedelta(seconds=2), "timeout": timedelta(seconds=60)}
RETRIES: Final[RetryConfig] = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
STORAGE_ERRORS: Final = (BaseError, OSError, ValueError)
"""What obstore raises."""


class BadAddress(ValueError):
    """The address names no usable folder. The message says why and never repeats credentials."""


class OutsideFolder(ValueError):
    """A path or symbolic link points outside its folder."""


@dataclass(frozen=True)
class FolderAddress:
    """A validated address. `text` is absolute, without a slash at its end; `local` is set for `file://`."""

    scheme: str
    text: str
    local: Path | None

    def below(self, *parts: str) -> FolderAddress:
        if not parts:
            return self
        if self.local is not None:
            return _local_address(self.local.joinpath(*parts))
        return FolderAddress(self.scheme, "/".join([self.text, *parts]), None)


@dataclass(frozen=True)
class FoundObject:
    """An object below a folder; `path` is relative to it."""

    path: str
    size_bytes: int
    changed_at: datetime | None = None


def read_address(uri: str) -> FolderAddress:
    """Check an address. Raises BadAddress."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise BadAddress("is not an address") from None
    if parts.scheme not in SCHEMES:
        raise BadAddress("must begin with file://, s3://, gs:// or az://")
    if "?" in uri or "#" in uri or "@" in parts.netloc:
        raise BadAddress("must not contain credentials, query or fragment")
    path = parts.netloc + parts.path
    if leaves_folder(path.lstrip("/")) or any(character < " " for form in spellings(uri) for character in form):
        raise BadAddress("must not contain '..' or control characters, in whichever encoding")
    if parts.scheme == "file":
        return _local_address(Path(unquote(path)).absolute())
    if not parts.netloc:
        raise BadAddress("must name a bucket")
    return FolderAddress(parts.scheme, uri.rstrip("/"), None)


def _client_options() -> ClientConfig:
    """`REMOTE`, with plain HTTP if the environment allows it: obstore reads that only if no options are given."""
    is_plain = any(
        os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        for cloud in ("AWS", "AZURE", "GOOGLE")
    )
    return {**REMOTE, "allow_http": True} if is_plain else REMOTE


def _local_address(folder: Path) -> FolderAddress:
    return FolderAddress("file", folder.as_uri(), folder)


def _any(_path: str) -> bool:
    return True


class ObjectFolder:
    """Reads and writes below one folder. Every method raises STORAGE_ERRORS; a missing object is FileNotFoundError.

    So is a missing local folder, unless it is created: on other stores a folder is only a part of its objects' names.
    With `below` it is that folder under `root`. `is_ours`: it is created if missing, and empty folders are removed.
    """

    def __init__(self, root: FolderAddress, *below: str, is_ours: bool = False) -> None:
        self.address = root.below(*below)
        self._root = root.local
        self._prefix = "".join(f"{part}/" for part in below)
        if root.local is not None:
            if not is_ours and not root.local.is_dir():
                raise FileNotFoundError(f"{root.text} is no folder")
            self._store: ObjectStore = LocalStore(root.local, mkdir=is_ours, automatic_cleanup=is_ours)
        else:
            self._store = from_url(root.text, client_options=_client_options(), retry_config=RETRIES)

    async def objects(self) -> AsyncIterator[FoundObject]:
        async for batch in obstore.list(self._store, self._prefix or None, chunk_size=500):
            for meta in batch:
                yield FoundObject(meta["path"].removeprefix(self._prefix), meta["size"], meta["last_modified"])

    async def folders(self) -> list[str]:
        """The names of the folders directly below this one."""
        listed = await obstore.list_with_delimiter_async(self._store, self._prefix or None)
        return [path.removeprefix(self._prefix).strip("/") for path in listed["common_prefixes"]]

    async def size_bytes(self, path: str) -> int:
        meta = await obstore.head_async(self._store, self._prefix + path)
        return meta["size"]

    async def read(self, path: str) -> AsyncIterator[bytes]:
        result = await obstore.get_async(self._store, self._prefix + path)
        async for chunk in result.stream(min_chunk_size=READ_BYTES):
            yield bytes(chunk)

    async def read_whole(self, path: str) -> bytes:
        result = await obstore.get_async(self._store, self._prefix + path)
        return bytes(await result.bytes_async())

    async def read_at_most(self, path: str, max_bytes: int) -> bytes | None:
        """A whole object; None if it is larger, whatever size it claims."""
        read = bytearray()
        async for chunk in self.read(path):
            read += chunk
            if len(read) > max_bytes:
                return None
        return bytes(read)

    async def write(self, path: str, content: AsyncIterator[bytes] | bytes) -> None:
        """Write an object completely or not at all."""
        await obstore.put_async(
            self._store, self._prefix + path, content, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )

    async def delete_leftovers(self, before: datetime | None = None, *, is_meant: Callable[[str], bool] = _any) -> int:
        """Delete what writers that were killed have left on a disk, by default however new. Returns how many files.

        There an object is written beside its place, as `{path}#{number}`. Such names are no objects: they are never
        listed, and no call of the store deletes them. `is_meant` takes the path of the object.
        """
        if self.address.local is None or self._root is None:
            return 0
        return await asyncio.to_thread(_delete_leftovers, self.address.local, self._root, before, is_meant)

    async def delete(self, paths: list[str]) -> None:
        """Delete objects. A missing object is not an error."""
        for start in range(0, len(paths), DELETES_AT_ONCE):
            await asyncio.gather(*(self._delete(path) for path in paths[start : start + DELETES_AT_ONCE]))

    async def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            await obstore.delete_async(self._store, self._prefix + path)

    async def check_inside(self, path: str) -> None:
        """Raise OutsideFolder if `path` leaves the folder, by '..' in any encoding or (file://) a symbolic link."""
        if leaves_folder(path):
            raise OutsideFolder(path)
        if self.address.local is not None and not await asyncio.to_thread(is_inside, self.address.local, path):
            raise OutsideFolder(path)


def _delete_leftovers(folder: Path, root: Path, before: datetime | None, is_meant: Callable[[str], bool]) -> int:
    deleted = 0
    for place, _, names in os.walk(folder):
        for name in filter(_LEFTOVER.search, names):
            path = Path(place, name)
            with suppress(FileNotFoundError):
                written_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                is_old = before is None or written_at < before
                if is_old and is_meant(_LEFTOVER.sub("", path.relative_to(folder).as_posix())):
                    path.unlink()
                    deleted += 1
                    _remove_empty(path.parent, root)
    return deleted


def _remove_empty(folder: Path, root: Path) -> None:
    """As the store does after its own deletions."""
    with suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent


def is_inside(folder: Path, path: str) -> bool:
    """Whether `path` is below `folder` after symbolic links of both are resolved."""
    return (folder / path).resolve().is_relative_to(folder.resolve())
