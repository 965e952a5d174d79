"""`TaskStore`: all access to PostgreSQL from outside this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Final, Literal

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.lives import EarlierLife, TaskRun
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.task_store import (
    Correction,
    Heard,
    HeardOrder,
    RowSeen,
    TaskClaim,
    TaskExceptionRow,
    TaskRow,
    TaskWrite,
    TrainedModel,
    TrainingLogRow,
    TrainingLogWrite,
    UnsettledTask,
)
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, Admission, TenantLimits
from comfyui_temporal.contracts.ticks import Tick
from store import (
    audit,
    by_hand,
    figures,
    home,
    inputs,
    lives,
    reads,
    schema,
    stream_reads,
    tasks,
    tenant_limits,
    tenant_reads,
    ticks,
    unseen,
    unsettled,
    upkeep,
)
from store.audit import AuditRecord
from store.by_hand import Found
from store.cursors import list_cursor, place_of_cursor, seq_of_cursor
from store.database import ALIVE, POOL_SIZE, WORK_SECONDS, Database
from store.failures import TablesTooOld
from store.figures import StoreFigures
from store.home import StoreHome
from store.inputs import StoredInput
from store.listener import EventListener
from store.reads import StoredEvent, UnreadableRow
from store.stream_reads import TaskHead
from store.tasks import Written
from store.tenant_reads import TenantSeen
from store.tenant_usage import TenantUsage
from store.ticks import TickAnswer
from store.turns import Turns
from store.unseen import UnseenTask, UnseenTaskRow
from store.upkeep import EndedTask, QueueState, Undeletable
from store.uploads import UploadRows

MAX_PAGE: Final = 1_000
TURN_SECONDS: Final = 8.0
"""How long a start or stream waits for those of its tenant before it, while the store answers them."""
Made = Literal["hold", "job"]
"""What a run creates for its task at another party."""


class TaskPage(OwnModel):
    """Tasks in order, unreadable ones apart; `cursor` leads to the next page, None at the end."""

    tasks: list[TaskRow]
    unreadable: list[UnreadableRow] = []
    cursor: str | None = None


class TaskStore:
    """The task store. Every method may raise StoreUnavailable and may be repeated."""

    def __init__(self, dsn: str, *, pool_size: int = POOL_SIZE) -> None:
        """Opens no connection yet. Raises ValueError if `dsn` is not a PostgreSQL DSN."""
        self._dsn = dsn
        self._database = Database(dsn, pool_size=pool_size)
        self._turns = Turns()
        self._usage = TenantUsage()
        self.uploads = UploadRows(self._database)

    @property
    def address(self) -> str:
        """Host, port and database, to display."""
        return self._database.address

    async def close(self) -> None:
        await self._database.close()

    async def claim(
        self,
        claim: TaskClaim,
        run: TaskRun | None = None,
        *,
        limits: TenantLimits = NO_LIMITS,
        given: StoredInput | None = None,
        within_seconds: float = WORK_SECONDS,
    ) -> bool:
        """Claim the task id for a run (contract §8): True for the first run and its repeats, False for any other.

        `run` becomes the acting run with the first claim, which also stores its input, `given`.
        Raises StartRefused if that is beyond the tenant's limits.
        """
        is_counted = limits.bounds_starts
        async with self._turns.of(claim.tenant_id, within_seconds=within_seconds) if is_counted else nullcontext():
            return await self._database.transaction(
                lambda connection: tasks.claim_task(connection, claim, run, self._usage, limits=limits, given=given),
                doing=f"claiming the task {claim.task_id}",
                within_seconds=within_seconds,
            )

    async def write(
        self, write: TaskWrite, run: TaskRun | None = None, *, within_seconds: float = WORK_SECONDS
    ) -> Written | None:
        """Write row, events, exception records and NOTIFY in one transaction. Raises NotTheClaimant, TaskUnknown.

        Registers `run`, the writing run. None: the caller writes on behalf of a run that has ended. Returns None if
        `run` was superseded: its write is ignored.
        """
        return await self._database.transaction(
            lambda connection: tasks.write_task(connection, write, run),
            doing=f"writing the events of the task {write.task_id}",
            within_seconds=within_seconds,
        )

    async def register(self, run: TaskRun, *, within_seconds: float = WORK_SECONDS) -> EarlierLife:
        """Make `run` the acting run of its task and return what the row knows beyond it."""
        doing = f"looking at the task {run.task_id}"
        known = await self._database.read(
            lambda connection: lives.seen(connection, run), doing=doing, within_seconds=within_seconds
        )
        if known is not None:
            return known
        return await self._database.transaction(
            lambda connection: lives.register(connection, run), doing=doing, within_seconds=within_seconds
        )

    async def life_of_give_back(self, task_id: str, *, by: str, within_seconds: float = WORK_SECONDS) -> EarlierLife:
        """What the task's row knows beyond the give-back `by`."""
        return await self._database.read(
            lambda connection: lives.life_of_give_back(connection, task_id, by=by),
            doing=f"looking at the task {task_id}",
            within_seconds=within_seconds,
        )

    async def look(self, run: TaskRun, *, within_seconds: float = WORK_SECONDS) -> RowSeen:
        """As `register`, with the whole row."""
        return await self._database.transaction(
            lambda connection: lives.look(connection, run),
            doing=f"looking at the task {run.task_id}",
            within_seconds=within_seconds,
        )

    async def earlier_runs(self, task_id: str) -> list[str]:
        """The ids of the task's runs that a reset, or continuing as new, has replaced; newest first."""
        return await self._database.read(
            lambda connection: lives.earlier_runs(connection, task_id), doing=f"reading the runs of the task {task_id}"
        )

    async def published_points(self, task_id: str) -> int:
        """The sum of the points in a task's events."""
        return await self._database.read(
            lambda connection: lives.published_points(connection, task_id),
            doing=f"reading the events of the task {task_id}",
        )

    async def note_made(self, task_id: str, kind: Made, made: str, *, within_seconds: float = WORK_SECONDS) -> bool:
        """Store the id of a hold or job in its task's row, if the row exists. Returns whether it was known."""
        return await self._database.statement(
            lambda connection: lives.note_made(connection, task_id, column=f"{kind}_ids", made=made),
            doing=f"noting a {kind} of the task {task_id}",
            within_seconds=within_seconds,
        )

    async def admit_start(
        self,
        *,
        tenant_id: str,
        task_id: str,
        size: int,
        limits: TenantLimits,
        within_seconds: float = WORK_SECONDS,
    ) -> Admission:
        """Count a start with an order of `size` bytes, if the tenant's limits allow it. A repeat counts once."""
        async with self._turns.of(tenant_id, within_seconds=TURN_SECONDS):
            return await self._database.transaction(
                lambda connection: tenant_limits.admit_start(
                    connection, self._usage, tenant_id=tenant_id, task_id=task_id, size=size, limits=limits
                ),
                doing=f"checking the limits of the tenant {tenant_id}",
                within_seconds=within_seconds,
            )

    async def admit_stream(self, *, tenant_id: str, process_id: str, own_open: int, limits: TenantLimits) -> Admission:
        """Count one more stream of a process that has `own_open` of the tenant, if the tenant's limit allows it."""
        async with self._turns.of(tenant_id, within_seconds=TURN_SECONDS):
            return await self._database.transaction(
                lambda connection: tenant_limits.admit_stream(
                    connection, tenant_id=tenant_id, process_id=process_id, own_open=own_open, limits=limits
                ),
                doing=f"checking the limits of the tenant {tenant_id}",
            )

    async def report_streams(self, *, process_id: str, open_of: Mapping[str, int]) -> None:
        """State how many streams of each tenant a process has open. A process that stops reporting counts as gone."""
        await self._database.transaction(
            lambda connection: tenant_limits.report_streams(connection, process_id=process_id, open_of=open_of),
            doing="counting open streams",
        )

    async def claim_give_back(self, task_id: str, *, by: str, found_run: str | None) -> bool:
        """Claim an open row for a give-back: False if another run than `found_run` acts for it, or it has ended."""
        return await self._database.statement(
            lambda connection: lives.claim_give_back(connection, task_id, by=by, found_run=found_run),
            doing=f"claiming the give-back of the task {task_id}",
        )

    async def write_log(self, task_id: str, writes: Sequence[TrainingLogWrite]) -> set[str]:
        """Append log lines of one task; known lines are skipped. Raises TaskUnknown.

        Lines of a training that the task's row does not name are left out. Returns the ids of these trainings.
        """
        return await self._database.transaction(
            lambda connection: tasks.write_log(connection, task_id, writes),
            doing=f"writing the training log of the task {task_id}",
        )

    async def write_ticks(self, given: Sequence[Tick]) -> dict[str, TickAnswer]:
        """Task → what its row says about its tick, which is an event then or is not. Unknown tasks are left out.

        One tick of each task at most. A repeat writes nothing.
        """
        return await self._database.statement(
            lambda connection: ticks.write_ticks(connection, given), doing=f"writing {len(given)} ticks"
        )

    async def heard(self, order: HeardOrder, run_id: str, *, within_seconds: float = WORK_SECONDS) -> Heard | None:
        """The newest figures of a job that came as a tick; None without any, and for a run that does not act.

        A run that continues the acting one as new acts from then on, so that the next one hears of the job too.
        """
        doing = f"reading what was heard of the task {order.task_id}"
        found = await self._database.read(
            lambda connection: ticks.heard(connection, order, run_id), doing=doing, within_seconds=within_seconds
        )
        if found is None:
            return None
        if found.run_id != run_id:
            run = TaskRun(
                run_id=run_id, **order.model_dump(include={"task_id", "run_number", "first_execution_run_id"})
            )
            goes_on = await self._database.transaction(
                lambda connection: lives.go_on(connection, run, after=found.run_id),
                doing=doing,
                within_seconds=within_seconds,
            )
            if not goes_on:
                return None
        return found.heard

    async def task(self, task_id: str) -> TaskRow | None:
        return await self._database.read(
            lambda connection: reads.task(connection, task_id), doing=f"reading the task {task_id}"
        )

    async def models(
        self,
        tenant_id: str,
        task_ids: Sequence[str],
        *,
        user_id: str | None = None,
        within_seconds: float = WORK_SECONDS,
    ) -> list[TrainedModel]:
        """What these of a tenant's trainings made; with `user_id` this user's only. Others are left out."""
        return await self._database.read(
            lambda connection: reads.models(connection, tenant_id, task_ids, user_id=user_id),
            doing=f"reading the models of {tenant_id}",
            within_seconds=within_seconds,
        )

    async def inputs(self, task_ids: Sequence[str]) -> dict[str, StoredInput]:
        """Task → what was asked for. Tasks whose input is not stored are left out."""
        return await self._database.read(
            lambda connection: inputs.of_tasks(connection, task_ids),
            doing=f"reading the input of {len(task_ids)}",
        )

    async def is_claimed(self, task_id: str) -> bool:
        """Whether any run ever claimed this id, even if its row was purged."""
        return await self._database.read(
            lambda connection: reads.is_claimed(connection, task_id), doing=f"looking for the task {task_id}"
        )

    async def claimed_input(self, task_id: str) -> str | None:
        """`input_sha256` of the task that claimed this id, even if its row was purged; None without a claim."""
        return await self._database.read(
            lambda connection: reads.claimed_input(connection, task_id), doing=f"looking for the task {task_id}"
        )

    async def tasks(
        self,
        *,
        tenant_id: str | None = None,
        user_id: str | None = None,
        status: TaskStatus | None = None,
        scene: Scene | None = None,
        text: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> TaskPage:
        """One page, newest first; with `text` those whose id or prompt holds it. Raises CursorInvalid."""
        limit = _bounded(limit)
        place = None if cursor is None else place_of_cursor(cursor)
        rows = await self._database.read(
            lambda connection: reads.task_list(
                connection,
                tenant_id=tenant_id,
                user_id=user_id,
                status=status,
                scene=scene,
                text=text,
                after=place,
                limit=limit + 1,
            ),
            doing="listing tasks",
        )
        return _page(rows, limit)

    async def tenant_seen(self, tenant_id: str, user_id: str, *, only_user: str | None = None) -> TenantSeen:
        """A tenant's open tasks, of one user or of all, and a user's balance as last stated."""
        return await self._database.read(
            lambda connection: tenant_reads.seen(connection, tenant_id, user_id, only_user=only_user),
            doing=f"reading the open tasks of {tenant_id}",
        )

    async def open_tasks(self, *, quiet_for: timedelta, cursor: str | None = None, limit: int = 50) -> TaskPage:
        """One page of the tasks that have not ended and had no write for `quiet_for`; oldest first.

        Raises CursorInvalid.
        """
        limit = _bounded(limit)
        place = None if cursor is None else place_of_cursor(cursor)
        rows = await self._database.read(
            lambda connection: reads.open_tasks(connection, quiet_for=quiet_for, after=place, limit=limit + 1),
            doing="listing open tasks",
        )
        return _page(rows, limit)

    async def events(self, task_id: str, *, after: str | None = None, limit: int = MAX_PAGE) -> list[TaskEvent]:
        """A task's events after a cursor, in order of `seq`. Raises CursorInvalid."""
        seq = 0 if after is None else seq_of_cursor(after, task_id)
        return await self.events_after(task_id, seq, limit=limit)

    async def events_after(self, task_id: str, seq: int, *, limit: int = MAX_PAGE) -> list[TaskEvent]:
        """A task's events with a higher `seq`, in order."""
        return await self._database.read(
            lambda connection: reads.events(connection, task_id, after_seq=seq, limit=_bounded(limit)),
            doing=f"reading the events of the task {task_id}",
        )

    async def events_of_each(self, positions: Mapping[str, int], *, limit_each: int = MAX_PAGE) -> list[StoredEvent]:
        """The events of several tasks after each one's `seq`, at most `limit_each` of a task, in order within each."""
        return await self._database.read(
            lambda connection: stream_reads.events_of_each(connection, positions, limit_each=limit_each),
            doing=f"reading the newest events of {len(positions)} tasks",
        )

    async def heads(self, task_ids: Sequence[str]) -> dict[str, TaskHead]:
        """How far each task has come. Unknown tasks are left out."""
        found = await self._database.read(
            lambda connection: stream_reads.heads(connection, task_ids),
            doing=f"reading how far {len(task_ids)} tasks have come",
        )
        return {head.task_id: head for head in found}

    async def recent_heads(
        self, tenant_id: str, *, older_than: TaskHead | None = None, limit: int = MAX_PAGE
    ) -> list[TaskHead]:
        """How far a tenant's tasks have come that are open or younger than a minute; newest first, `limit` of them.

        `older_than`: the last head of the page before.
        """
        limit = _bounded(limit)
        return await self._database.read(
            lambda connection: stream_reads.recent_heads(connection, tenant_id, older_than=older_than, limit=limit),
            doing=f"reading the recent tasks of {tenant_id}",
        )

    def listener(self, *, written: Callable[[str, int], None], resumed: Callable[[], None]) -> EventListener:
        """A listener on its own connection: `written(task_id, seq)` per write, `resumed()` if some were missed."""
        return EventListener(self._dsn, self.address, written=written, resumed=resumed)

    async def training_log(
        self, task_id: str, *, after_position: int = 0, limit: int = MAX_PAGE
    ) -> list[TrainingLogRow]:
        """A task's training log after a position, in order of arrival."""
        return await self._database.read(
            lambda connection: reads.log_rows(
                connection, task_id, after_position=after_position, limit=_bounded(limit)
            ),
            doing=f"reading the training log of the task {task_id}",
        )

    async def exceptions(
        self, *, task_id: str | None = None, codes: Sequence[str] | None = None, limit: int = MAX_PAGE
    ) -> list[TaskExceptionRow]:
        """Exception records, newest first: of one task or of all, with some codes or with any."""
        return await self._database.read(
            lambda connection: reads.exceptions(connection, task_id=task_id, codes=codes, limit=_bounded(limit)),
            doing="reading exception records",
        )

    async def take_unsettled(self, *, every: timedelta, limit: int) -> list[UnsettledTask]:
        """Some ended tasks whose settlement is unknown and whose ledger is due for a check; due again after `every`."""
        return await self._database.transaction(
            lambda connection: unsettled.take_unsettled(connection, every=every, limit=limit),
            doing="taking tasks whose settlement is unknown",
        )

    async def correct_settlement(self, correction: Correction) -> bool:
        """Write what the ledger now shows into a row's credits, with its record. False if it was known."""
        return await self._database.transaction(
            lambda connection: unsettled.correct(connection, correction),
            doing=f"correcting the settlement of the task {correction.task_id}",
        )

    async def settle_by_hand(self, found: Found) -> bool:
        """Record what an operator read in the ledger. False: it was recorded before.

        Raises TaskUnknown, and NotToBeSettled where the task is open or its settlement is known.
        """
        return await self._database.transaction(
            lambda connection: by_hand.settle(connection, found), doing=f"settling the task {found.task_id} by hand"
        )

    async def ended_before(self, before: datetime) -> list[EndedTask]:
        """Some of the tasks that ended before a time, to be deleted. Empty: none is left."""
        return await self._database.read(
            lambda connection: upkeep.ended_before(connection, before),
            doing=f"looking for tasks that ended by {before}",
        )

    async def ended_of(self, tenant_id: str) -> list[EndedTask]:
        """Some of a tenant's ended tasks, to be deleted. Empty: none is left."""
        return await self._database.read(
            lambda connection: upkeep.ended_of(connection, tenant_id), doing=f"looking for tasks of {tenant_id}"
        )

    async def undeletable(self, tenant_id: str) -> Undeletable:
        """A tenant's tasks that are open or whose ledger is still checked."""
        return await self._database.read(
            lambda connection: upkeep.undeletable(connection, tenant_id), doing=f"looking for tasks of {tenant_id}"
        )

    async def delete_tasks(self, task_ids: Sequence[str]) -> bool:
        """Delete a part of some tasks, with events and logs. Call it again until it is True. Claims are kept."""
        return await self._database.transaction(
            lambda connection: upkeep.delete_tasks(connection, task_ids), doing=f"deleting {len(task_ids)} tasks"
        )

    async def forget_claims(self, tenant_id: str) -> bool:
        """Remove a tenant from some claims of deleted tasks. Call it again until it is True."""
        return await self._database.transaction(
            lambda connection: upkeep.forget_claims(connection, tenant_id), doing=f"forgetting the ids of {tenant_id}"
        )

    async def append_audit(self, record: AuditRecord) -> None:
        """Append one record to the audit log."""
        await self._database.statement(
            lambda connection: audit.append(connection, record), doing=f"recording {record.operation} in the audit log"
        )

    async def delete_audit_before(self, before: datetime) -> int:
        """Delete some records of the audit log. Call it again until it returns 0."""
        return await self._database.transaction(
            lambda connection: audit.delete_older(connection, before), doing="purging the audit log"
        )

    async def queue_states(self) -> list[QueueState]:
        """How many tasks are queued, and for how long, for each priority."""
        return await self._database.read(upkeep.queue_states, doing="reading the queues")

    async def figures(self) -> StoreFigures:
        """Figures of the whole store: open tasks, points, unknown settlements, exception records."""
        return await self._database.read(figures.read, doing="reading the figures of all tasks")

    async def check_tables(self) -> None:
        """Raises TablesTooOld."""
        found = await self._database.read(schema.revision, doing="reading the tables' revision")
        if found is None or found < schema.NEEDED:
            raise TablesTooOld(
                f"The tables of PostgreSQL at {self.address} are "
                f"{f'of revision {found}' if found else 'missing'}, and this version needs {schema.NEEDED}: run "
                "`python -m store migrate` of this version, then start again."
            )

    async def home(self) -> StoreHome | None:
        """The Temporal namespace that the store belongs to; None if it was never bound."""
        return await self._database.read(home.home, doing="reading which Temporal namespace the store belongs to")

    async def bind(self, wanted: StoreHome) -> StoreHome:
        """Bind a store that is not bound yet. Returns the binding that it has now."""
        return await self._database.transaction(
            lambda connection: home.bind(connection, wanted), doing=f"binding the store to namespace {wanted}"
        )

    async def rebind(self, wanted: StoreHome) -> None:
        """Bind the store to another namespace. Every task that runs elsewhere then looks vanished."""
        await self._database.transaction(
            lambda connection: home.rebind(connection, wanted), doing=f"binding the store to namespace {wanted}"
        )

    async def note_looks(self, *, unseen_tasks: Sequence[UnseenTask] = (), seen: Sequence[str] = ()) -> None:
        """Record which open tasks could not be checked, and remove those that could."""
        if unseen_tasks or seen:
            await self._database.transaction(
                lambda connection: unseen.note(connection, unseen_tasks, seen),
                doing="recording which tasks could be checked",
            )

    async def unseen_tasks(self, *, limit: int = MAX_PAGE) -> list[UnseenTaskRow]:
        """Open tasks whose last check failed; the longest unseen first."""
        return await self._database.read(
            lambda connection: unseen.unseen(connection, limit=_bounded(limit)),
            doing="reading which tasks could not be checked",
        )

    async def check(self) -> None:
        """Raises StoreUnavailable if PostgreSQL does not answer, or takes no writes."""
        await self._database.read(
            lambda connection: connection.exec_driver_sql(ALIVE), doing="checking that it answers"
        )


def _page(rows: Sequence[TaskRow | UnreadableRow], limit: int) -> TaskPage:
    """A page of rows. `rows` may have one more than `limit`: then there is a next page."""
    page = rows[:limit]
    return TaskPage(
        tasks=[row for row in page if isinstance(row, TaskRow)],
        unreadable=[row for row in page if isinstance(row, UnreadableRow)],
        cursor=_cursor_after(rows, limit),
    )


def _cursor_after(rows: Sequence[TaskRow | UnreadableRow], limit: int) -> str | None:
    """Where the next page begins; None if there is none."""
    return list_cursor(rows[limit - 1].created_at, rows[limit - 1].task_id) if len(rows) > limit else None


def _bounded(limit: int) -> int:
    return max(1, min(limit, MAX_PAGE))
