"""Counts what each tenant starts and has open, for all processes together (contract §7). Each function is one
transaction's work.

    tenant_starts    one row for each start of the last minute, made by the gateway or else by the run's claim, and for
                     each that was admitted and has not claimed its id yet
    tenant_streams   how many streams of a tenant each gateway process has open

Starts of one tenant take turns by a lock where they are counted, so that two processes never admit the same last one.
Far from every limit they are not counted again (tenant_usage.py). A start counts once: a repeat with the same id is
admitted, and so is a task that is claimed already. A start whose run has not claimed its id yet counts as an open task
for a minute. Its admission is kept for a week: a run that waits for a worker is not refused by its claim, whatever was
started meanwhile.

No library fits: `limits` counts in Redis or MongoDB; `pyrate-limiter` in PostgreSQL, by a second driver that blocks and
a table for each limit. Neither counts what is open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import BigInteger, Text, bindparam, delete, func, literal, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.tenant_limits import WINDOW_SECONDS, Admission, Allowance, Limit, TenantLimits
from store.failures import StartRefused
from store.tables import task_claims, tasks, tenant_starts, tenant_streams
from store.tenant_usage import OPEN_AGAIN_SECONDS, TenantUsage, Used

ADMITTED_DAYS: Final = 7
STREAMS_LAST_SECONDS: Final = 30
"""The streams of a process that has not reported for this long no longer count: it was killed."""

_TENANT: Final = bindparam("tenant", type_=Text)
_TASK: Final = bindparam("task", type_=Text)
_WINDOW: Final = text(f"interval '{WINDOW_SECONDS} seconds'")
_LOCK: Final = select(func.pg_advisory_xact_lock(func.hashtextextended(_TENANT, literal(17, BigInteger))))
_IS_RECENT: Final = tenant_starts.c.at >= func.now() - _WINDOW
_HAS_CLAIMED: Final = select(1).where(task_claims.c.task_id == tenant_starts.c.task_id).exists()
_DROP_ALL_OLD: Final = delete(tenant_starts).where(
    ~_IS_RECENT, _HAS_CLAIMED | (tenant_starts.c.at < func.now() - text(f"interval '{ADMITTED_DAYS} days'"))
)
_DROP_OLD: Final = _DROP_ALL_OLD.where(tenant_starts.c.tenant_id == _TENANT)
_IS_COUNTED: Final = select(
    select(1).where(tenant_starts.c.tenant_id == _TENANT, tenant_starts.c.task_id == _TASK).exists()
)
_IS_CLAIMED: Final = select(select(1).where(task_claims.c.task_id == _TASK).exists())
_USED: Final = select(
    func.count(),
    func.coalesce(func.sum(tenant_starts.c.bytes), 0),
    func.coalesce(func.extract("epoch", func.min(tenant_starts.c.at) + _WINDOW - func.now()), WINDOW_SECONDS),
).where(tenant_starts.c.tenant_id == _TENANT, _IS_RECENT)
_MOST: Final = bindparam("most", type_=BigInteger)
_OPEN_ROWS: Final = (
    select(1).where(tasks.c.tenant_id == _TENANT, tasks.c.ended_at.is_(None)).limit(_MOST).subquery("open_rows")
)
_UNCLAIMED: Final = (
    select(1).where(tenant_starts.c.tenant_id == _TENANT, _IS_RECENT, ~_HAS_CLAIMED).limit(_MOST).subquery("unclaimed")
)
_OPEN: Final = select(
    select(func.count()).select_from(_OPEN_ROWS).scalar_subquery()
    + select(func.count()).select_from(_UNCLAIMED).scalar_subquery()
)
_COUNT: Final = (
    insert(tenant_starts)
    .values(tenant_id=_TENANT, task_id=_TASK, bytes=bindparam("size", type_=BigInteger))
    # An admission that its caller no longer waits for may count the same start at the same time.
    .on_conflict_do_nothing()
)

_ALIVE: Final = tenant_streams.c.reported_at > func.now() - text(f"interval '{STREAMS_LAST_SECONDS} seconds'")
_PROCESS: Final = bindparam("process", type_=Text)
_STREAMS_ELSEWHERE: Final = select(func.coalesce(func.sum(tenant_streams.c.open), 0)).where(
    tenant_streams.c.tenant_id == _TENANT, tenant_streams.c.process_id != _PROCESS, _ALIVE
)


async def admit_start(
    connection: AsyncConnection, usage: TenantUsage, *, tenant_id: str, task_id: str, size: int, limits: TenantLimits
) -> Admission:
    """Count a start whose order has `size` bytes, if the tenant's limits allow it."""
    of_task = {"tenant": tenant_id, "task": task_id}
    if await connection.scalar(_IS_COUNTED, of_task) or await connection.scalar(_IS_CLAIMED, of_task):
        return Admission()
    return await _admit(connection, usage, tenant_id, task_id, size, limits)


async def admit_claim(
    connection: AsyncConnection, usage: TenantUsage, *, tenant_id: str, task_id: str, limits: TenantLimits
) -> None:
    """Count a start that reached Temporal past the gateway, in the transaction of its claim. Raises StartRefused."""
    of_task = {"tenant": tenant_id, "task": task_id}
    if not limits.bounds_starts or await connection.scalar(_IS_COUNTED, of_task):
        return
    admission = await _admit(connection, usage, tenant_id, task_id, 0, limits)
    if admission.refused is not None:
        raise StartRefused(admission.sentence(tenant_id))


async def _admit(
    connection: AsyncConnection, usage: TenantUsage, tenant_id: str, task_id: str, size: int, limits: TenantLimits
) -> Admission:
    used, refused = usage.after(tenant_id, size, limits), None
    if used is None:
        await connection.execute(_LOCK, {"tenant": tenant_id})
        if await connection.scalar(_IS_COUNTED, {"tenant": tenant_id, "task": task_id}):
            return Admission()
        used = (await _counted(connection, tenant_id, limits)).with_own(1, size)
        usage.counted(tenant_id, used)
        refused = used.refused_by(limits)
    if refused is None:
        await connection.execute(_COUNT, {"tenant": tenant_id, "task": task_id, "size": size})
    return Admission(refused=refused, allowances=used.allowances(limits))


async def _counted(connection: AsyncConnection, tenant_id: str, limits: TenantLimits) -> Used:
    """What the tenant uses, counted behind `_LOCK`."""
    of_tenant = {"tenant": tenant_id}
    await connection.execute(_DROP_OLD, of_tenant)
    starts, sent, frees_in = (await connection.execute(_USED, of_tenant)).one()
    opened = 0
    if limits.open_tasks:
        opened = int(await connection.scalar(_OPEN, {**of_tenant, "most": limits.open_tasks}) or 0)
    return Used(int(starts), int(sent), opened, max(1, round(float(frees_in))))


async def admit_stream(
    connection: AsyncConnection, *, tenant_id: str, process_id: str, own_open: int, limits: TenantLimits
) -> Admission:
    """Count one more stream of a process that has `own_open` of the tenant, if the tenant's limit allows it."""
    of_tenant = {"tenant": tenant_id, "process": process_id}
    await connection.execute(_LOCK, of_tenant)
    after = int(await connection.scalar(_STREAMS_ELSEWHERE, of_tenant) or 0) + own_open + 1
    most = limits.open_streams
    is_refused = 0 < most < after
    if not is_refused:
        await _report(connection, process_id, {tenant_id: own_open + 1}, is_exact=False)
    left = max(0, most - after)
    allowance = Allowance(limit=Limit.OPEN_STREAMS, most=most, left=left, resets_in_seconds=OPEN_AGAIN_SECONDS)
    return Admission(refused=Limit.OPEN_STREAMS if is_refused else None, allowances=[allowance] if most else [])


async def report_streams(connection: AsyncConnection, *, process_id: str, open_of: Mapping[str, int]) -> None:
    """State how many streams of each tenant a process has open, and drop what counts no longer, of all tenants."""
    await connection.execute(_DROP_ALL_OLD)
    is_own = (tenant_streams.c.process_id == process_id) & tenant_streams.c.tenant_id.not_in(list(open_of))
    await connection.execute(delete(tenant_streams).where(is_own | ~_ALIVE))
    if open_of:
        await _report(connection, process_id, open_of, is_exact=True)


async def _report(connection: AsyncConnection, process_id: str, open_of: Mapping[str, int], *, is_exact: bool) -> None:
    """Store the counts; unless they are exact a larger one stays, for streams that open at the same time."""
    statement = insert(tenant_streams).values(
        [{"process_id": process_id, "tenant_id": tenant_id, "open": count} for tenant_id, count in open_of.items()]
    )
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["tenant_id", "process_id"],
            set_={
                "open": statement.excluded.open
                if is_exact
                else func.greatest(tenant_streams.c.open, statement.excluded.open),
                "reported_at": func.now(),
            },
        )
    )
