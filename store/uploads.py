"""Uploads of callers: who has sent how much of which file (contract §6). Their bytes are in object storage.

    admitted ─▶ part by part ─▶ all received ─▶ whole
                each counts only where the last one ended: of two senders of one part one is refused

Each function is one transaction's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import BigInteger, Text, any_, bindparam, case, delete, exists, func, literal, select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.tenant_limits import Admission, Allowance, Limit, TenantLimits
from comfyui_temporal.contracts.uploads import FileKind, UploadView, upload_address
from store.database import Database
from store.tables import tasks, uploads

MAX_PARTS: Final = 1_000
LEAST_COUNTED_BYTES: Final = 64 * 1024
"""A small file counts as so much: many of them fill tables and directories."""
DELETED_AT_ONCE: Final = 50
LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)
OPEN_AGAIN_SECONDS: Final = 60
"""When a caller at a limit may try again: it depends on what is deleted or expires."""


class StoredUpload(OwnModel):
    """One upload. `parts`: names of its parts in order, empty once it is whole."""

    upload_id: str
    tenant_id: str
    user_id: str
    declared: str | None = None
    """The kind that its sender stated."""
    kind: FileKind | None = None
    content_type: str | None = None
    size_bytes: int
    received_bytes: int = 0
    parts: list[str] = []
    sha256: str | None = None
    metadata: str = ""
    """What the sender wrote beside it, as it was sent (tus: `Upload-Metadata`)."""
    created_at: Instant
    expires_at: Instant
    whole_at: Instant | None = None

    @property
    def is_received(self) -> bool:
        return self.received_bytes == self.size_bytes

    def view(self) -> UploadView:
        """As its sender sees it."""
        return UploadView(
            **self.model_dump(include=set(UploadView.model_fields) & set(StoredUpload.model_fields)),
            address=upload_address(self.upload_id),
            is_whole=self.whole_at is not None,
        )


class Received(OwnModel):
    """A part that is in object storage, and where in the file it begins."""

    at_byte: int
    size_bytes: int
    name: str
    kind: FileKind | None = None
    content_type: str | None = None


class Finished(OwnModel):
    """What a whole file is."""

    size_bytes: int
    sha256: str
    kind: FileKind
    content_type: str


_TENANT: Final = bindparam("tenant", type_=Text)
_ID: Final = bindparam("id", type_=Text)
_IDS: Final = bindparam("ids", type_=ARRAY(Text))
_LOCK: Final = select(func.pg_advisory_xact_lock(func.hashtextextended(_TENANT, literal(18, BigInteger))))
_USED: Final = select(
    func.coalesce(func.sum(func.greatest(uploads.c.size_bytes, LEAST_COUNTED_BYTES)), 0),
    func.count(case((uploads.c.whole_at.is_(None) & (uploads.c.expires_at > func.now()), 1))),
).where(uploads.c.tenant_id == _TENANT)
_ONE: Final = select(uploads).where(uploads.c.upload_id == _ID)
_SOME: Final = select(uploads).where(uploads.c.upload_id == any_(_IDS), uploads.c.tenant_id == _TENANT)
_EXTEND: Final = (
    update(uploads)
    .where(
        uploads.c.upload_id == _ID,
        uploads.c.received_bytes == bindparam("at_byte", type_=BigInteger),
        uploads.c.received_bytes + bindparam("more", type_=BigInteger) <= uploads.c.size_bytes,
        uploads.c.whole_at.is_(None),
        func.cardinality(uploads.c.parts) < MAX_PARTS,
    )
    .values(
        received_bytes=uploads.c.received_bytes + bindparam("more", type_=BigInteger),
        parts=func.array_append(uploads.c.parts, bindparam("name", type_=Text), type_=ARRAY(Text)),
        kind=func.coalesce(uploads.c.kind, bindparam("new_kind", type_=Text)),
        content_type=func.coalesce(uploads.c.content_type, bindparam("new_type", type_=Text)),
    )
    .returning(uploads)
)
_FINISH: Final = (
    update(uploads)
    .where(uploads.c.upload_id == _ID)
    .values(
        size_bytes=bindparam("size", type_=BigInteger),
        received_bytes=bindparam("size", type_=BigInteger),
        parts=[],
        sha256=bindparam("checksum", type_=Text),
        kind=bindparam("new_kind", type_=Text),
        content_type=bindparam("new_type", type_=Text),
        whole_at=func.coalesce(uploads.c.whole_at, func.now()),
    )
    .returning(uploads)
)
_KEEP_LONGER: Final = (
    update(uploads)
    .where(uploads.c.upload_id == _ID)
    .values(expires_at=func.greatest(uploads.c.expires_at, bindparam("until", type_=uploads.c.expires_at.type)))
    .returning(uploads.c.upload_id)
)
CLOCKS_DIFFER: Final = timedelta(hours=1)
"""By less than this: those of gateways, Temporal, the store and the storage."""
_MAY_BE_NAMED: Final = exists().where(
    tasks.c.tenant_id == uploads.c.tenant_id,
    tasks.c.ended_at.is_(None),
    tasks.c.scene.in_([scene.value for scene, spec in SCENES.items() if not spec.copies_dataset]),
    tasks.c.created_at.between(uploads.c.created_at - CLOCKS_DIFFER, uploads.c.expires_at + CLOCKS_DIFFER),
)
"""By an open task that takes files, not a dataset: it began while the upload could be named. It fetches the file for
each attempt, and how long it waits in queues has no limit. Its input is not searched: it may be encrypted, or not be
kept."""
_EXPIRED: Final = (
    select(uploads)
    .where(uploads.c.expires_at < bindparam("before"), uploads.c.expires_at >= bindparam("since"), ~_MAY_BE_NAMED)
    .order_by(uploads.c.expires_at)
    .limit(DELETED_AT_ONCE)
)
_DELETE_EXPIRED: Final = (
    delete(uploads)
    .where(uploads.c.upload_id == _ID, uploads.c.expires_at < bindparam("before"), ~_MAY_BE_NAMED)
    .returning(uploads.c.upload_id)
)
_OF_TENANT: Final = select(uploads).where(uploads.c.tenant_id == _TENANT).limit(DELETED_AT_ONCE)
_OLDEST: Final = select(func.min(uploads.c.created_at))
_DELETE: Final = delete(uploads).where(uploads.c.upload_id == any_(_IDS))


async def admit(connection: AsyncConnection, upload: StoredUpload, limits: TenantLimits) -> Admission:
    """Store a new upload with its whole size, if the tenant's limits allow it. One that is known is kept longer."""
    await connection.execute(_LOCK, {"tenant": upload.tenant_id})
    if await connection.scalar(_KEEP_LONGER, {"id": upload.upload_id, "until": upload.expires_at}) is not None:
        return Admission()
    kept, unfinished = (await connection.execute(_USED, {"tenant": upload.tenant_id})).one()
    used = (
        (Limit.OPEN_UPLOADS, limits.open_uploads, int(unfinished) + 1),
        (Limit.UPLOAD_BYTES, limits.upload_bytes, int(kept) + max(upload.size_bytes, LEAST_COUNTED_BYTES)),
    )
    refused = next((name for name, most, after in used if 0 < most < after), None)
    if refused is None:
        await connection.execute(insert(uploads).values(**upload.model_dump()))
    return Admission(
        refused=refused,
        allowances=[
            Allowance(limit=name, most=most, left=max(0, most - after), resets_in_seconds=OPEN_AGAIN_SECONDS)
            for name, most, after in used
            if most
        ],
    )


async def one(connection: AsyncConnection, upload_id: str) -> StoredUpload | None:
    row = (await connection.execute(_ONE, {"id": upload_id})).one_or_none()
    return None if row is None else _read(row)


async def some(connection: AsyncConnection, tenant_id: str, upload_ids: Sequence[str]) -> dict[str, StoredUpload]:
    """Id → upload, of this tenant. Others are left out."""
    rows = await connection.execute(_SOME, {"tenant": tenant_id, "ids": list(upload_ids)})
    return {row.upload_id: _read(row) for row in rows}


async def extend(connection: AsyncConnection, upload_id: str, part: Received) -> StoredUpload | None:
    """Count a part where the last one ended; None if it does not belong there, or the upload is whole or gone."""
    values = {
        "id": upload_id,
        "at_byte": part.at_byte,
        "more": part.size_bytes,
        "name": part.name,
        "new_kind": part.kind,
        "new_type": part.content_type,
    }
    row = (await connection.execute(_EXTEND, values)).one_or_none()
    return None if row is None else _read(row)


async def finish(connection: AsyncConnection, upload_id: str, whole: Finished) -> StoredUpload | None:
    """The file is in its place. None if the upload is gone: then nothing will delete the file."""
    values = {
        "id": upload_id,
        "size": whole.size_bytes,
        "checksum": whole.sha256,
        "new_kind": whole.kind,
        "new_type": whole.content_type,
    }
    row = (await connection.execute(_FINISH, values)).one_or_none()
    return None if row is None else _read(row)


async def forget(connection: AsyncConnection, upload_ids: Sequence[str]) -> None:
    await connection.execute(_DELETE, {"ids": list(upload_ids)})


async def forget_expired(connection: AsyncConnection, upload_id: str, before: datetime) -> bool:
    """False if it is kept longer by now, an open task may name it, or it is gone."""
    return await connection.scalar(_DELETE_EXPIRED, {"id": upload_id, "before": before}) is not None


async def expired(connection: AsyncConnection, before: datetime, since: datetime) -> list[StoredUpload]:
    """Some uploads that expired before a time and not before another, in this order, and that no open task names."""
    return [_read(row) for row in await connection.execute(_EXPIRED, {"before": before, "since": since})]


async def of_tenant(connection: AsyncConnection, tenant_id: str) -> list[StoredUpload]:
    """Some uploads of a tenant."""
    return [_read(row) for row in await connection.execute(_OF_TENANT, {"tenant": tenant_id})]


async def oldest(connection: AsyncConnection) -> datetime | None:
    """When the oldest upload began that is still kept; None if there is none."""
    found: datetime | None = await connection.scalar(_OLDEST)
    return found


def _read(row: Any) -> StoredUpload:
    return StoredUpload.model_validate(dict(row._mapping))


class UploadRows:
    """The uploads of the task store (`TaskStore.uploads`). Every method may raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def admit(self, upload: StoredUpload, limits: TenantLimits) -> Admission:
        """Store a new upload with its whole size, if the tenant's limits allow it."""
        return await self._database.transaction(
            lambda connection: admit(connection, upload, limits), doing=f"admitting an upload of {upload.tenant_id}"
        )

    async def one(self, upload_id: str) -> StoredUpload | None:
        return await self._database.read(
            lambda connection: one(connection, upload_id), doing=f"reading the upload {upload_id}"
        )

    async def some(self, tenant_id: str, upload_ids: Sequence[str]) -> dict[str, StoredUpload]:
        """Id → upload, of this tenant. Others are left out."""
        return await self._database.read(
            lambda connection: some(connection, tenant_id, upload_ids), doing=f"reading uploads of {tenant_id}"
        )

    async def extend(self, upload_id: str, part: Received) -> StoredUpload | None:
        """Count a part where the last one ended; None if it does not belong there."""
        return await self._database.transaction(
            lambda connection: extend(connection, upload_id, part), doing=f"counting a part of the upload {upload_id}"
        )

    async def finish(self, upload_id: str, whole: Finished) -> StoredUpload | None:
        """The file is in its place. None if the upload is gone."""
        return await self._database.transaction(
            lambda connection: finish(connection, upload_id, whole), doing=f"finishing the upload {upload_id}"
        )

    async def forget(self, upload_ids: Sequence[str]) -> None:
        await self._database.transaction(
            lambda connection: forget(connection, upload_ids), doing=f"deleting {len(upload_ids)} uploads"
        )

    async def forget_expired(self, upload_id: str, before: datetime) -> bool:
        """Delete the row if it still expired before a time and no open task names it. Whether it did."""
        return await self._database.transaction(
            lambda connection: forget_expired(connection, upload_id, before),
            doing=f"deleting the expired upload {upload_id}",
        )

    async def expired(self, before: datetime, *, since: datetime = LONG_AGO) -> list[StoredUpload]:
        """Some uploads that expired before a time, the oldest first, to be deleted. Empty: none is left.

        `since`: only from here on. What an open task may name stays, and need not be looked at again for each answer.
        """
        return await self._database.read(
            lambda connection: expired(connection, before, since), doing=f"looking for uploads that expired by {before}"
        )

    async def of_tenant(self, tenant_id: str) -> list[StoredUpload]:
        """Some uploads of a tenant, to be deleted. Empty: none is left."""
        return await self._database.read(
            lambda connection: of_tenant(connection, tenant_id), doing=f"looking for uploads of {tenant_id}"
        )

    async def oldest(self) -> datetime | None:
        """When the oldest upload began that is still kept; None if there is none."""
        return await self._database.read(oldest, doing="looking for the oldest upload")
