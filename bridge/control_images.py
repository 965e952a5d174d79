"""Control images and other files that a request names: allowed sources, and how they are fetched (pitfall 29).

    https://…            hosts on an allow-list (allowed_hosts.py); no redirects
    file://, s3://, …    below a root of the job's tenant
    upload:UPLOAD_ID     what the job's tenant has sent to the gateway (comfyui_temporal/contracts/uploads.py)

The content must be of the kind that is asked for, and of limited size. Its type is read from its first bytes; the
sender's file name and content type are ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from bridge.allowed_hosts import AllowedHosts, FileRefused, FileUnreachable
from bridge.storage import STORAGE_ERRORS, Storage
from comfyui_temporal.contracts.paths import is_plain
from comfyui_temporal.contracts.uploads import (
    HEAD_BYTES,
    KIND_NAMES,
    MAX_IMAGE_BYTES,
    FileKind,
    InputKind,
    file_type,
    is_upload,
    upload_id_of,
    upload_path,
)

MAX_FILE_BYTES: Final = 512 * 1024 * 1024
_STORE_PREFIXES: Final = ("file:", "s3:", "gs:", "az:")


@dataclass(frozen=True)
class FetchedFile:
    """A file whose beginning was checked. `chunks` raise FileRefused, FileUnreachable."""

    content_type: str
    chunks: AsyncIterator[bytes]


class ControlImages:
    """`hosts`: those of https images. `roots` contain `{tenant_id}`.

    `uploads`: where tenants' uploads lie; None: none is taken. `max_bytes` of a picture, `max_file_bytes` of a video or
    sound.
    """

    def __init__(
        self,
        *,
        hosts: AllowedHosts | None = None,
        roots: Iterable[str] = (),
        uploads: Storage | None = None,
        max_bytes: int = MAX_IMAGE_BYTES,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self.hosts = hosts or AllowedHosts()
        self._roots = list(roots)
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes

    def problem(self, address: str, tenant_id: str) -> str | None:
        """Why this address is refused, or None. Makes no request."""
        if is_upload(address):
            if self._uploads is None:
                return "is an upload, and none is taken here"
            return None if upload_id_of(address) else "must be upload:UPLOAD_ID"
        if address.startswith(_STORE_PREFIXES):
            return None if self._below_root(address, tenant_id) else "is not below a folder of the tenant's images"
        return self.hosts.problem(address, others="an upload, or in object storage")

    async def missing(self, address: str, tenant_id: str) -> str | None:
        """Why an upload cannot be used, or None; None too while its storage does not answer: it is fetched later."""
        upload_id = upload_id_of(address)
        if upload_id is None or self._uploads is None:
            return None
        try:
            await self._uploads.size_bytes(upload_path(tenant_id, upload_id))
        except FileNotFoundError:
            return f"there is no complete upload {upload_id} of this tenant, or it has expired"
        except STORAGE_ERRORS:
            return None
        return None

    @asynccontextmanager
    async def opened(
        self, address: str, tenant_id: str, kind: InputKind = InputKind.IMAGE
    ) -> AsyncIterator[FetchedFile]:
        """A file of this kind, as it arrives. Raises FileRefused, FileUnreachable."""
        problem = self.problem(address, tenant_id)
        if problem:
            raise FileRefused(f"it {problem}")
        most = self._max_bytes if kind.file is FileKind.IMAGE else self._max_file_bytes
        is_stored = is_upload(address) or address.startswith(_STORE_PREFIXES)
        arriving = self._read(address, tenant_id, most) if is_stored else self.hosts.download(address, most)
        async with aclosing(arriving) as chunks:
            head = b""
            while len(head) < HEAD_BYTES and (chunk := await anext(chunks, b"")):
                head += chunk
            found = file_type(head[:HEAD_BYTES])
            if found is None or found.kind is not kind.file:
                raise FileRefused(f"it is not {KIND_NAMES[kind.file]}")

            async def whole() -> AsyncIterator[bytes]:
                yield head
                async for more in chunks:
                    yield more

            yield FetchedFile(found.content_type, whole())

    def _below_root(self, address: str, tenant_id: str) -> tuple[str, str] | None:
        """The root and the path below it, or None."""
        for template in self._roots:
            root = template.replace("{tenant_id}", tenant_id)
            path = address.removeprefix(root)
            if address.startswith(root) and is_plain(path) and "%" not in path:
                return root, path
        return None

    async def _read(self, address: str, tenant_id: str, most: int) -> AsyncGenerator[bytes, None]:
        try:
            storage, path = self._place_of(address, tenant_id)
            if not await asyncio.to_thread(storage.keeps_inside, path):
                raise FileRefused("its path leaves the tenant's folder")
            if await storage.size_bytes(path) > most:
                raise FileRefused(f"it is larger than {most} bytes")
            async for chunk in storage.read(path):
                yield chunk
        except FileNotFoundError:
            expired = ", or has expired" if is_upload(address) else ""
            raise FileRefused(f"it does not exist{expired}") from None
        except FileRefused:
            raise
        except STORAGE_ERRORS as error:
            raise FileUnreachable(f"its storage cannot be read: {type(error).__name__}") from None

    def _place_of(self, address: str, tenant_id: str) -> tuple[Storage, str]:
        """Where the file lies. Raises STORAGE_ERRORS."""
        if (upload_id := upload_id_of(address)) is not None and self._uploads is not None:
            return self._uploads, upload_path(tenant_id, upload_id)
        below = self._below_root(address, tenant_id)
        assert below is not None
        return Storage(below[0]), below[1]


def address_of(control: Mapping[str, Any]) -> str:
    return str(control.get("image_url") or "")
