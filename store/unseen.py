"""Open tasks whose run the reconciler could not check: kept until a later check succeeds, shown by `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Text, any_, bindparam, column, delete, func, select
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import Instant, OwnModel, repaired, shortened
from store.tables import tasks, unseen_tasks

MAX_REASON_BYTES: Final = 500


class UnseenTask(OwnModel):
    """A task that could not be checked, with the reason as a sentence. Nothing of it is given back meanwhile."""

    task_id: str
    reason: str


class UnseenTaskRow(UnseenTask):
    """The same as the store keeps it: since when, and how many checks failed in a row."""

    first_at: Instant
    last_at: Instant
    times: int


_IDS: Final = any_(bindparam("ids", type_=ARRAY(Text)))
_SEEN: Final = delete(unseen_tasks).where(unseen_tasks.c.task_id == _IDS)
_NOTES: Final = select(
    func.unnest(bindparam("ids", type_=ARRAY(Text)), bindparam("reasons", type_=ARRAY(Text)))
    .table_valued(column("task_id", Text), column("reason", Text))
    .render_derived()
).subquery()


def _note_statement() -> Any:
    # Only for tasks that still exist: others may have been purged meanwhile.
    rows = select(_NOTES.c.task_id, _NOTES.c.reason).join(tasks, tasks.c.task_id == _NOTES.c.task_id)
    note = insert(unseen_tasks).from_select(["task_id", "reason"], rows.order_by(_NOTES.c.task_id))
    again = {"reason": note.excluded.reason, "last_at": func.now(), "times": unseen_tasks.c.times + 1}
    return note.on_conflict_do_update(index_elements=["task_id"], set_=again)


_NOTE: Final = _note_statement()


async def note(connection: AsyncConnection, unseen: Sequence[UnseenTask], seen: Sequence[str]) -> None:
    """Record the tasks that could not be checked, and remove those that could."""
    if seen:
        await connection.execute(_SEEN, {"ids": sorted(seen)})
    if unseen:
        reasons = {task.task_id: shortened(repaired(task.reason), MAX_REASON_BYTES) for task in unseen}
        await connection.execute(_NOTE, {"ids": list(reasons), "reasons": list(reasons.values())})


async def unseen(connection: AsyncConnection, *, limit: int) -> list[UnseenTaskRow]:
    """Of the tasks that are still open; the longest unseen first."""
    statement = (
        select(unseen_tasks)
        .join(tasks, tasks.c.task_id == unseen_tasks.c.task_id)
        .where(tasks.c.ended_at.is_(None))
        .order_by(unseen_tasks.c.first_at, unseen_tasks.c.task_id)
        .limit(limit)
    )
    return [UnseenTaskRow.model_validate(dict(row._mapping)) for row in await connection.execute(statement)]
