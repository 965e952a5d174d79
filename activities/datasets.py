"""Dataset snapshots: a training reads a copy that nobody changes under it (design, step 0 of a training task).

A snapshot lies in temporary object storage, below the task's own folder:

    {object_store_url}/snapshots/{task_id}/{dataset_id}/files/…        the copies; `snapshot_uri`
    {object_store_url}/snapshots/{task_id}/{dataset_id}/manifest.json  written last: a snapshot with one is whole;
                                                                       runs carry its address and checksum

Copying resumes: each heartbeat tells how many files, in the order of their paths, are done and the digest of their
checksums. The next attempt reads those copies again and goes on behind them when sizes and digest agree; else it
starts over. Objects are written whole or not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, Field, ValidationError
from temporalio import activity

from activities.dataset_source import DatasetSource, HashedChunks, invalid, said
from activities.file_lists import FileLists, as_list, checksum_of, read_manifest, storage_away, task_folder
from activities.object_folders import (
    STORAGE_ERRORS,
    BadAddress,
    FolderAddress,
    FoundObject,
    ObjectFolder,
    is_inside,
    read_address,
)
from activities.outside_http import OutsideFailure
from activities.running_call import asked_by_workflow, one_line, wait_with_heartbeats
from contracts.calls import CallFor, SnapshotOrder
from contracts.comfyui import DatasetFile, DatasetSnapshot, ManifestReference, SnapshotReference
from contracts.errors import FailureCode

MAX_FILES: Final = 10_000
MAX_BYTES: Final = 100 * 1024**3
MANIFEST: Final = "manifest.json"

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
T = TypeVar("T")


class Progress(BaseModel):
    """What a heartbeat tells. `digest` is of the first `files_done` files' paths, sizes and checksums."""

    files_done: int = Field(default=0, ge=0)
    files_total: int = 0
    bytes_done: int = 0
    digest: str = ""

    def add(self, file: DatasetFile) -> None:
        self.files_done += 1
        self.bytes_done += file.size_bytes
        self.digest = chained(self.digest, file)


class Manifest(BaseModel):
    """`manifest.json`: which order this snapshot answers, and what it holds."""

    source_uri: str
    asked_sha256: str | None = None
    """Of the list of files that was asked for; None for all of them."""
    snapshot: DatasetSnapshot
    asked_files: list[str] | None = Field(default=None, exclude=True)
    """The list itself, as the first release wrote it."""

    def answers(self, order: SnapshotOrder) -> bool:
        asked = self.asked_sha256 or (None if self.asked_files is None else checksum_of(as_list(self.asked_files)))
        return (self.source_uri, asked) == (order.source_uri, asked_sha256_of(order))


def asked_sha256_of(order: SnapshotOrder) -> str | None:
    """What names the list that an order asks for, whichever way it is told; None for all files."""
    if order.files is not None:
        return checksum_of(as_list(order.files))
    return order.manifest.sha256 if order.manifest is not None else order.files_sha256


def chained(digest: str, file: DatasetFile) -> str:
    """The digest of a list of files, from the digest of all but its last."""
    return hashlib.sha256(f"{digest}\n{file.path}\n{file.size_bytes}\n{file.sha256}".encode()).hexdigest()


class DatasetSnapshots:
    """Temporary storage of snapshots; an async context manager. Raises OutsideFailure.

    `dataset_roots` are the prefixes that tenants' datasets lie below, with `{tenant_id}`; where they are given, a
    source must lie below one of its tenant's, symbolic links followed. Raises ValueError for an unusable address.
    """

    def __init__(
        self,
        object_store_url: str,
        *,
        dataset_roots: Sequence[str] = (),
        max_files: int = MAX_FILES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._root = _setting("COMFYUI_TEMPORAL_OBJECT_STORE_URL", object_store_url)
        for root in dataset_roots:
            _setting("COMFYUI_TEMPORAL_DATASET_ROOTS", root)
        self._dataset_roots = tuple(dataset_roots)
        self._max_files = max_files
        self._max_bytes = max_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def snapshot(self, order: SnapshotOrder, progress: Progress) -> SnapshotReference:
        """Copy the dataset and tell where its list of files lies; `progress` is resumed from and kept up to date."""
        target = self._target(order)
        finished = await self._finished(order, target)
        if finished is not None:
            return finished
        source = DatasetSource(self._source_folder(order), await self._asked_files(order, target))
        found = await source.files(self._max_files, self._max_bytes)
        files = await self._resumed(target, found, progress)
        progress.files_total = len(found)
        for item in found[len(files) :]:
            file = await self._copied(source, target, item)
            files.append(file)
            progress.add(file)
        snapshot = DatasetSnapshot(
            dataset_id=order.dataset_id, snapshot_uri=target.address.below("files").text + "/", files=files
        )
        manifest = Manifest(source_uri=order.source_uri, asked_sha256=asked_sha256_of(order), snapshot=snapshot)
        raw = manifest.model_dump_json().encode()
        await self._stored(target.write(MANIFEST, raw))
        return _reference(target, manifest, raw)

    async def whole(self, reference: SnapshotReference) -> DatasetSnapshot:
        """The snapshot with its list, as a training request holds it. Raises OutsideFailure `dataset_invalid`."""
        if reference.manifest is None:  # the list came with it
            return DatasetSnapshot(**reference.model_dump(exclude={"manifest"}))
        uri = reference.manifest.uri
        raw = b""
        try:
            folder = ObjectFolder(read_address(uri.removesuffix(MANIFEST)))
            raw = await folder.read_whole(MANIFEST)
        except FileNotFoundError:
            pass
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None
        if checksum_of(raw) != reference.manifest.sha256:
            raise invalid(f"{uri} is gone or is not what its sha256 says. Nobody but the worker may touch snapshots.")
        return Manifest.model_validate_json(raw).snapshot

    async def delete(self, order: SnapshotOrder) -> None:
        """Delete the snapshot, its manifest first; one that is gone already is deleted."""
        target = self._target(order)
        await self._stored(target.delete([MANIFEST]))
        await self._stored(_emptied(target))

    def _target(self, order: SnapshotOrder) -> ObjectFolder:
        for name, value in (("task_id", order.call_for.task_id), ("dataset_id", order.dataset_id)):
            if not _ID.fullmatch(value):
                raise invalid(f"{name} {value!r} names no folder: use 1 to 64 letters, digits, '_' and '-'.")
        try:
            return task_folder(self._root, order.call_for.task_id, order.dataset_id)
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None

    async def _asked_files(self, order: SnapshotOrder, target: ObjectFolder) -> list[str] | None:
        """The files that were asked for, however that was told; None for all."""
        if order.manifest is not None:
            uri, _, name = order.manifest.uri.rpartition("/")
            folder = self._tenants_folder(order, "dataset.manifest.uri", uri)
            return await read_manifest(folder, unquote(name), order.manifest.sha256)
        if order.files_sha256 is not None:
            return await FileLists(self._root).get(target, order.files_sha256)
        return order.files

    def _source_folder(self, order: SnapshotOrder) -> ObjectFolder:
        return self._tenants_folder(order, "dataset.source_uri", order.source_uri)

    def _tenants_folder(self, order: SnapshotOrder, field: str, uri: str) -> ObjectFolder:
        try:
            address = read_address(uri)
        except BadAddress as error:
            raise invalid(f"{field} {error}.") from None
        if self._dataset_roots and not self._is_tenants(address, order.call_for.tenant_id):
            raise invalid(f"{field} does not lie below a folder of the task's tenant.")
        try:
            return ObjectFolder(address)
        except STORAGE_ERRORS as error:
            raise invalid(f"{address.text} cannot be opened: {said(error)}. Check {field}.") from None

    def _is_tenants(self, address: FolderAddress, tenant_id: str) -> bool:
        for template in self._dataset_roots:
            root = read_address(template.replace("{tenant_id}", tenant_id))
            if root.scheme != address.scheme:
                continue
            if root.local is not None and address.local is not None:
                if is_inside(root.local, str(address.local)):
                    return True
            elif (address.text + "/").startswith(root.text + "/"):
                return True
        return False

    async def _finished(self, order: SnapshotOrder, target: ObjectFolder) -> SnapshotReference | None:
        """The snapshot of an earlier attempt whose answer was lost, if it is whole and answers this order."""
        try:
            raw = await target.read_whole(MANIFEST)
            manifest = Manifest.model_validate_json(raw)
        except (FileNotFoundError, ValidationError):
            return None
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None
        return _reference(target, manifest, raw) if manifest.answers(order) else None

    async def _resumed(self, target: ObjectFolder, found: list[FoundObject], progress: Progress) -> list[DatasetFile]:
        """The files that an earlier attempt copied, checked by size and checksum; none where they do not agree."""
        claimed, checked = progress.model_copy(), Progress()
        files: list[DatasetFile] = []
        for item in found[: claimed.files_done]:
            file = await self._standing(target, item)
            if file is None:
                break
            files.append(file)
            checked.add(file)
        if checked.digest != claimed.digest:
            files, checked = [], Progress()
        progress.files_done, progress.bytes_done, progress.digest = (
            checked.files_done,
            checked.bytes_done,
            checked.digest,
        )
        return files

    async def _standing(self, target: ObjectFolder, item: FoundObject) -> DatasetFile | None:
        reading = HashedChunks(target.read(f"files/{item.path}"))
        try:
            async for _ in reading:
                pass
        except FileNotFoundError:
            return None
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None
        return reading.as_file(item.path) if reading.size_bytes == item.size_bytes else None

    async def _copied(self, source: DatasetSource, target: ObjectFolder, item: FoundObject) -> DatasetFile:
        reading = HashedChunks(source.read(item.path))
        try:
            await target.write(f"files/{item.path}", reading)
        except Exception as error:
            if reading.failure is not None:
                raise reading.failure from None
            if isinstance(error, STORAGE_ERRORS):
                raise self._storage_away(error) from None
            raise
        if reading.size_bytes != item.size_bytes:
            raise invalid(f"{item.path!r} changed while it was copied. Train on a dataset that nobody writes to.")
        return reading.as_file(item.path)

    async def _stored(self, writing: Coroutine[Any, Any, T]) -> T:
        try:
            return await writing
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None

    def _storage_away(self, error: Exception) -> OutsideFailure:
        return storage_away(self._root, error)


def _reference(target: ObjectFolder, manifest: Manifest, raw: bytes) -> SnapshotReference:
    files = manifest.snapshot.files
    return SnapshotReference(
        dataset_id=manifest.snapshot.dataset_id,
        snapshot_uri=manifest.snapshot.snapshot_uri,
        manifest=ManifestReference(
            uri=target.address.below(MANIFEST).text,
            sha256=checksum_of(raw),
            file_count=len(files),
            total_bytes=sum(file.size_bytes for file in files),
        ),
    )


def _setting(name: str, uri: str) -> FolderAddress:
    try:
        return read_address(uri)
    except BadAddress as error:
        raise ValueError(f"{name}: {error}") from None


async def _emptied(target: ObjectFolder) -> None:
    await target.delete([item.path async for item in target.objects()])


class DatasetActivities:
    """Dataset snapshots as workflows see them. The client stays the caller's to open and close."""

    def __init__(self, client: DatasetSnapshots) -> None:
        self._client = client

    @activity.defn
    async def snapshot(self, order: SnapshotOrder) -> SnapshotReference:
        """Raises ApplicationError: `dataset_invalid` (not retried) or `internal` (storage away, retried)."""
        progress = _last_progress(activity.info().heartbeat_details)
        copying = self._client.snapshot(order, progress)
        return await _until_done(order.call_for, copying, lambda: (progress.model_dump(),))

    @activity.defn
    async def delete_snapshot(self, order: SnapshotOrder) -> None:
        """Idempotent. Raises ApplicationError `internal` (storage away, retried)."""
        await _until_done(order.call_for, self._client.delete(order), tuple)


def _last_progress(details: Sequence[Any]) -> Progress:
    try:
        return Progress.model_validate(details[0]) if details else Progress()
    except ValidationError:
        return Progress()


async def _until_done(call_for: CallFor, work: Coroutine[Any, Any, T], details: Callable[[], tuple[Any, ...]]) -> T:
    """Run storage work with heartbeats. Unlike a request it may be cut short: what stands is found again."""
    with one_line(call_for):
        running = asyncio.ensure_future(work)
        cancellation = await wait_with_heartbeats(running, details, on_cancel=running.cancel)
        if not running.cancelled():
            return running.result()
        if cancellation is not None and asked_by_workflow():
            raise cancellation
        raise OutsideFailure(FailureCode.INTERNAL, "The worker is stopping; another one goes on from here.")
