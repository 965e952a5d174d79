"""Which run of a task acts (contract §4, earlier lives). Each function is one transaction's work.

    the run that is registered          nothing changes
    a run that was registered before    nothing changes: it was superseded; unless Temporal names it as the current one
    a higher run number                 the run continued as new: the new one takes over
    anything else                       the run was reset: the new one takes over, and `lives` increases

A call of a run that was reset away may land after the new run's first one and displace it. So the new run asks
Temporal before it believes that it was superseded, and takes the task back.

A take-over after a reset also resets the row's version: from then on the new run's state counts, not the old run's.
What the old run took of its job is forgotten too: the new run may be behind it. Until it has written nothing is a tick.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Column, Row, Select, Text, any_, bindparam, exists, func, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.lives import EarlierLife, TaskRun
from comfyui_temporal.contracts.task_store import RowSeen
from store import reads
from store.tables import task_events, tasks

MOST_EARLIER_RUNS: Final = 200
"""This many superseded runs are remembered, the newest ones: only their late writes must be recognised."""

IS_EARLIER: Final = (bindparam("run", type_=Text) == any_(tasks.c.earlier_run_ids)).label("is_earlier")
STANDING: Final = (
    tasks.c.first_execution_run_id,
    tasks.c.run_id,
    tasks.c.run_number,
    tasks.c.lives,
    tasks.c.ended_at,
    tasks.c.given_back_by,
)
"""The columns that `take_over` and `life_of` need, with `IS_EARLIER` and its parameter `run`."""
_SEEN: Final = select(*STANDING, IS_EARLIER).where(tasks.c.task_id == bindparam("task"))
_LOCKED: Final = _SEEN.with_for_update(key_share=True)
_NEWEST_EARLIER: Final = func.array_prepend(tasks.c.run_id, tasks.c.earlier_run_ids, type_=ARRAY(Text))[
    1:MOST_EARLIER_RUNS
]
_WITHOUT_ITSELF: Final = func.array_remove(_NEWEST_EARLIER, bindparam("run", type_=Text), type_=ARRAY(Text))
_POINTS: Final = select(func.sum(task_events.c.credits_delta)).where(task_events.c.task_id == bindparam("task"))
_LIFE_SECONDS: Final = select(func.extract("epoch", func.now() - tasks.c.life_began_at)).where(
    tasks.c.task_id == bindparam("task")
)
_MADE: Final = bindparam("made", type_=Text)


def _note_in(ids: Column[Any]) -> Select[bool]:
    """Adds `made` to the list. Returns whether the row listed it before: a statement does not see its own changes."""
    is_row, is_listed = tasks.c.task_id == bindparam("task"), any_(ids) == _MADE
    added = update(tasks).where(is_row, ~is_listed).values({ids.name: func.array_append(ids, _MADE)})
    return select(exists().where(is_row, is_listed)).add_cte(added.cte("added"))


_NOTE: Final = {ids.name: _note_in(ids) for ids in (tasks.c.hold_ids, tasks.c.job_ids)}


async def seen(connection: AsyncConnection, run: TaskRun) -> EarlierLife | None:
    """What the row knows beyond `run`; None if `run` must be registered first."""
    row = (await connection.execute(_SEEN, {"task": run.task_id, "run": run.run_id})).one_or_none()
    if row is None:
        return EarlierLife(is_row_missing=True)
    return None if take_over(row, run) else life_of(row, run)


async def register(connection: AsyncConnection, run: TaskRun) -> EarlierLife:
    """Make `run` the acting run, unless it was superseded. Returns what the row knows beyond it."""
    row = (await connection.execute(_LOCKED, {"task": run.task_id, "run": run.run_id})).one_or_none()
    if row is None:
        return EarlierLife(is_row_missing=True)
    return life_of(row, run, await taken_over(connection, row, run))


async def go_on(connection: AsyncConnection, run: TaskRun, *, after: str) -> bool:
    """Make `run` the acting run in place of `after`, which it continues as new. Returns whether it acts now."""
    row = (await connection.execute(_LOCKED, {"task": run.task_id, "run": run.run_id})).one_or_none()
    if row is not None and row.run_id == run.run_id:
        return True
    if row is None or row.run_id != after or run.run_number <= row.run_number:
        return False
    return bool(await taken_over(connection, row, run))


async def taken_over(connection: AsyncConnection, row: Row[*tuple[Any, ...]], run: TaskRun) -> dict[str, Any]:
    """Make `run` the acting run if it is newer. Returns the columns that were set. `row` is locked."""
    changes = take_over(row, run)
    if changes:
        statement = update(tasks).where(tasks.c.task_id == run.task_id).values(**changes, updated_at=func.now())
        await connection.execute(statement, {"run": run.run_id} if row.is_earlier else {})
    return changes


async def note_older_row(
    connection: AsyncConnection, row: Row[*tuple[Any, ...]], run: TaskRun, changes: dict[str, Any], *, written: int
) -> int:
    """Mark a row that is older than what the run, or the one it continues, has written: it comes from a backup.

    `changes`: those of the run's take-over. Returns the row's lives after both.
    """
    lives: int = changes.get("lives", row.lives)
    acts = bool(changes) or row.run_id == run.run_id
    if acts and row.ended_at is None and row.version < written and not lives:
        lives = 1
        await connection.execute(update(tasks).where(tasks.c.task_id == run.task_id).values(lives=lives))
    return lives


def take_over(row: Row[*tuple[Any, ...]], run: TaskRun) -> dict[str, Any]:
    """The columns that make `run` the acting run; none if it acts already, or may not."""
    is_displaced = row.is_earlier and run.is_current
    if is_anothers(row, run) or row.ended_at is not None or row.run_id == run.run_id:
        return {}
    if row.is_earlier and not is_displaced:
        return {}
    changes: dict[str, Any] = {"run_id": run.run_id, "run_number": run.run_number}
    if row.run_id is not None:
        changes["earlier_run_ids"] = _WITHOUT_ITSELF if is_displaced else _NEWEST_EARLIER
    is_reset = run.was_reset if row.run_id is None else is_displaced or run.run_number <= row.run_number
    if is_reset:
        changes |= {"lives": row.lives + 1, "life_began_at": func.now(), "version": 0, "taken": None, "ticked_at": None}
    return changes


def is_anothers(row: Row[*tuple[Any, ...]], run: TaskRun) -> bool:
    """Whether the task belongs to another chain of runs."""
    return run.first_execution_run_id not in (None, row.first_execution_run_id)


def life_of(row: Row[*tuple[Any, ...]], run: TaskRun, changes: dict[str, Any] | None = None) -> EarlierLife:
    return EarlierLife(
        lives=(changes or {}).get("lives", row.lives),
        has_ended=row.ended_at is not None,
        is_given_back=row.given_back_by is not None,
        is_superseded=(bool(row.is_earlier) and not changes) or is_anothers(row, run),
    )


async def life_of_give_back(connection: AsyncConnection, task_id: str, *, by: str) -> EarlierLife:
    """What the row knows beyond the give-back `by`: it has ended, or another one has claimed it since."""
    row = (await connection.execute(_SEEN, {"task": task_id, "run": by})).one_or_none()
    if row is None:
        return EarlierLife(is_row_missing=True)
    return EarlierLife(lives=row.lives, has_ended=row.ended_at is not None, is_given_back=row.given_back_by != by)


async def look(connection: AsyncConnection, run: TaskRun) -> RowSeen:
    """Register `run` and return the whole row."""
    life = await register(connection, run)
    return RowSeen(
        life=life,
        row=await reads.task(connection, run.task_id),
        told_points=await published_points(connection, run.task_id),
        life_seconds=await connection.scalar(_LIFE_SECONDS, {"task": run.task_id}),
    )


async def earlier_runs(connection: AsyncConnection, task_id: str) -> list[str]:
    """The runs of a task that others have replaced, newest first."""
    found = await connection.scalar(select(tasks.c.earlier_run_ids).where(tasks.c.task_id == task_id))
    return list(found or [])


async def published_points(connection: AsyncConnection, task_id: str) -> int:
    """The sum of the points in a task's events."""
    return int(await connection.scalar(_POINTS, {"task": task_id}) or 0)


async def note_made(connection: AsyncConnection, task_id: str, *, column: str, made: str) -> bool:
    """Add an id to `hold_ids` or `job_ids`. Returns whether it was there already; where there is no row, it was not."""
    return bool(await connection.scalar(_NOTE[column], {"task": task_id, "made": made}))


async def claim_give_back(connection: AsyncConnection, task_id: str, *, by: str, found_run: str | None) -> bool:
    """Whether `by` may give the row back: it is open, and the acting run is still `found_run`."""
    claimed = await connection.execute(
        update(tasks)
        .where(
            tasks.c.task_id == task_id,
            tasks.c.ended_at.is_(None),
            tasks.c.run_id.is_not_distinct_from(bindparam("found", type_=Text)),
        )
        .values(given_back_by=by),
        {"found": found_run},
    )
    return claimed.rowcount == 1
