"""The audit log: who did what, or was refused. Each function takes a connection."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from sqlalchemy import bindparam, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.permissions import Operation
from store.tables import audit_log

DELETED_AT_ONCE: Final = 5_000
_OLD: Final = select(audit_log.c.id).where(audit_log.c.at < bindparam("before")).limit(DELETED_AT_ONCE)
_DELETE_OLD: Final = delete(audit_log).where(audit_log.c.id.in_(_OLD))


class AuditRecord(OwnModel):
    """What a caller did, or was refused: `status` and `code` are those of the answer."""

    at: datetime
    """When the answer began, by the gateway's clock. Rows are stored after their answers, in any order."""
    operation: Operation
    status: int
    code: str | None = None
    tenant_id: str
    user_id: str
    token_id: str
    """The token's `jti`, else a hash of its claims. Never the token."""
    task_id: str | None = None


async def append(connection: AsyncConnection, record: AuditRecord) -> None:
    await connection.execute(insert(audit_log).values(**record.model_dump()))


async def delete_older(connection: AsyncConnection, before: datetime) -> int:
    """How many records were deleted; fewer than DELETED_AT_ONCE: none is left."""
    return (await connection.execute(_DELETE_OLD, {"before": before})).rowcount
