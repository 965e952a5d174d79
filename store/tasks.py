"""Writes: the claim, facts with the row, log lines. Each function is one transaction's work.

A write locks the task's row first and then reads in a separate statement: what one statement reads while it waits for
the lock may be outdated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import BindParameter, Row, Text, any_, bindparam, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate, Update

from comfyui_temporal.contracts.fields import OwnModel, repaired
from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskClaim, TaskException, TaskState, TaskWrite, TrainingLogWrite
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from runtime.trace_context import traceparent
from store import inputs
from store.fact_rules import WrittenSoFar
from store.failures import NotTheClaimant, TaskUnknown
from store.inputs import StoredInput
from store.lives import IS_EARLIER, STANDING, note_older_row, published_points, taken_over
from store.tables import EVENTS_CHANNEL, task_claims, task_events, task_exceptions, tasks, training_log
from store.tenant_limits import admit_claim
from store.tenant_usage import TenantUsage

ACCEPTED_KEY: Final = "accepted"
METRICS_LINE: Final = 0
_JSON_STATE: Final = ("credits", "prices", "confirmation", "result_urls", "output", "error", "dataset", "taken")

# Built once: building a statement costs as much as running it.
_LOCK: Final = (
    select(
        *STANDING,
        IS_EARLIER,
        tasks.c.scene,
        tasks.c.version,
        tasks.c.last_seq,
        tasks.c.job_sequences,
        tasks.c.last_log_position,
        tasks.c.attempts,
        tasks.c.stage,
        tasks.c.progress,
        tasks.c.next_eta,
        tasks.c.queue_position,
        tasks.c.last_event_at,
        tasks.c.taken,
        (
            bindparam("holds", type_=ARRAY(Text)).contained_by(tasks.c.hold_ids)
            & bindparam("jobs", type_=ARRAY(Text)).contained_by(tasks.c.job_ids)
        ).label("lists_both"),
    )
    .where(tasks.c.task_id == bindparam("task"))
    .with_for_update(key_share=True)
)
_LISTS: Final = select(tasks.c.hold_ids, tasks.c.job_ids, tasks.c.job_id).where(tasks.c.task_id == bindparam("task"))
_REACHED: Final = (
    select(task_events.c.attempt, task_events.c.stage, func.max(task_events.c.progress))
    .where(task_events.c.task_id == bindparam("task"), task_events.c.progress.is_not(None))
    .group_by(task_events.c.attempt, task_events.c.stage)
)
_KNOWN_KEYS: Final = select(task_events.c.key).where(
    task_events.c.task_id == bindparam("task"), task_events.c.key == any_(bindparam("keys", type_=ARRAY(Text)))
)
_EVENT_COLUMNS: Final = tuple(task_events.columns.keys())
_EVENTS: Final = func.jsonb_populate_recordset(
    literal_column("NULL::task_events"), bindparam("events", type_=JSONB)
).table_valued(*task_events.columns)
_INSERT_EVENTS: Final = insert(task_events).from_select(_EVENT_COLUMNS, select(*(_EVENTS.c[n] for n in _EVENT_COLUMNS)))
"""Inserts one row for each document in `events`."""
_NOTIFY: Final = func.pg_notify(EVENTS_CHANNEL, bindparam("payload"))
_CLAIM_COLUMNS: Final = tuple(task_claims.columns.keys())
_CLAIM: Final = insert(task_claims).on_conflict_do_nothing().returning(task_claims.c.task_id)
_HOLDER: Final = select(task_claims.c.first_execution_run_id).where(task_claims.c.task_id == bindparam("task"))
_LOCKED_HOLDER: Final = _HOLDER.with_for_update(key_share=True)


_APART: Final = timedelta(microseconds=1)


class Written(NamedTuple):
    """What a write did. `ended`: it was the one that stored the task's end."""

    ended: bool
    scene: str


def _parameters(columns: frozenset[str]) -> dict[str, BindParameter[Any]]:
    return {name: bindparam(f"new_{name}", type_=tasks.c[name].type) for name in columns}


@cache
def _insert_of(columns: frozenset[str]) -> ReturningInsert[Any]:
    """Inserts a row of `columns` from parameters `new_{column}` and its `events`, and notifies with `payload`."""
    statement = insert(tasks).values(**_parameters(columns))
    return statement.add_cte(_INSERT_EVENTS.cte("new_events")).returning(_NOTIFY)


@cache
def _update_of(columns: frozenset[str], *, has_events: bool) -> Update | ReturningUpdate[Any]:
    """Sets `columns` of `task` from parameters `new_{column}`; with `has_events` also inserts them and notifies."""
    changed = _parameters(columns)
    statement = update(tasks).where(tasks.c.task_id == bindparam("task")).values(**changed, updated_at=func.now())
    return statement.add_cte(_INSERT_EVENTS.cte("new_events")).returning(_NOTIFY) if has_events else statement


def _new(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"new_{name}": value for name, value in values.items()}


def _event_parameters(task_id: str, taken: Sequence[tuple[int, Fact]]) -> dict[str, Any]:
    """Parameters of `_INSERT_EVENTS` and `_NOTIFY`."""
    own = {"task_id": task_id, "traceparent": traceparent()}
    documents = [own | {"seq": seq} | _clean(fact.model_dump(mode="json")) for seq, fact in taken]
    return {"events": documents, "payload": f"{task_id}:{taken[-1][0]}"}


def _clean(value: Any) -> Any:
    """The value without the characters that PostgreSQL rejects (pitfall 5), at any depth."""
    if isinstance(value, str):
        return repaired(value)
    if isinstance(value, dict):
        return {repaired(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _columns(model: OwnModel, json_fields: Sequence[str]) -> dict[str, Any]:
    """A model's fields as column values: documents as JSON, the rest unchanged, all text cleaned."""
    documents = model.model_dump(mode="json", include=set(json_fields))
    return _clean({**model.model_dump(exclude=set(json_fields)), **documents})  # type: ignore[no-any-return]


async def claim_task(
    connection: AsyncConnection,
    claim: TaskClaim,
    run: TaskRun | None,
    usage: TenantUsage,
    *,
    limits: TenantLimits = NO_LIMITS,
    given: StoredInput | None = None,
) -> bool:
    """Whether `claim`'s run holds the id. The first claim writes the row, the event `task.accepted` and the input.

    With `only_if_known` a claim is never the first. Raises StartRefused if the claim is the first and is beyond the
    tenant's limits.
    """
    claimed = claim.model_dump(include=set(_CLAIM_COLUMNS)) | {"claimed_at": claim.at}
    if claim.only_if_known or await connection.scalar(_CLAIM, claimed) is None:
        holder = await connection.scalar(_HOLDER, {"task": claim.task_id})
        return bool(holder == claim.first_execution_run_id)
    if run is None or not run.was_reset:  # of a reset run the store lost the claim: its task was admitted, and may hold
        await admit_claim(connection, usage, tenant_id=claim.tenant_id, task_id=claim.task_id, limits=limits)
    await _insert_row(connection, claim, run, lives=int(run is not None and run.was_reset))
    if given is not None:
        await inputs.keep(connection, claim.task_id, StoredInput(document=_clean(given.document), sealed=given.sealed))
    return True


async def _insert_row(connection: AsyncConnection, claim: TaskClaim, run: TaskRun | None, *, lives: int) -> None:
    row = {
        **claim.model_dump(exclude={"at", "input", "model_ids", "only_if_known"}),
        **_columns(TaskState(version=0, status=TaskStatus.QUEUED), _JSON_STATE),
        "created_at": claim.at,
        "updated_at": claim.at,
        "last_event_at": claim.at,
        "last_seq": 1,
        "run_id": run.run_id if run else None,
        "run_number": run.run_number if run else 0,
        "lives": lives,
    }
    first = Fact(key=ACCEPTED_KEY, event=EventType.ACCEPTED, ts=claim.at, attempt=1, status=TaskStatus.QUEUED)
    await connection.execute(_insert_of(frozenset(row)), _new(row) | _event_parameters(claim.task_id, [(1, first)]))


async def write_task(connection: AsyncConnection, write: TaskWrite, run: TaskRun | None = None) -> Written | None:
    """Apply a write by the rules of contract §6. Raises NotTheClaimant, TaskUnknown.

    `run` is the writing run; None if the caller writes on behalf of a run. Returns None if it was superseded: its
    write is ignored.
    A write with a lower run number takes nothing over: a write that was in flight when its run continued as new may
    land after the next run's first write. A run that was reset to before a continuation is registered by its calls
    and looks.
    """
    row = await _row_of(connection, write, run)
    if row.first_execution_run_id != write.first_execution_run_id:
        raise NotTheClaimant(
            f"The task {write.task_id} is another run's: run {write.first_execution_run_id} never claimed it, "
            "and nothing was written. Start the task under a new task_id."
        )
    if run is not None and row.is_earlier and not run.is_current:
        return None
    had_ended = row.ended_at is not None
    version, lives, reached = row.version, row.lives, dict[tuple[int, str | None], float]()
    if run is not None and (row.run_id is None or run.run_number >= row.run_number or run.is_current):
        taken_by_run = await taken_over(connection, row, run)
        version = taken_by_run.get("version", version)
        lives = await note_older_row(connection, row, run, taken_by_run, written=write.written_version)
    may_repeat = any(_may_repeat(fact, row) for fact in write.facts)
    if not had_ended and (may_repeat or lives or (run is not None and run.run_id != row.run_id)):
        published = await connection.execute(_REACHED, {"task": write.task_id})
        reached = {(attempt, stage): progress for attempt, stage, progress in published}
    so_far = WrittenSoFar(
        row.last_seq, had_ended, dict(row.job_sequences), max(row.attempts, 1), row.stage, row.progress, reached
    )
    write = _with_newest_figures(write, row, so_far)
    facts = [] if had_ended else [_with_clean_key(fact) for fact in write.facts]
    known = set() if so_far.are_newer(facts) else await _known_keys(connection, write.task_id, facts)
    taken = so_far.take(facts, known)
    if lives and so_far.has_ended and not had_ended:
        points = await published_points(connection, write.task_id)
        so_far.balance(taken, published_points=points, charged=write.state.credits.charged, life=lives)
    taken = list(_in_order_of_time(taken, row.last_event_at))
    changes: dict[str, Any] = {}
    if not had_ended and (write.state.version > version or so_far.has_ended):
        # The end counts regardless of its version: a run may have written a higher one before it was reset.
        state = write.state
        progress = so_far.reached(max(state.attempts, 1), state.stage, state.progress)
        changes |= _columns(state.model_copy(update={"progress": progress}), _JSON_STATE)
        if _report(changes["taken"]) != _report(row.taken):
            changes["ticked_at"] = None  # ticks so far were like another report
    if taken:
        changes |= {
            "last_seq": so_far.last_seq,
            "job_sequences": so_far.job_sequences,
            "last_event_at": taken[-1][1].ts,
        }
    if so_far.has_ended and not had_ended:
        changes["ended_at"] = taken[-1][1].ts
    if changes:
        if not row.lists_both:
            changes |= await _longer_lists(connection, write.task_id, write.state)
        events = _event_parameters(write.task_id, taken) if taken else {}
        statement = _update_of(frozenset(changes), has_events=bool(taken))
        await connection.execute(statement, {"task": write.task_id} | _new(changes) | events)
    if write.exceptions:
        await insert_exceptions(connection, write.task_id, write.exceptions)
    return Written(ended=so_far.has_ended and not had_ended, scene=row.scene)


def _report(taken: dict[str, Any] | None) -> tuple[str, str] | None:
    """Which reports are like it: those of its job that say the same."""
    return (taken["job_id"], taken["digest"]) if taken else None


def _in_order_of_time(taken: Sequence[tuple[int, Fact]], last: datetime | None) -> Iterator[tuple[int, Fact]]:
    """The facts, each later than the event before it: a worker's clock may be behind the one that timed a tick."""
    for seq, fact in taken:
        if last is not None and fact.ts <= last:
            fact = fact.model_copy(update={"ts": last + _APART})
        last = fact.ts
        yield seq, fact


def _may_repeat(fact: Fact, row: Row[*tuple[Any, ...]]) -> bool:
    """Whether the fact may enter a stage that was entered before: a server may put a job back into its queue.

    Or it comes after a later tick: its stage may have been left and entered again meanwhile.
    """
    if not fact.is_change or fact.job_id is None or fact.sequence is None:
        return False
    is_late = fact.sequence < row.job_sequences.get(fact.job_id, fact.sequence)
    return is_late or (row.stage is not None and fact.stage != row.stage)


def _with_newest_figures(write: TaskWrite, row: Row[*tuple[Any, ...]], so_far: WrittenSoFar) -> TaskWrite:
    """The write with the row's ETA and queue position, where a tick brought newer ones than the workflow has.

    `progress` needs no such care: it never goes back.
    """
    here = (row.attempts, row.stage)
    if not so_far.has_newer_figures(write.state.taken):
        return write
    newest = {"next_eta": row.next_eta, "queue_position": row.queue_position}
    facts = [
        fact.model_copy(update=newest) if (fact.attempt, fact.stage) == here and not fact.is_end else fact
        for fact in write.facts
    ]
    is_here = (write.state.attempts, write.state.stage) == here and not any(fact.is_end for fact in facts)
    state = write.state.model_copy(update=newest) if is_here else write.state
    return write.model_copy(update={"facts": facts, "state": state})


async def _row_of(connection: AsyncConnection, write: TaskWrite, run: TaskRun | None) -> Row[*tuple[Any, ...]]:
    """The task's row, locked. A restored store may have lost it: then it is created again from the run's claim.

    It is unknown what else was lost, so the new row counts as one with an earlier life.
    """
    run_id, made = run.run_id if run else None, _made(write.state)
    try:
        return await _locked(connection, write.task_id, run_id, **made)
    except TaskUnknown:
        if write.claim is None:
            raise
    claimed = write.claim.model_dump(include=set(_CLAIM_COLUMNS)) | {"claimed_at": write.claim.at}
    await connection.execute(_CLAIM, claimed)
    holder = await connection.scalar(_LOCKED_HOLDER, {"task": write.task_id})
    if holder != write.first_execution_run_id:
        raise NotTheClaimant(f"The task {write.task_id} is another run's, and nothing was written.")
    try:
        return await _locked(connection, write.task_id, run_id, **made)  # an earlier try of the write may recreate it
    except TaskUnknown:
        await _insert_row(connection, write.claim, run, lives=1)
        return await _locked(connection, write.task_id, run_id, **made)


def _made(state: TaskState) -> dict[str, list[str]]:
    """Ids of holds and jobs, as the row lists them."""
    return {
        "holds": _clean(state.credits.pre_deduct_ids),
        "jobs": _clean([state.job_id] if state.job_id else []),
    }


async def _longer_lists(connection: AsyncConnection, task_id: str, state: TaskState) -> dict[str, Any]:
    """`hold_ids` and `job_ids` extended by those of `state`."""
    row, made = (await connection.execute(_LISTS, {"task": task_id})).one(), _made(state)
    return {
        "hold_ids": list(dict.fromkeys([*row.hold_ids, *made["holds"]])),
        "job_ids": list(dict.fromkeys([*row.job_ids, *made["jobs"]])),
    }


async def write_log(connection: AsyncConnection, task_id: str, writes: Sequence[TrainingLogWrite]) -> set[str]:
    """Append the lines that are new, numbered in order of arrival. Raises TaskUnknown.

    Lines of a training that the row does not name are left out. Returns the ids of these trainings.
    """
    row = await _locked(connection, task_id)
    foreign = {write.training_id for write in writes} - await _trainings(connection, task_id)
    writes = [write for write in writes if write.training_id not in foreign]
    found = await connection.execute(
        select(training_log.c.training_id, training_log.c.sequence, training_log.c.line).where(
            training_log.c.task_id == task_id,
            training_log.c.training_id.in_({write.training_id for write in writes}),
            training_log.c.sequence.in_({write.sequence for write in writes}),
        )
    )
    known = {tuple(line) for line in found}
    new: list[dict[str, Any]] = []
    for line in (line for write in writes for line in _log_rows(write)):
        key = (line["training_id"], line["sequence"], line["line"])
        if key not in known:
            known.add(key)
            new.append({"task_id": task_id, "position": row.last_log_position + len(new) + 1, **line})
    if new:
        await connection.execute(insert(training_log), new)
        await connection.execute(
            update(tasks).where(tasks.c.task_id == task_id).values(last_log_position=row.last_log_position + len(new))
        )
    return foreign


async def _trainings(connection: AsyncConnection, task_id: str) -> set[str]:
    """Every training that any run of the task requested."""
    row = (await connection.execute(_LISTS, {"task": task_id})).one()
    return {*row.job_ids, *([row.job_id] if row.job_id else [])}


async def _locked(
    connection: AsyncConnection,
    task_id: str,
    run_id: str | None = None,
    *,
    holds: Sequence[str] = (),
    jobs: Sequence[str] = (),
) -> Row[*tuple[Any, ...]]:
    """The task's row, locked against other writers but not against rows that refer to it.

    `lists_both`: the row lists these holds and jobs already.
    """
    given = {"task": task_id, "run": run_id, "holds": list(holds), "jobs": list(jobs)}
    row = (await connection.execute(_LOCK, given)).one_or_none()
    if row is None:
        raise TaskUnknown(f"The task store has no task {task_id}: it was never claimed, or it was purged.")
    return row


def _with_clean_key(fact: Fact) -> Fact:
    """The fact with key and job id as the table stores them, so that both can be compared."""
    job_id = None if fact.job_id is None else repaired(fact.job_id)
    return fact.model_copy(update={"key": repaired(fact.key), "job_id": job_id})


async def _known_keys(connection: AsyncConnection, task_id: str, facts: Sequence[Fact]) -> set[str]:
    keys = [fact.key for fact in facts]
    return set((await connection.scalars(_KNOWN_KEYS, {"task": task_id, "keys": keys})).all())


async def insert_exceptions(connection: AsyncConnection, task_id: str, exceptions: Sequence[TaskException]) -> None:
    """Write exception records. A known key is left unchanged."""
    rows = [{"task_id": task_id, **_columns(exception, ("details",))} for exception in exceptions]
    await connection.execute(insert(task_exceptions).on_conflict_do_nothing(), rows)


def _log_rows(write: TrainingLogWrite) -> list[dict[str, Any]]:
    arrived = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    if write.metrics:
        rows.append({"line": METRICS_LINE, "ts": arrived, "level": "info", "message": "", "metrics": write.metrics})
    for number, line in enumerate(write.lines, start=METRICS_LINE + 1):
        rows.append(
            {"line": number, "ts": line.ts or arrived, "level": line.level, "message": line.message, "metrics": None}
        )
    return [{"training_id": write.training_id, "sequence": write.sequence, **_clean(row)} for row in rows]
