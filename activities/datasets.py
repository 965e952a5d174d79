"""Dataset snapshots: a training reads a copy that cannot change while it runs (step table 2, row 0).

A snapshot is stored in temporary object storage, below the task's own folder:

    {object_store_url}/snapshots/{task_id}/{dataset_id}/files/…        the copies; `snapshot_uri`
    {object_store_url}/snapshots/{task_id}/{dataset_id}/list-{sha256}.json
                                                                       the list of files; runs keep its address
    {object_store_url}/snapshots/{task_id}/{dataset_id}/manifest.json  written last: it marks a complete snapshot
    {object_store_url}/deleted/{task_id}.{dataset_id}                  when its deletion was ordered; kept for two days

Copying resumes. Each heartbeat holds the number of files that are copied, in the order of their paths, and the digest
of their checksums. The next attempt reads those copies again. If sizes and digest agree it continues after them, else
it starts over. Each object is written completely or not at all.

A copy may outlive its attempt: its worker lost the connection, and Temporal timed the attempt out. So a deletion leaves
a note with the time at which it was ordered. A copy that began earlier reads the note after its last write and removes
what it has written. Both times come from Temporal: an attempt that timed out began before anything that was ordered
after it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, Field, ValidationError
from temporalio import activity

from activities.dataset_source import DatasetSource, HashedChunks, invalid, message_of
from activities.deletion_note import DeletionNote
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
from activities.running_call import cancelled_by_workflow, one_line, wait_with_heartbeats
from comfyui_temporal.contracts.calls import CallFor, SnapshotOrder
from comfyui_temporal.contracts.comfyui import DatasetFile, DatasetSnapshot, ManifestReference, SnapshotReference
from comfyui_temporal.contracts.errors import FailureCode

MAX_FILES: Final = 10_000
MAX_BYTES: Final = 100 * 1024**3
ROOTS_SETTING: Final = "COMFYUI_TEMPORAL_DATASET_ROOTS"
MANIFEST: Final = "manifest.json"
LOOK_EVERY_SECONDS: Final = 5.0
"""After a deletion a copy that still runs stops within this time, apart from the file that it is copying."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
T = TypeVar("T")


class Progress(BaseModel):
    """The details of a heartbeat. `digest` is of the first `files_done` files' paths, sizes and checksums."""

    files_done: int = Field(default=0, ge=0)
    files_total: int = 0
    bytes_done: int = 0
    digest: str = ""

    def add(self, file: DatasetFile) -> None:
        self.files_done += 1
        self.bytes_done += file.size_bytes
        self.digest = chained(self.digest, file)


class Manifest(BaseModel):
    """`manifest.json`: the order that this snapshot answers, and its content."""

    source_uri: str
    asked_sha256: str | None = None
    """Checksum of the requested list of files; None for all files."""
    snapshot: SnapshotReference
    began_at: datetime | None = None
    """When the attempt that wrote it began."""
    asked_files: list[str] | None = Field(default=None, exclude=True)
    """The list itself. Release 0.1.0 wrote it here."""

    def answers(self, order: SnapshotOrder) -> bool:
        requested = self.asked_sha256 or (None if self.asked_files is None else checksum_of(as_list(self.asked_files)))
        return (self.source_uri, requested) == (order.source_uri, list_sha256_of(order))


def list_sha256_of(order: SnapshotOrder) -> str | None:
    """The checksum of the list that an order requests, in whichever form it is given; None for all files."""
    if order.files_sha256 is not None:
        return order.files_sha256
    if order.manifest is not None:
        return order.manifest.sha256
    return None if order.files is None else checksum_of(as_list(order.files))


def chained(digest: str, file: DatasetFile) -> str:
    """The digest of a list of files, from the digest of all but its last."""
    return hashlib.sha256(f"{digest}\n{file.path}\n{file.size_bytes}\n{file.sha256}".encode()).hexdigest()


class DatasetSnapshots:
    """Temporary storage of snapshots; an async context manager. Raises OutsideFailure.

    `dataset_roots` are prefixes with `{tenant_id}`: a source must be below one of its tenant's, with symbolic links
    resolved. Without any, no source is read. Raises ValueError for an unusable address.
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
            _setting(ROOTS_SETTING, root)
        self.dataset_roots = tuple(dataset_roots)
        self._max_files = max_files
        self._max_bytes = max_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def snapshot(self, order: SnapshotOrder, progress: Progress, began_at: datetime) -> SnapshotReference:
        """Copy the dataset and return the address of its list of files. `progress` is resumed from and kept up to date.

        `began_at`: when this attempt began. If a deletion was ordered later, the copy is removed.
        """
        target, note = self._target(order), self._note(order)
        finished = await self._finished(order, target)
        if finished is not None:
            return finished
        source = DatasetSource(self._source_folder(order), await self._requested_files(order, target))
        try:
            files = await self._all_copied(source, target, note, progress, began_at)
            snapshot = DatasetSnapshot(
                dataset_id=order.dataset_id, snapshot_uri=target.address.below("files").text + "/", files=files
            )
            await self._check_wanted(note, began_at)
            reference = await self._listed(target, snapshot)
            manifest = Manifest(
                source_uri=order.source_uri,
                asked_sha256=list_sha256_of(order),
                snapshot=reference,
                began_at=began_at,
            )
            await self._stored(target.write(MANIFEST, manifest.model_dump_json().encode()))
            await self._check_wanted(note, began_at)
        finally:
            ordered_at = await self._stored(note.ordered_at())
            if ordered_at is not None and began_at < ordered_at:
                await self._stored(self._emptied_of(target, before=ordered_at))
        return reference

    async def _listed(self, target: ObjectFolder, snapshot: DatasetSnapshot) -> SnapshotReference:
        """Store a snapshot's list under its checksum as the name, so that a late attempt changes nothing."""
        raw = snapshot.model_dump_json().encode()
        sha256 = checksum_of(raw)
        name = f"list-{sha256}.json"
        await self._stored(target.write(name, raw))
        return SnapshotReference(
            dataset_id=snapshot.dataset_id,
            snapshot_uri=snapshot.snapshot_uri,
            manifest=ManifestReference(
                uri=target.address.below(name).text,
                sha256=sha256,
                file_count=len(snapshot.files),
                total_bytes=sum(file.size_bytes for file in snapshot.files),
            ),
        )

    async def _all_copied(
        self, source: DatasetSource, target: ObjectFolder, note: DeletionNote, progress: Progress, began_at: datetime
    ) -> list[DatasetFile]:
        found = await source.files(self._max_files, self._max_bytes)
        files = await self._resumed(target, found, progress)
        progress.files_total = len(found)
        looked_at = -LOOK_EVERY_SECONDS
        for item in found[len(files) :]:
            if time.monotonic() - looked_at >= LOOK_EVERY_SECONDS:
                await self._check_wanted(note, began_at)
                looked_at = time.monotonic()
            file = await self._copied(source, target, item)
            files.append(file)
            progress.add(file)
        return files

    async def whole(self, reference: SnapshotReference) -> DatasetSnapshot:
        """The snapshot with its list, as a training request needs it. Raises OutsideFailure `dataset_invalid`."""
        if reference.manifest is None:
            return _inline(reference)
        folder, _, name = reference.manifest.uri.rpartition("/")
        raw = b""
        try:
            raw = await ObjectFolder(read_address(folder)).read_whole(name)
        except FileNotFoundError:
            pass
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None
        if checksum_of(raw) != reference.manifest.sha256:
            raise invalid(
                f"{reference.manifest.uri} is missing or does not match its sha256. "
                "Only the worker may change snapshots."
            )
        return DatasetSnapshot.model_validate_json(raw)

    async def _check_wanted(self, note: DeletionNote, began_at: datetime) -> None:
        ordered_at = await self._stored(note.ordered_at())
        if ordered_at is not None and began_at < ordered_at:
            raise invalid("The dataset's copy was deleted while it was made: its task is over.")

    async def delete(self, order: SnapshotOrder, ordered_at: datetime) -> None:
        """Delete the snapshot, its manifest first. Repeating it is harmless.

        `ordered_at`: when it was ordered. A copy that began earlier and lands later removes itself. A copy that began
        later, by a run that was reset, is kept.
        """
        target, note = self._target(order), self._note(order)
        await self._stored(note.leave(ordered_at))
        await self._stored(self._emptied_of(target, before=ordered_at))
        await self._stored(note.forget_old())

    async def _emptied_of(self, target: ObjectFolder, *, before: datetime) -> None:
        """Empty the folder, unless it holds a complete snapshot whose attempt began after `before`."""
        manifest = await self._manifest(target)
        if manifest is None or manifest.began_at is None or manifest.began_at < before:
            await _emptied(target)

    def _note(self, order: SnapshotOrder) -> DeletionNote:
        try:
            return DeletionNote(self._root, order.call_for.task_id, order.dataset_id)
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None

    def _target(self, order: SnapshotOrder) -> ObjectFolder:
        for name, value in (("task_id", order.call_for.task_id), ("dataset_id", order.dataset_id)):
            if not _ID.fullmatch(value):
                raise invalid(f"{name} {value!r} is not a folder name: use 1 to 64 letters, digits, '_' and '-'.")
        try:
            return task_folder(self._root, order.call_for.task_id, order.dataset_id)
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None

    async def _requested_files(self, order: SnapshotOrder, target: ObjectFolder) -> list[str] | None:
        """The requested files, in whichever form they are given; None for all."""
        if order.files_sha256 is not None:
            return await FileLists(self._root).get(target, order.files_sha256)
        if order.manifest is not None:
            uri, _, name = order.manifest.uri.rpartition("/")
            folder = self._tenants_folder(order, "dataset.manifest.uri", uri)
            return await read_manifest(folder, unquote(name), order.manifest.sha256)
        return order.files

    def _source_folder(self, order: SnapshotOrder) -> ObjectFolder:
        return self._tenants_folder(order, "dataset.source_uri", order.source_uri)

    def _tenants_folder(self, order: SnapshotOrder, field: str, uri: str) -> ObjectFolder:
        try:
            address = read_address(uri)
        except BadAddress as error:
            raise invalid(f"{field} {error}.") from None
        if not self.dataset_roots:
            raise invalid(f"{field} cannot be read: this worker knows no folders of datasets ({ROOTS_SETTING}).")
        if not self._is_tenants(address, order.call_for.tenant_id):
            raise invalid(f"{field} is not below a folder of the task's tenant.")
        try:
            return ObjectFolder(address)
        except STORAGE_ERRORS as error:
            raise invalid(f"{address.text} cannot be opened: {message_of(error)}. Check {field}.") from None

    def _is_tenants(self, address: FolderAddress, tenant_id: str) -> bool:
        for template in self.dataset_roots:
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
        """The snapshot of an earlier attempt whose answer was lost, if it is complete and answers this order."""
        manifest = await self._manifest(target)
        if manifest is None or not manifest.answers(order):
            return None
        if manifest.snapshot.manifest is None:  # the first release kept the list here
            return await self._listed(target, _inline(manifest.snapshot))
        return manifest.snapshot

    async def _manifest(self, target: ObjectFolder) -> Manifest | None:
        try:
            return Manifest.model_validate_json(await target.read_whole(MANIFEST))
        except (FileNotFoundError, ValidationError):
            return None
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None

    async def _resumed(self, target: ObjectFolder, found: list[FoundObject], progress: Progress) -> list[DatasetFile]:
        """The files that an earlier attempt copied, checked by size and checksum; none if they do not agree."""
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
            raise invalid(f"{item.path!r} changed while it was copied. Use a dataset that does not change.")
        return reading.as_file(item.path)

    async def _stored(self, writing: Coroutine[Any, Any, T]) -> T:
        try:
            return await writing
        except STORAGE_ERRORS as error:
            raise self._storage_away(error) from None

    def _storage_away(self, error: Exception) -> OutsideFailure:
        return storage_away(self._root, error)


def _inline(reference: SnapshotReference) -> DatasetSnapshot:
    """A snapshot with its list inside, as release 0.1.0 kept it."""
    return DatasetSnapshot(**reference.model_dump(exclude={"manifest"}))


def _setting(name: str, uri: str) -> FolderAddress:
    try:
        return read_address(uri)
    except BadAddress as error:
        raise ValueError(f"{name}: {error}") from None


async def _emptied(target: ObjectFolder) -> None:
    await target.delete(["manifest.json"])
    await target.delete([item.path async for item in target.objects()])


class DatasetActivities:
    """Dataset snapshots as workflows see them. The caller opens and closes the client."""

    def __init__(self, client: DatasetSnapshots) -> None:
        self._client = client

    @activity.defn
    async def snapshot(self, order: SnapshotOrder) -> SnapshotReference:
        """Raises ApplicationError: `dataset_invalid` (not retried) or `internal` (storage unavailable, retried)."""
        info = activity.info()
        progress = _last_progress(info.heartbeat_details)
        copying = self._client.snapshot(order, progress, info.started_time)
        return await _until_done(order.call_for, copying, lambda: (progress.model_dump(),))

    @activity.defn
    async def delete_snapshot(self, order: SnapshotOrder) -> None:
        """Idempotent. Raises ApplicationError `internal` (storage unavailable, retried)."""
        await _until_done(order.call_for, self._client.delete(order, activity.info().scheduled_time), tuple)


def _last_progress(details: Sequence[Any]) -> Progress:
    try:
        return Progress.model_validate(details[0]) if details else Progress()
    except ValidationError:
        return Progress()


async def _until_done(call_for: CallFor, work: Coroutine[Any, Any, T], details: Callable[[], tuple[Any, ...]]) -> T:
    """Run storage work with heartbeats. Unlike a request it may be interrupted: the next attempt finds what is done."""
    with one_line(call_for):
        running = asyncio.ensure_future(work)
        cancellation = await wait_with_heartbeats(running, details, on_cancel=running.cancel)
        if not running.cancelled():
            return running.result()
        if cancellation is not None and cancelled_by_workflow():
            raise cancellation
        raise OutsideFailure(FailureCode.INTERNAL, "The worker is stopping; another one continues.")
