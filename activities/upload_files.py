"""Uploaded files in object storage: the gateway writes them, the bridge reads them, `python -m store` deletes them.

    {UPLOADS_URL}/{tenant_id}/{upload_id}              a whole file: nothing else ever lies there
    {UPLOADS_URL}/{tenant_id}/{upload_id}.parts/…      parts of one that is not whole yet

Parts are objects of their own: what a killed gateway had stored stays, and any gateway goes on. Each has a name of its
own, so that of two senders of one part neither writes over the other's. Which parts count is in the task store.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from activities.object_folders import BadAddress, FolderAddress, ObjectFolder, read_address
from comfyui_temporal.contracts.uploads import HEAD_BYTES, is_upload_path, parts_folder, upload_path


class Joined(NamedTuple):
    """What was written: its size, its checksum and its first bytes."""

    size_bytes: int
    sha256: str
    head: bytes


class UploadFiles:
    """The files of all uploads. Every method raises STORAGE_ERRORS (activities/object_folders.py)."""

    def __init__(self, root: FolderAddress) -> None:
        self.root = root

    @classmethod
    def at(cls, uploads_url: str) -> UploadFiles:
        """Raises ValueError for an unusable address."""
        try:
            return cls(read_address(uploads_url))
        except BadAddress as error:
            raise ValueError(f"COMFYUI_TEMPORAL_UPLOADS_URL {error}.") from None

    async def put_part(self, tenant_id: str, upload_id: str, at_byte: int, content: bytes) -> str:
        """Store a part. Returns its name."""
        name = f"{at_byte:012}-{len(content)}-{secrets.token_hex(8)}"
        await self._parts(tenant_id, upload_id).write(name, content)
        return name

    async def put(self, tenant_id: str, upload_id: str, content: bytes) -> Joined:
        """Store a whole file."""
        await self._files().write(upload_path(tenant_id, upload_id), content)
        return Joined(len(content), hashlib.sha256(content).hexdigest(), content[:HEAD_BYTES])

    async def join(self, tenant_id: str, upload_id: str, names: Sequence[str]) -> Joined:
        """Make the whole file of its parts. A repeat writes the same bytes. Raises FileNotFoundError too."""
        digest, parts = hashlib.sha256(), self._parts(tenant_id, upload_id)
        size, head = 0, b""

        async def content() -> AsyncIterator[bytes]:
            nonlocal size, head
            for name in names:
                part = await parts.read_whole(name)
                digest.update(part)
                size += len(part)
                head += part[: max(0, HEAD_BYTES - len(head))]
                yield part

        await self._files().write(upload_path(tenant_id, upload_id), content())
        return Joined(size, digest.hexdigest(), head)

    async def drop_part(self, tenant_id: str, upload_id: str, name: str) -> None:
        await self._parts(tenant_id, upload_id).delete([name])

    async def drop_parts(self, tenant_id: str, upload_id: str) -> int:
        """Delete every part of an upload. Returns how many there were."""
        return await self._empty(self._parts(tenant_id, upload_id))

    async def delete(self, tenant_id: str, upload_id: str) -> int:
        """Delete an upload with its parts. Returns how many objects there were. A missing one is no error."""
        path, files = upload_path(tenant_id, upload_id), self._files()
        try:
            await files.size_bytes(path)
            await files.delete([path])
            deleted = 1
        except FileNotFoundError:
            deleted = 0
        return deleted + await self.drop_parts(tenant_id, upload_id)

    async def delete_of(self, tenant_id: str) -> int:
        """Delete everything of a tenant."""
        folder = ObjectFolder(self.root, tenant_id, is_ours=True)
        return await self._empty(folder) + await folder.delete_leftovers()

    async def delete_older(self, before: datetime) -> int:
        """Delete uploads and parts that were written before a time, whether any row names them or not, and no other
        file: somebody may keep something else at this address."""
        return await self._empty(self._files(), before, is_upload_path)

    async def delete_leftovers(self, before: datetime) -> int:
        """Delete what killed writers have left on a disk before a time."""
        if self.root.local is not None and not self.root.local.is_dir():
            return 0
        return await self._files().delete_leftovers(before, is_meant=is_upload_path)

    async def _empty(
        self, folder: ObjectFolder, before: datetime | None = None, is_meant: Callable[[str], bool] | None = None
    ) -> int:
        if folder.address.local is not None and not folder.address.local.is_dir():
            return 0
        paths = [
            found.path
            async for found in folder.objects()
            if (before is None or (found.changed_at is not None and found.changed_at < before))
            and (is_meant is None or is_meant(found.path))
        ]
        await folder.delete(paths)
        return len(paths)

    def _files(self) -> ObjectFolder:
        return ObjectFolder(self.root, is_ours=True)

    def _parts(self, tenant_id: str, upload_id: str) -> ObjectFolder:
        return ObjectFolder(self.root, tenant_id, parts_folder(upload_id), is_ours=True)
