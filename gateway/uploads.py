"""What callers do with uploads: send files for their tasks, at once or part by part (contract §6).

    begin ─▶ append, append, …  ─▶ all received ─▶ joined: whole
             8 MiB each, or what one request brought

A part is stored, then counted in the task store where the last one ended; one that does not belong there is refused.
So a repeated, a late and a doubled part change nothing, at whichever gateways they arrive. Once all parts are counted
the file is fixed: whoever asks for it next joins it, and two who join it write the same bytes.

No library fits: `tuspyserver` and `resumable-upload` lock by local files or SQLite and bring a second client for object
storage; none counts for several processes, or by tenant.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import structlog
from starlette.exceptions import HTTPException

from activities.object_folders import STORAGE_ERRORS
from activities.upload_files import Joined, UploadFiles
from comfyui_temporal.contracts.tenant_limits import TenantLimits
from comfyui_temporal.contracts.uploads import (
    HEAD_BYTES,
    KIND_NAMES,
    MAX_IMAGE_BYTES,
    FileKind,
    FileType,
    InputKind,
    file_type,
)
from gateway.body_memory import BodyMemory
from gateway.problems import FieldProblem, Problem, ProblemCode
from gateway.tenant_limits import checked
from gateway.upload_body import SentBytes
from gateway.upload_turns import TurnNotReached, UploadTurns
from runtime.caller_tokens import Caller
from store import StoredUpload, StoreUnavailable, TaskStore
from store.uploads import MAX_PARTS, Finished, Received

PART_BYTES: Final = 8 * 1024 * 1024
"""What one upload takes in memory, and what a killed gateway loses at most."""
JOIN_BYTES: Final = 3 * PART_BYTES
"""What a join takes: the part that it reads, and those that are being written (activities/object_folders.py)."""
MIB: Final = 1024 * 1024

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class UploadSettings:
    """Without `files` nothing can be uploaded. Sizes in bytes."""

    files: UploadFiles | None = None
    max_bytes: int = 512 * MIB
    """Of one file."""
    whole_bytes: int = 20 * MIB
    """Of one that is sent at once."""
    inline_bytes: int = 256 * 1024
    """Of all files in one order together; 0: none is taken."""
    kept: timedelta = timedelta(hours=24)


class Uploads:
    """The uploads of all tenants, for one caller at a time. Every method raises Problem."""

    def __init__(
        self,
        store: TaskStore,
        settings: UploadSettings,
        limits_of: Callable[[str], TenantLimits],
        memory: BodyMemory,
    ) -> None:
        self._rows = store.uploads
        self.settings = settings
        self._limits_of = limits_of
        self._memory = memory
        self._turns, self._joins = UploadTurns(), UploadTurns()

    @property
    def files(self) -> UploadFiles:
        if self.settings.files is None:
            raise Problem(
                ProblemCode.UPLOADS_NOT_OFFERED,
                "Files cannot be uploaded here: no storage is set for them (COMFYUI_TEMPORAL_UPLOADS_URL). "
                "Give an https:// or object storage address instead.",
            )
        return self.settings.files

    async def begin(
        self, caller: Caller, size: int, *, kind: InputKind | None = None, metadata: str = "", upload_id: str = ""
    ) -> StoredUpload:
        """An upload of `size` bytes, of which nothing is there yet. Raises Problem 413, 429."""
        _ = self.files
        if size > self.settings.max_bytes:
            raise Problem(ProblemCode.TOO_LARGE, f"A file may have at most {self.settings.max_bytes} bytes.")
        now = datetime.now(UTC)
        new = StoredUpload(
            upload_id=upload_id or secrets.token_hex(16),
            tenant_id=caller.tenant_id,
            user_id=caller.user_id,
            declared=kind,
            size_bytes=size,
            metadata=metadata,
            created_at=now,
            expires_at=now + self.settings.kept,
        )
        checked(await _stored(self._rows.admit(new, self._limits_of(caller.tenant_id))), caller.tenant_id)
        return new

    async def take(self, caller: Caller, body: SentBytes, kind: InputKind | None) -> StoredUpload:
        """A file that is sent at once. Raises Problem 413, 415, 422, 429."""
        most = self.settings.whole_bytes
        too_large = Problem(
            ProblemCode.TOO_LARGE,
            f"A file that is sent at once may have at most {most} bytes. Send a larger one in parts (tus 1.0): "
            f"up to {self.settings.max_bytes} bytes.",
        )
        if body.stated is not None and body.stated > most:
            raise too_large
        async with AsyncExitStack() as room:
            await room.enter_async_context(self._room_for(caller, body))
            upload = await self.begin(caller, most if body.stated is None else body.stated, kind=kind)
            try:
                upload = await self._received(upload, body, is_whole=True, too_large=too_large)
                await room.aclose()
                upload = await self._joined(upload)
            except BaseException:
                await self._drop(upload)
                raise
        if upload.whole_at is None:
            # Its sender has left.
            await self._drop(upload)
            raise HTTPException(400)
        return upload

    async def append(self, caller: Caller, upload_id: str, at_byte: int, body: SentBytes) -> StoredUpload:
        """More of an upload, from the byte on that it has reached. Raises Problem 404, 409, 410, 413, 415."""
        upload = await self.own(caller, upload_id)
        _check_part(upload, at_byte, body)
        try:
            async with self._turns.of(upload_id, body) as has_waited:
                if has_waited:
                    upload = await self._again(upload)
                    _check_part(upload, at_byte, body)
                async with self._room_for(caller, body):
                    upload = await self._received(upload, body, is_whole=False, too_large=_more_than_said(upload))
        except TurnNotReached:
            raise _wrong_offset(upload) from None
        if body.is_ended and upload.received_bytes == at_byte:
            raise _wrong_offset(upload)
        return await self._joined(upload)

    async def own(self, caller: Caller, upload_id: str) -> StoredUpload:
        """An upload that the caller sees, whole if everything has arrived. Raises Problem 404, 410."""
        _ = self.files
        upload = await _stored(self._rows.one(upload_id))
        if upload is None or not caller.sees(tenant_id=upload.tenant_id, user_id=upload.user_id):
            raise _unknown(upload_id)
        if upload.expires_at <= datetime.now(UTC):
            raise Problem(ProblemCode.UPLOAD_EXPIRED, f"Upload {upload_id} has expired: send the file again.")
        return await self._joined(upload)

    async def delete(self, caller: Caller, upload_id: str) -> None:
        """Delete an upload. A task that has not fetched it yet fails."""
        await self._drop(await self.own(caller, upload_id))

    async def keep(self, caller: Caller, upload_id: str, content: bytes, kind: InputKind | None) -> StoredUpload:
        """A file that came in an order, under an id of its own: a repeat of the order finds it, and keeps it longer."""
        known = await _stored(self._rows.one(upload_id))
        upload = await self.begin(caller, len(content), kind=kind, upload_id=upload_id)
        if known is not None and known.whole_at is not None and known.expires_at > datetime.now(UTC):
            return known.model_copy(update={"expires_at": upload.expires_at})
        # Of one that had expired the file may be deleted already.
        return await self._put(upload, content)

    async def named(self, caller: Caller, upload_ids: list[str]) -> Mapping[str, StoredUpload]:
        """Those of these uploads that the caller sees, expired ones too."""
        found = await _stored(self._rows.some(caller.tenant_id, upload_ids)) if upload_ids else {}
        seen = {
            upload_id: upload
            for upload_id, upload in found.items()
            if caller.sees(tenant_id=upload.tenant_id, user_id=upload.user_id)
        }
        return {upload_id: await self._joined(upload) for upload_id, upload in seen.items()}

    def _room_for(self, caller: Caller, body: SentBytes) -> AbstractAsyncContextManager[None]:
        """Within it the body's buffer has its memory. Raises Problem 429."""
        size = PART_BYTES if body.stated is None else min(body.stated, PART_BYTES)
        return self._memory.reserved(caller.tenant_id, size)

    async def _received(
        self, upload: StoredUpload, body: SentBytes, *, is_whole: bool, too_large: Problem
    ) -> StoredUpload:
        """The upload with what the body brings, not joined yet. What had come before its sender left counts."""
        buffer, left = bytearray(), upload.size_bytes - upload.received_bytes
        is_sized = body.stated is not None or not is_whole
        async for chunk in body.chunks():
            left -= len(chunk)
            if left < 0:
                raise too_large
            buffer += chunk
            while len(buffer) >= PART_BYTES:
                part = bytes(memoryview(buffer)[:PART_BYTES])
                del buffer[:PART_BYTES]
                upload = await self._count(upload, part, is_sized=is_sized)
        if is_whole and body.has_left:
            return upload
        if is_whole and not upload.received_bytes:
            # Nobody else knows its id yet: it can go where it belongs at once.
            return await self._put(upload, bytes(buffer))
        if buffer:
            upload = await self._count(upload, bytes(buffer), is_sized=is_sized)
        return upload.model_copy(update={"size_bytes": upload.received_bytes}) if is_whole else upload

    async def _count(self, upload: StoredUpload, content: bytes, *, is_sized: bool) -> StoredUpload:
        """Store one part and count it. `is_sized`: the upload's size is known, and not only the most that it may be."""
        found: FileType | None = None
        reached = upload.received_bytes + len(content)
        if not upload.received_bytes and (len(content) >= HEAD_BYTES or reached == upload.size_bytes):
            found = await self._type_of(upload, content[:HEAD_BYTES], upload.size_bytes if is_sized else reached)
        if len(upload.parts) >= MAX_PARTS:
            least = -(-upload.size_bytes // MAX_PARTS)
            raise Problem(
                ProblemCode.TOO_LARGE,
                f"The file came in {MAX_PARTS} parts, the most there may be: begin again, with parts of at least "
                f"{least} bytes.",
            )
        tenant_id, upload_id, at_byte = upload.tenant_id, upload.upload_id, upload.received_bytes
        async with _storage():
            name = await self.files.put_part(tenant_id, upload_id, at_byte, content)
        part = Received(
            at_byte=at_byte,
            size_bytes=len(content),
            name=name,
            kind=found.kind if found else None,
            content_type=found.content_type if found else None,
        )
        counted = await _stored(self._rows.extend(upload_id, part)) or await self._again(upload)
        if counted.parts[-1:] == [name]:
            # Also where the store did it, lost its connection and was asked again.
            return counted
        if name not in counted.parts:
            with suppress(*STORAGE_ERRORS):
                await self.files.drop_part(tenant_id, upload_id, name)
        raise _wrong_offset(counted)

    async def _put(self, upload: StoredUpload, content: bytes) -> StoredUpload:
        """The whole file at once."""
        found = await self._type_of(upload, content[:HEAD_BYTES], len(content))
        async with _storage():
            written = await self.files.put(upload.tenant_id, upload.upload_id, content)
        return await self._finished(upload, written, found)

    async def _joined(self, upload: StoredUpload) -> StoredUpload:
        """The upload, whole if everything of it has arrived. Raises Problem 429, 503."""
        if upload.whole_at is not None or not upload.is_received or not upload.parts:
            return upload
        try:
            async with self._joins.of(upload.upload_id) as has_waited:
                if has_waited and (joined := await self._again(upload)).whole_at is not None:
                    return joined
                async with self._memory.reserved(upload.tenant_id, JOIN_BYTES):
                    return await self._join(upload)
        except TurnNotReached:
            raise Problem(
                ProblemCode.STORAGE_UNAVAILABLE, "All has arrived, and is being put together: ask again later."
            ) from None

    async def _join(self, upload: StoredUpload) -> StoredUpload:
        async with _storage():
            try:
                written = await self.files.join(upload.tenant_id, upload.upload_id, upload.parts)
            except FileNotFoundError:
                # Another gateway joined it first, and deleted the parts.
                return await self._again(upload)
        found = await self._type_of(upload, written.head, written.size_bytes)
        finished = await self._finished(upload, written, found)
        with suppress(*STORAGE_ERRORS):
            await self.files.drop_parts(upload.tenant_id, upload.upload_id)
        return finished

    async def _finished(self, upload: StoredUpload, written: Joined, found: FileType) -> StoredUpload:
        whole = Finished(
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            kind=found.kind,
            content_type=found.content_type,
        )
        finished = await _stored(self._rows.finish(upload.upload_id, whole))
        if finished is None:
            await self._drop(upload)
            raise _unknown(upload.upload_id)
        log.info("uploaded", tenant_id=upload.tenant_id, kind=found.kind.value, size_bytes=written.size_bytes)
        return finished

    async def _again(self, upload: StoredUpload) -> StoredUpload:
        found = await _stored(self._rows.one(upload.upload_id))
        if found is None:
            raise _unknown(upload.upload_id)
        return found

    async def _type_of(self, upload: StoredUpload, head: bytes, size_bytes: int) -> FileType:
        """What the file is. One that no task takes, or that is not what it was said to be, is deleted."""
        try:
            return _type_of(head, size_bytes, upload.declared)
        except Problem:
            await self._drop(upload)
            raise

    async def _drop(self, upload: StoredUpload) -> None:
        """Delete the row last: as long as it is there, the purge finds the files."""
        async with _storage():
            await self.files.delete(upload.tenant_id, upload.upload_id)
        await _stored(self._rows.forget([upload.upload_id]))


def _check_part(upload: StoredUpload, at_byte: int, body: SentBytes) -> None:
    """Raises Problem 409, 413."""
    if at_byte != upload.received_bytes or upload.whole_at is not None:
        raise _wrong_offset(upload)
    if body.stated is not None and at_byte + body.stated > upload.size_bytes:
        raise _more_than_said(upload)


def _more_than_said(upload: StoredUpload) -> Problem:
    return Problem(
        ProblemCode.TOO_LARGE,
        f"More bytes than Upload-Length said ({upload.size_bytes}); begin a new upload with the right length.",
    )


def _type_of(head: bytes, size_bytes: int, declared: str | None) -> FileType:
    """Raises Problem 413, 415, 422."""
    found = file_type(head)
    if found is None:
        known = ", ".join(KIND_NAMES.values())
        raise Problem(
            ProblemCode.FILE_UNSUPPORTED, f"By its first bytes the file is none of these: {known}. It was not kept."
        )
    if found.kind is FileKind.IMAGE and size_bytes > MAX_IMAGE_BYTES:
        raise Problem(
            ProblemCode.TOO_LARGE, f"A picture may have at most {MAX_IMAGE_BYTES} bytes. The file was not kept."
        )
    if declared is None or InputKind(declared).file is found.kind:
        return found
    raise Problem(
        ProblemCode.INPUT_INVALID,
        f"The file is {KIND_NAMES[found.kind]}, and was said to be of kind {declared}. It was not kept.",
        fields=[FieldProblem(field="kind", message=f"is {declared}, and the file is of kind {found.kind}")],
    )


def _unknown(upload_id: str) -> Problem:
    return Problem(ProblemCode.UPLOAD_UNKNOWN, f"There is no upload {upload_id} of this tenant.")


def _wrong_offset(upload: StoredUpload) -> Problem:
    return Problem(
        ProblemCode.UPLOAD_OFFSET,
        f"Upload {upload.upload_id} has {upload.received_bytes} of {upload.size_bytes} bytes, and goes on from there: "
        "ask for its Upload-Offset with HEAD.",
        headers={"Upload-Offset": str(upload.received_bytes)},
    )


async def _stored(doing: Awaitable[T]) -> T:
    try:
        return await doing
    except StoreUnavailable:
        raise Problem(
            ProblemCode.STORE_UNAVAILABLE, "The task store cannot be used now. What has arrived is kept: go on later."
        ) from None


@asynccontextmanager
async def _storage() -> AsyncIterator[None]:
    """Inside, what storage fails with is a Problem."""
    try:
        yield
    except STORAGE_ERRORS as error:
        log.warning("upload_storage_failed", reason=type(error).__name__)
        raise Problem(
            ProblemCode.STORAGE_UNAVAILABLE,
            "The storage of uploads cannot be used now. What has arrived is kept: go on later.",
        ) from None
