"""A tenant at a glance: open tasks, and the balance as the credits service last stated it."""

from __future__ import annotations

from typing import Final

from sqlalchemy import bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.tasks import TaskStatus
from store.tables import task_events, tasks

_RECENT: Final = 50
"""Of the user's tasks: the balance is looked for in their events."""
_OPEN: Final = (
    select(tasks.c.status, func.count())
    .where(tasks.c.tenant_id == bindparam("tenant"), tasks.c.ended_at.is_(None))
    .group_by(tasks.c.status)
)
_NEWEST: Final = (
    select(tasks.c.task_id)
    .where(tasks.c.tenant_id == bindparam("tenant"), tasks.c.user_id == bindparam("user"))
    .order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc())
    .limit(_RECENT)
)
_BALANCE: Final = (
    select(task_events.c.balance_after, task_events.c.ts)
    .where(task_events.c.task_id.in_(_NEWEST), task_events.c.balance_after.is_not(None))
    .order_by(task_events.c.ts.desc())
    .limit(1)
)


class TenantSeen(OwnModel):
    """`balance` in points, None before the first event that states one."""

    queued: int = 0
    running: int = 0
    balance: int | None = None
    balance_at: Instant | None = None


async def seen(connection: AsyncConnection, tenant_id: str, user_id: str, *, only_user: str | None) -> TenantSeen:
    """`user_id` is whose balance it is. `only_user`: count this user's tasks alone."""
    counted = _OPEN if only_user is None else _OPEN.where(tasks.c.user_id == only_user)
    counts = {row.status: row[1] for row in await connection.execute(counted, {"tenant": tenant_id})}
    balance = (await connection.execute(_BALANCE, {"tenant": tenant_id, "user": user_id})).one_or_none()
    return TenantSeen(
        queued=counts.get(TaskStatus.QUEUED, 0),
        running=counts.get(TaskStatus.RUNNING, 0),
        balance=balance.balance_after if balance else None,
        balance_at=balance.ts if balance else None,
    )
