"""An unknown settlement that an operator closes by hand, after a look at the ledger. Takes a connection.

As the reconciler's correction it changes the row's `credits` alone: no event, and not the run's result. Who did it and
why stands in the exception record, and in the audit log, which nobody can change.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints
from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.task_store import TaskException
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState
from store.failures import NotToBeSettled, TaskUnknown
from store.tables import audit_log, task_exceptions, tasks
from store.tasks import insert_exceptions
from store.unsettled import PRICE_TO_CHARGE, shortfall_in

KEY: Final = "settlement_by_hand"
OPERATION: Final = "settle_by_hand"
MAX_POINTS: Final = 2**53
Points = Annotated[int, Field(ge=0, le=MAX_POINTS)]


class Found(OwnModel):
    """What the ledger shows of a task, in points; who read it, and why it is closed by hand."""

    task_id: str
    charged: Points
    returned: Points
    by: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=128)]
    reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2_048)]

    @property
    def figures(self) -> dict[str, int]:
        return {"charged": self.charged, "returned": self.returned}


async def settle(connection: AsyncConnection, found: Found) -> bool:
    """Whether the row was changed; False: the same figures were recorded by hand before.

    Raises TaskUnknown, and NotToBeSettled where the task is open or its settlement is known.
    """
    columns = (tasks.c.tenant_id, tasks.c.ended_at, tasks.c.credits, PRICE_TO_CHARGE)
    chosen = select(*columns).where(tasks.c.task_id == found.task_id).with_for_update()
    row = (await connection.execute(chosen)).one_or_none()
    if row is None:
        raise TaskUnknown(f"The task store has no task {found.task_id}: it was never claimed, or it was purged.")
    if row.ended_at is None:
        raise NotToBeSettled(
            f"The task {found.task_id} is open, and its own run settles it. To end it: `comfyui-tasks cancel "
            f"{found.task_id}`, or POST /api/v1/tasks/{found.task_id}/rollback."
        )
    if row.credits.get("settlement") != SettlementState.UNKNOWN.value:
        return await _known(connection, found, row)
    credits = CreditsSummary.model_validate(row.credits).settled(**found.figures, price=row.price)
    values = credits.model_dump(mode="json")
    await connection.execute(update(tasks).where(tasks.c.task_id == found.task_id).values(credits=values))
    record = _record(found)
    await insert_exceptions(connection, found.task_id, [record, *shortfall_in(credits, record.ts)])
    await connection.execute(insert(audit_log).values(**_audited(found, row.tenant_id)))
    return True


async def _known(connection: AsyncConnection, found: Found, row: Row[*tuple[Any, ...]]) -> bool:
    """False if it was closed by hand with these figures. Raises NotToBeSettled."""
    by_hand = select(task_exceptions.c.details).where(
        task_exceptions.c.task_id == found.task_id, task_exceptions.c.key == KEY
    )
    details: dict[str, Any] = await connection.scalar(by_hand) or {}
    stands = {name: row.credits.get(name) for name in found.figures}
    if details and stands == found.figures:
        return False
    how = f"by hand, by {details['by']}" if details else "by its run or the ledger"
    raise NotToBeSettled(
        f"The settlement of the task {found.task_id} is known, {how}: {stands['charged']} points charged, "
        f"{stands['returned']} returned. Nothing was changed."
    )


def _record(found: Found) -> TaskException:
    return TaskException(
        key=KEY,
        code=ExceptionCode.SETTLEMENT_CORRECTED.value,
        message=f"{found.by} read in the ledger that {found.charged} points were charged and {found.returned} "
        f"returned, and closed the settlement by hand: {found.reason}",
        details={**found.figures, "by": found.by, "reason": found.reason},
        ts=datetime.now(UTC),
    )


def _audited(found: Found, tenant_id: str) -> dict[str, Any]:
    """The tenant is the task's. There is no token: whoever has the database's password may do this."""
    return {
        "operation": OPERATION,
        "status": 200,
        "tenant_id": tenant_id,
        "user_id": found.by,
        "token_id": "by hand",
        "task_id": found.task_id,
    }
