"""Ended tasks whose settlement is unknown: which are due for a check, and its result. Each takes a connection."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import structlog
from pydantic import ValidationError
from sqlalchemy import ColumnElement, and_, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.errors import ExceptionCode, sentences_of
from comfyui_temporal.contracts.task_store import (
    CHARGES,
    PRICE,
    SHORTFALL_KEY,
    SHORTFALL_TEXT,
    Correction,
    TaskException,
    UnsettledTask,
)
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from store.tables import task_exceptions, tasks
from store.tasks import insert_exceptions

log = structlog.get_logger(__name__)

LOOKED_AT_FOR: Final = timedelta(hours=25)
"""After a task's end: hourly for a day, and one hour for a late last check."""
# Literals, not parameters: only then does the planner use the partial index.
_IS_UNKNOWN: Final = text(f"tasks.credits ->> 'settlement' = '{SettlementState.UNKNOWN.value}'")
PRICE_TO_CHARGE: Final = (
    select(task_exceptions.c.details[PRICE])
    .where(
        task_exceptions.c.task_id == tasks.c.task_id,
        task_exceptions.c.code == ExceptionCode.SETTLEMENT_UNKNOWN.value,
        task_exceptions.c.details.has_key(PRICE),
        tasks.c.status == TaskStatus.COMPLETED.value,
    )
    .order_by(task_exceptions.c.ts.desc())
    .limit(1)
    .correlate(tasks)
    .scalar_subquery()
    .label(PRICE)
)
"""What a completed task was to be charged, in points; NULL where it ended otherwise, or no record names it."""

CHARGES_SENT: Final = (
    select(func.coalesce(func.max(task_exceptions.c.details[CHARGES].as_integer()), 0))
    .where(
        task_exceptions.c.task_id == tasks.c.task_id,
        task_exceptions.c.code == ExceptionCode.SETTLEMENT_UNKNOWN.value,
    )
    .correlate(tasks)
    .scalar_subquery()
    .label(CHARGES)
)
"""How many charges of the task may be missing in its ledger yet, those that it shows included."""
_BY_RECORDS: Final = {PRICE: PRICE_TO_CHARGE, CHARGES: CHARGES_SENT}


def still_looked_at() -> ColumnElement[bool]:
    """Tasks that are unsettled and young enough for another check."""
    return and_(_IS_UNKNOWN, tasks.c.ended_at > func.now() - LOOKED_AT_FOR)


async def take_unsettled(connection: AsyncConnection, *, every: timedelta, limit: int) -> list[UnsettledTask]:
    """Some tasks whose ledger is due for a check. They are due again after `every`.

    An unreadable row, maybe a newer worker's, hides none of the others; it is due again with them.
    """
    due = (
        select(tasks.c.task_id)
        .where(
            still_looked_at(),
            tasks.c.ended_at.is_not(None),
            func.coalesce(tasks.c.settlement_looked_at, tasks.c.ended_at) <= func.now() - every,
        )
        # Those that were never looked at first: ones that stay unknown must not keep them out for the whole day.
        .order_by(func.coalesce(tasks.c.settlement_looked_at, tasks.c.ended_at))
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    columns = [_BY_RECORDS[name] if name in _BY_RECORDS else tasks.c[name] for name in UnsettledTask.model_fields]
    taken = update(tasks).where(tasks.c.task_id.in_(due)).values(settlement_looked_at=func.now()).returning(*columns)
    found: list[UnsettledTask] = []
    for row in await connection.execute(taken):
        try:
            found.append(UnsettledTask.model_validate(dict(row._mapping)))
        except ValidationError as error:
            log.warning("unsettled_row_not_read", task_id=row.task_id, reason="; ".join(sentences_of(error)))
    return found


async def correct(connection: AsyncConnection, correction: Correction) -> bool:
    """Write what the ledger shows into the row's `credits`, with its records. False if it was not unknown."""
    settled = (
        update(tasks)
        .where(tasks.c.task_id == correction.task_id, _IS_UNKNOWN)
        .values(credits=correction.credits.model_dump(mode="json"))
        .returning(tasks.c.task_id)
    )
    if await connection.scalar(settled) is None:
        return False
    records = [correction.record, *shortfall_in(correction.credits, correction.record.ts)]
    await insert_exceptions(connection, correction.task_id, records)
    return True


def shortfall_in(credits: CreditsSummary, at: datetime) -> list[TaskException]:
    """The record of what could not be charged; none where everything was."""
    if not credits.shortfall:
        return []
    message, details = SHORTFALL_TEXT.format(points=credits.shortfall), {"shortfall": credits.shortfall}
    return [
        TaskException(key=SHORTFALL_KEY, code=ExceptionCode.SHORTFALL.value, message=message, details=details, ts=at)
    ]
