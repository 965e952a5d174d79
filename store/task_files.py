"""What tasks and tenants leave in object storage, and its deletion.

    {BRIDGE_STORE_URL}/results, controls, datasets/{job_id}/…   of a job or training (bridge/storage.py)
    {BRIDGE_STORE_URL}/models, checkpoints/{tenant_id}/…        of all trainings of a tenant
    {BRIDGE_STORE_URL}/fetched-models/{tenant_id}/…             models that its images name by address
    {OBJECT_STORE_URL}/snapshots/{task_id}/…                    copies of datasets, lists of files
    {UPLOADS_URL}/{tenant_id}/…                                 what callers send for their tasks

Results of a ComfyUI service that is not our bridge are stored by that service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

from activities.object_folders import STORAGE_ERRORS, BadAddress, FolderAddress, ObjectFolder, read_address
from activities.upload_files import UploadFiles
from store.failures import FilesUnavailable
from store.upkeep import EndedTask
from store.uploads import StoredUpload

RESULTS: Final = ("results",)
MODELS: Final = ("models", "checkpoints")
FETCHED_MODELS: Final = ("fetched-models",)
_OF_JOB: Final = (*RESULTS, "controls", "datasets")


class TaskFiles:
    """The files of tasks. Every method may be repeated, returns how many files it deleted, and raises
    FilesUnavailable."""

    def __init__(self, *, bridge_store_url: str, object_store_url: str, uploads_url: str | None = None) -> None:
        """Raises ValueError for an unusable address."""
        self._uploads = None if uploads_url is None else UploadFiles.at(uploads_url)
        self._bridge = _address("BRIDGE_STORE_URL", bridge_store_url)
        self._objects = _address("OBJECT_STORE_URL", object_store_url)

    async def delete_of(self, ended: Iterable[EndedTask]) -> int:
        """Delete results, control images, lists and snapshots of tasks. Models and checkpoints stay."""
        deleted = 0
        for task in ended:
            deleted += await _delete(self._objects, "snapshots", task.task_id)
            for job_id in {job_id for job_id in task.job_ids if job_id}:
                for folder in _OF_JOB:
                    deleted += await _delete(self._bridge, folder, job_id)
        return deleted

    async def delete_models_of(self, tenant_id: str) -> int:
        """Delete every model and checkpoint of a tenant."""
        return sum([await _delete(self._bridge, folder, tenant_id) for folder in (*MODELS, *FETCHED_MODELS)])

    async def delete_older(self, folders: Iterable[str], before: datetime) -> int:
        """Delete what was written to `folders` of the bridge's storage before a time."""
        return sum([await _delete(self._bridge, folder, before=before) for folder in folders])

    async def delete_uploads(self, expired: Iterable[StoredUpload]) -> int:
        """Delete the files of uploads; none where no storage is set for them."""
        if self._uploads is None:
            return 0
        async with _said(self._uploads.root):
            return sum([await self._uploads.delete(each.tenant_id, each.upload_id) for each in expired])

    async def delete_uploads_of(self, tenant_id: str) -> int:
        """Delete every file that a tenant has sent."""
        if self._uploads is None:
            return 0
        async with _said(self._uploads.root):
            return await self._uploads.delete_of(tenant_id)

    async def delete_uploads_older(self, before: datetime) -> int:
        """Delete what was written before a time: what a gateway that was killed has left, and no row names."""
        if self._uploads is None:
            return 0
        async with _said(self._uploads.root):
            return await self._uploads.delete_older(before)

    async def delete_leftovers(self, before: datetime) -> int:
        """Delete what killed writers have left on disks before a time: no listing shows it."""
        deleted = 0
        of_bridge = (*_OF_JOB, *MODELS, *FETCHED_MODELS, "lora-caches", "probes")
        for root, folders in ((self._bridge, of_bridge), (self._objects, ("snapshots",))):
            for folder in folders:
                async with _said(root):
                    if (local := root.below(folder).local) is not None and local.is_dir():
                        deleted += await ObjectFolder(root, folder, is_ours=True).delete_leftovers(before)
        if self._uploads is not None:
            async with _said(self._uploads.root):
                deleted += await self._uploads.delete_leftovers(before)
        return deleted


def _address(setting: str, url: str) -> FolderAddress:
    try:
        return read_address(url)
    except BadAddress as error:
        raise ValueError(f"COMFYUI_TEMPORAL_{setting} {error}.") from None


async def _delete(root: FolderAddress, *below: str, before: datetime | None = None) -> int:
    local = root.below(*below).local
    if local is not None and not local.is_dir():
        return 0
    async with _said(root):
        folder = ObjectFolder(root, *below, is_ours=True)
        paths = [
            found.path
            async for found in folder.objects()
            if before is None or (found.changed_at is not None and found.changed_at < before)
        ]
        await folder.delete(paths)
        return len(paths) + (await folder.delete_leftovers() if before is None else 0)


@asynccontextmanager
async def _said(root: FolderAddress) -> AsyncIterator[None]:
    """Inside, what storage fails with is FilesUnavailable."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise FilesUnavailable(
            f"Object storage at {root.text} cannot be used: {type(error).__name__}. Nothing that names its files was "
            "deleted: check its credentials, then repeat the command."
        ) from None
