"""Lists of a dataset's files in object storage: callers' manifests, the gateway's lists, snapshots' own lists.

A list is named by its address and the checksum of its bytes. So a run holds one line instead of megabytes
(pitfall 39), and the list cannot change after the order. The gateway's list is in the task's own folder and is deleted
with the snapshot:

    {object_store_url}/snapshots/{task_id}/{dataset_id}/asked-{sha256}.json
"""

from __future__ import annotations

import hashlib
from typing import Final

from pydantic import TypeAdapter, ValidationError

from activities.dataset_source import folder_failure, invalid, message_of
from activities.object_folders import STORAGE_ERRORS, BadAddress, FolderAddress, ObjectFolder, read_address
from activities.outside_http import OutsideFailure
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.size_budget import MAX_FILE_LIST_BYTES
from comfyui_temporal.contracts.tasks import FileList

_LIST: Final[TypeAdapter[list[str]]] = TypeAdapter(FileList)


def checksum_of(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def as_list(files: list[str]) -> bytes:
    """A list of files as it is stored: a JSON array."""
    return _LIST.dump_json(files)


def task_folder(root: FolderAddress, task_id: str, dataset_id: str) -> ObjectFolder:
    """The folder of a task's snapshot and of the requested list. Raises STORAGE_ERRORS."""
    return ObjectFolder(root, "snapshots", task_id, dataset_id, is_ours=True)


def _name_of(sha256: str) -> str:
    return f"asked-{sha256}.json"


def storage_away(root: FolderAddress, error: Exception) -> OutsideFailure:
    return OutsideFailure(
        FailureCode.INTERNAL,
        f"Temporary object storage at {root.text} cannot be used: {message_of(error)}. It is retried; "
        "check COMFYUI_TEMPORAL_OBJECT_STORE_URL, its credentials and its free space.",
    )


class FileLists:
    """Passes a long list from the gateway to the run that it starts. Raises OutsideFailure."""

    def __init__(self, root: FolderAddress) -> None:
        self._root = root

    @classmethod
    def at(cls, object_store_url: str) -> FileLists:
        """Raises ValueError for an unusable address."""
        try:
            return cls(read_address(object_store_url))
        except BadAddress as error:
            raise ValueError(f"COMFYUI_TEMPORAL_OBJECT_STORE_URL: {error}") from None

    async def put(self, task_id: str, dataset_id: str, files: list[str]) -> str:
        """Store the list and return the checksum that names it. Storing the same list twice makes one object."""
        raw = as_list(files)
        sha256 = checksum_of(raw)
        try:
            await task_folder(self._root, task_id, dataset_id).write(_name_of(sha256), raw)
        except STORAGE_ERRORS as error:
            raise storage_away(self._root, error) from None
        return sha256

    async def get(self, folder: ObjectFolder, sha256: str) -> list[str]:
        """Read what `put` stored. Raises OutsideFailure `dataset_invalid` if it is missing or was changed."""
        try:
            raw = await folder.read_at_most(_name_of(sha256), MAX_FILE_LIST_BYTES)
        except FileNotFoundError:
            raw = None
        except STORAGE_ERRORS as error:
            raise storage_away(self._root, error) from None
        if raw is None or checksum_of(raw) != sha256:
            raise invalid(
                f"The list of files that was given with the task is not at {folder.address.text}. "
                "Gateway and workers must share COMFYUI_TEMPORAL_OBJECT_STORE_URL; start the task again."
            )
        return read_list(raw, "The list of files")


async def read_manifest(folder: ObjectFolder, name: str, sha256: str) -> list[str]:
    """The files that a caller's manifest lists. Raises OutsideFailure, mostly `dataset_invalid`."""
    where = f"dataset.manifest: {folder.address.text}/{name}"
    try:
        await folder.check_inside(name)
        raw = await folder.read_at_most(name, MAX_FILE_LIST_BYTES)
    except FileNotFoundError:
        raise invalid(f"{where} is not there. Check dataset.manifest.uri.") from None
    except STORAGE_ERRORS as error:
        raise folder_failure(folder, error, name) from None
    if raw is None:
        raise invalid(f"{where} is larger than {MAX_FILE_LIST_BYTES} bytes. Pack files together or use shorter paths.")
    if checksum_of(raw) != sha256:
        raise invalid(f"{where} does not match its sha256: it was changed. Start a task with the new checksum.")
    return read_list(raw, where)


def read_list(raw: bytes, where: str) -> list[str]:
    try:
        return _LIST.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"entry {place}: {first['msg']}" if place else first["msg"]
        raise invalid(f"{where} is not a JSON array of 1 to 10,000 relative paths ({what}).") from None
