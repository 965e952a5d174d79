"""What must be true of each task in the end (invariants 1 to 6 and 8), read from every part that knows it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, TypeVar

from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.enums.v1 import WorkflowTaskFailedCause
from temporalio.client import WorkflowHistory
from temporalio.service import RPCError
from temporalio.worker import Replayer

from comfyui_temporal.contracts.give_back import give_back_id_of
from comfyui_temporal.contracts.task_store import TaskExceptionRow, TaskRow
from comfyui_temporal.contracts.tasks import EventType, TaskEvent, TaskStatus, workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from proof.kill_points.shorter_waits import shorter_waits
from proof.kill_points.site import Site
from proof.simulators.admin_wire import EntrySeen, HoldSeen, RunSeen
from proof.simulators.credits_profile import CreditsProfile
from proof.simulators.task_money import TaskMoney
from worker import WORKFLOWS

Seen = TypeVar("Seen", EntrySeen, HoldSeen, RunSeen)

ENDS: Final = {
    TaskStatus.COMPLETED: EventType.COMPLETED,
    TaskStatus.FAILED: EventType.FAILED,
    TaskStatus.CANCELLED: EventType.CANCELLED,
}
BENIGN: Final = {
    # The server's own answers to a message that came while a workflow task was being completed.
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_COMMAND,
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_UPDATE,
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND,
}
WORK: Final = {
    Happened.EVENT_TYPE_WORKFLOW_TASK_STARTED,
    Happened.EVENT_TYPE_WORKFLOW_TASK_COMPLETED,
    Happened.EVENT_TYPE_ACTIVITY_TASK_STARTED,
    Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
}
"""What a worker does, unlike what is done to a run from outside."""
READS_AT_ONCE: Final = 8


@dataclass
class Ending:
    """A task that should have ended, and what is known of it beforehand. `problems` and `recovered` are told."""

    task_id: str
    may_end: frozenset[TaskStatus]
    jobs: int | None
    """How many jobs it has, where nobody intervened."""
    ends_runs: bool
    told: list[TaskEvent]
    back: datetime
    problems: list[str]
    recovered: Callable[[float], None]
    row: TaskRow | None = None
    events: list[TaskEvent] = field(default_factory=list)
    exceptions: list[TaskExceptionRow] = field(default_factory=list)
    histories: list[WorkflowHistory] = field(default_factory=list)

    def must(self, is_true: bool, problem: str) -> None:
        if not is_true:
            self.problems.append(problem)


@dataclass
class Books:
    """What both services have noted, by task."""

    profile: CreditsProfile
    entries: dict[str, list[EntrySeen]]
    holds: dict[str, list[HoldSeen]]
    runs: dict[str, list[RunSeen]]
    problems: list[str]


async def judged(site: Site, endings: Sequence[Ending]) -> None:
    """Note every untruth with its task."""
    books = Books(
        site.stack.profile,
        _by_task(await site.admin.credits.ledger()),
        _by_task(await site.admin.credits.holds()),
        _by_task(await site.admin.comfyui.jobs()),
        (await site.admin.credits.balance_check()).problems,
    )
    turn = asyncio.Semaphore(READS_AT_ONCE)

    async def read(ending: Ending) -> None:
        async with turn:
            await _read(site, ending)

    await asyncio.gather(*(read(ending) for ending in endings))
    for ending in endings:
        _check_end(ending)
        _check_money(ending, books)
        _check_jobs(ending, books.runs[ending.task_id])
        _check_events(ending)
        _check_histories(ending)
        told_its_end = ending.ends_runs and ending.row is not None and ending.row.status is not TaskStatus.FAILED
        if not told_its_end:  # terminated between its last event and the deletion, it leaves the copy
            ending.must(not _snapshot_files(site, ending.task_id), "its snapshot was not deleted")
    await _check_replays(endings)


def _by_task(seen: Iterable[Seen]) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = defaultdict(list)
    for each in seen:
        if each.task_id is not None:
            found[each.task_id].append(each)
    return found


async def _read(site: Site, ending: Ending) -> None:
    ending.row = await site.store.task(ending.task_id)
    ending.events = await site.store.events(ending.task_id)
    ending.exceptions = await site.store.exceptions(task_id=ending.task_id)
    ending.histories = [
        *[history async for history in _histories(site, workflow_id_of(ending.task_id))],
        *[history async for history in _histories(site, give_back_id_of(ending.task_id))],
    ]


async def _histories(site: Site, workflow_id: str) -> AsyncIterator[WorkflowHistory]:
    """Of the newest run, and of those that it was continued from."""
    run_id: str | None = None
    while True:
        try:
            history = await site.client.get_workflow_handle(workflow_id, run_id=run_id).fetch_history()
        except RPCError:
            return
        yield history
        run_id = history.events[0].workflow_execution_started_event_attributes.continued_execution_run_id
        if not run_id:
            return


def _check_end(ending: Ending) -> None:
    row = ending.row
    if row is None:
        ending.must(ending.ends_runs, "it has no row")
        return
    ending.must(row.ended_at is not None, "its row is open")
    allowed = ending.may_end
    ending.must(row.status in allowed, f"it ended {row.status}, not {' or '.join(sorted(allowed))}: {row.error}")


def _check_money(ending: Ending, books: Books) -> None:
    """Each hold is resolved once; charged is the price once where completed, and nothing elsewhere."""
    row = ending.row
    ending.problems += [problem for problem in books.problems if ending.task_id in problem]
    money = TaskMoney(
        books.profile,
        books.holds[ending.task_id],
        books.entries[ending.task_id],
        told=row.credits.charged if row else 0,
        records=[(record.code, record.details) for record in ending.exceptions],
    )
    ending.problems += [*money.leaks(), *money.mischarges()]
    charges, taken = money.charges, money.taken
    if row is not None and row.status is TaskStatus.COMPLETED:
        ending.must(charges == 1 and taken > 0, f"completed with {charges} charges, {taken} points")
        ending.must(bool(row.result_urls or row.output), "completed, and nothing handed out")
        return
    ending.must(taken == 0, f"{taken} points were charged for nothing")
    handed_out = row is not None and (row.result_urls or row.output)
    ending.must(not handed_out, "something was handed out")
    ending.must(not any(event.result_urls or event.output for event in ending.events), "an event hands something out")


def _check_jobs(ending: Ending, runs: Sequence[RunSeen]) -> None:
    alive = [run.run_id for run in runs if not run.is_over]
    ending.must(not alive, f"jobs still run: {alive}")
    if ending.jobs is not None:
        ending.must(len(runs) == ending.jobs, f"{len(runs)} jobs were made, not {ending.jobs}")


def _check_events(ending: Ending) -> None:
    """Gapless, one end and that the last; progress never back; each told to the stream once and in order."""
    events, row = ending.events, ending.row
    seqs = [event.seq for event in events]
    ending.must(seqs == list(range(1, len(seqs) + 1)), f"the events have a gap: {seqs}")
    kinds = [event.event for event in events]
    ends = [kind for kind in kinds if kind in ENDS.values()]
    if row is not None:
        ending.must(ends == [ENDS.get(row.status)] and kinds[-1:] == ends, f"its last event is no end: {kinds}")
        ending.must(row.last_seq == len(events), f"the row tells of {row.last_seq} events")
    reached: dict[tuple[int, str | None], float] = {}
    for event in events:
        at = (event.attempt, event.stage)
        ending.must((event.progress or 0.0) >= reached.get(at, 0.0), f"progress went back at {event.seq}")
        reached[at] = event.progress or 0.0
    if ending.told != events:
        told = [event.seq for event in ending.told]
        ending.problems.append(f"the stream was told {told}, the table holds {seqs}")


def _check_histories(ending: Ending) -> None:
    """No workflow task ever failed; work went on after the blow, measured by the server's clock."""
    signs: list[datetime] = []
    for history in ending.histories:
        for event in history.events:
            if event.event_type == Happened.EVENT_TYPE_WORKFLOW_TASK_FAILED:
                failed = event.workflow_task_failed_event_attributes
                ending.must(failed.cause in BENIGN, f"a workflow task failed: {failed.failure.message[:300]}")
            at = event.event_time.ToDatetime(UTC)
            if event.event_type in WORK and at > ending.back:
                signs.append(at)
    if signs:
        ending.recovered((min(signs) - ending.back).total_seconds())


async def _check_replays(endings: Sequence[Ending]) -> None:
    """Every history replays with the configuration of the gated worker."""
    by_run = {history.run_id: ending for ending in endings for history in ending.histories}

    async def all_histories() -> AsyncIterator[WorkflowHistory]:
        for ending in endings:
            for history in ending.histories:
                yield history

    replayer = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin()])
    with shorter_waits():
        async with replayer.workflow_replay_iterator(all_histories()) as results:
            async for result in results:
                if result.replay_failure is not None:
                    ending = by_run[result.history.run_id]
                    ending.problems.append(f"its history does not replay: {result.replay_failure}")


def _snapshot_files(site: Site, task_id: str) -> list[str]:
    kept = site.stack.folder.path / "objects" / "snapshots" / task_id
    return sorted(str(path) for path in kept.rglob("*") if path.is_file())
