"""What is true in the end (invariants 1 to 6): read from books, jobs, events, runs and clients."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from temporalio.api.enums.v1 import EventType as HistoryEvent
from temporalio.api.enums.v1 import WorkflowTaskFailedCause

from comfyui_temporal.contracts.tasks import EventType, workflow_id_of
from proof.simulators.admin_wire import EntrySeen, HoldSeen
from proof.simulators.credits_profile import CONTRACT, PROFILES, CreditsProfile
from proof.simulators.task_money import HOLD_DOUBLED, SAY_UNKNOWN, TaskMoney
from proof.soak.journal import Journal
from proof.soak.plan import Plan
from proof.soak.site import Site, insist
from proof.soak.workload import still_running

HISTORIES_AT_ONCE: Final = 8
SHOWN: Final = 5
ENDS: Final = {"completed": EventType.COMPLETED, "failed": EventType.FAILED, "cancelled": EventType.CANCELLED}
BENIGN: Final = {
    # The server's own answers to a message that came while a workflow task was being completed.
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_COMMAND,
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_UPDATE,
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND,
}
MUST_BE_ZERO: Final = (
    "tasks not begun",
    "tasks not ended",
    "runs still open",
    "double charges",
    "charges that differ from what the task tells",
    "leaked holds",
    "orphan jobs",
    "lost events",
    "repeated events",
    "event histories with a gap or a wrong end",
    "failed workflow tasks",
    "untrue books",
)


@dataclass
class Verdict:
    """Untruths by kind, and what else there is to tell."""

    untrue: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in MUST_BE_ZERO})
    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    exceptions: Counter[str] = field(default_factory=Counter)
    events: int = 0
    task_seconds: list[float] = field(default_factory=list)
    """From a task's start to its end, ascending."""

    @property
    def is_good(self) -> bool:
        return not any(self.untrue.values())

    def add(self, name: str, examples: Iterable[str]) -> None:
        self.untrue[name] += examples


async def judge(site: Site, plan: Plan, journal: Journal) -> Verdict:
    """Ask everybody; nothing goes wrong any more while this is done. Raises Unmended."""
    verdict = Verdict()
    rows = await site.table.rows(
        "SELECT task_id, scene, status, ended_at, extract(epoch FROM ended_at - created_at)::float8 AS seconds, "
        "(credits->>'charged')::int AS charged, error->>'code' AS code FROM tasks WHERE task_id LIKE $1",
        f"soak-{plan.seed}-%",
    )
    begun = {row["task_id"] for row in rows}
    verdict.add("tasks not begun", {plan.task_id(n) for n in range(plan.tasks)} - begun)
    verdict.add("tasks not ended", (row["task_id"] for row in rows if row["ended_at"] is None))
    verdict.task_seconds = sorted(row["seconds"] for row in rows if row["ended_at"] is not None)
    verdict.kinds.update(row["scene"] for row in rows)
    verdict.ends.update(f"{row['status']} ({row['code']})" if row["code"] else row["status"] for row in rows)
    verdict.add("runs still open", await still_running(site))
    await _judge_money(site, PROFILES[plan.profile], rows, verdict)
    await _judge_jobs(site, verdict)
    await _judge_events(site, plan, rows, journal, verdict)
    await _judge_histories(site, sorted(begun), verdict)
    return verdict


async def _judge_money(site: Site, profile: CreditsProfile, rows: list[Any], verdict: Verdict) -> None:
    entries, holds, records = await _by_task(site)
    for row in rows:
        task_id, told = row["task_id"], row["charged"]
        money = TaskMoney(profile, holds.pop(task_id, []), entries[task_id], told, records[task_id])
        commits = sum(entry.kind == "commit" for entry in money.entries)
        shown = f"{task_id} {row['status']}: {money.taken} taken, {told} told, {commits} commits"
        is_more_than_told = told is not None and money.taken > told
        if is_more_than_told or commits > 1 or (money.taken and row["status"] != "completed"):
            verdict.add("double charges", [shown])
        elif money.mischarges():
            verdict.add("charges that differ from what the task tells", [shown])
        verdict.add("leaked holds", (f"{task_id}: {leak}" for leak in money.leaks()))
    for task_id, left in holds.items():
        verdict.add("leaked holds", (f"{task_id}: {hold.pre_deduct_id}" for hold in left if hold.phase == "open"))
    books = await insist(site.admin.credits.balance_check, "the books")
    verdict.add("untrue books", books.problems)


async def _by_task(
    site: Site,
) -> tuple[dict[str, list[EntrySeen]], dict[str, list[HoldSeen]], dict[str, list[tuple[str, dict[str, Any]]]]]:
    """Ledger entries, holds, and the exception records that say what is not known."""
    entries: dict[str, list[EntrySeen]] = defaultdict(list)
    for entry in await insist(site.admin.credits.ledger, "the ledger"):
        if entry.task_id is not None:
            entries[entry.task_id].append(entry)
    holds: dict[str, list[HoldSeen]] = defaultdict(list)
    for hold in await insist(site.admin.credits.holds, "the holds"):
        holds[hold.task_id].append(hold)
    records: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for row in await site.table.rows(
        "SELECT task_id, code, details::text AS details FROM task_exceptions WHERE code = ANY($1::text[])",
        [HOLD_DOUBLED, *SAY_UNKNOWN],
    ):
        records[row["task_id"]].append((row["code"], json.loads(row["details"])))
    return entries, holds, records


async def _judge_jobs(site: Site, verdict: Verdict) -> None:
    runs = await insist(site.admin.comfyui.jobs, "the jobs")
    verdict.add("orphan jobs", (f"{run.run_id} of {run.task_id}: {run.phase}" for run in runs if not run.is_over))


async def _judge_events(site: Site, plan: Plan, rows: list[Any], journal: Journal, verdict: Verdict) -> None:
    """The store's histories are whole, and each stream was told just what stands there, once and in order."""
    kept: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for event in await site.table.rows(
        "SELECT task_id, seq, event FROM task_events WHERE task_id LIKE $1 ORDER BY task_id, seq",
        f"soak-{plan.seed}-%",
    ):
        kept[event["task_id"]].append((event["seq"], event["event"]))
        verdict.events += 1
    for row in rows:
        task_id, status = row["task_id"], row["status"]
        seqs, kinds = [seq for seq, _ in kept[task_id]], [kind for _, kind in kept[task_id]]
        told = journal.told.get(task_id, [])
        ends = [kind for kind in kinds if kind in ENDS.values()]
        if seqs != list(range(1, len(seqs) + 1)) or ends != [ENDS.get(status)] or kinds[-1:] != ends:
            verdict.add("event histories with a gap or a wrong end", [f"{task_id} {status}: {kinds}"])
        verdict.add("lost events", (f"{task_id}:{seq}" for seq in sorted(set(seqs) - set(told))))
        if told != sorted(set(told)):
            verdict.add("repeated events", [f"{task_id} was told {told}"])
    codes = await site.table.rows("SELECT code, count(*) AS n FROM task_exceptions GROUP BY code")
    verdict.exceptions.update({row["code"]: row["n"] for row in codes})


async def _judge_histories(site: Site, task_ids: list[str], verdict: Verdict) -> None:
    """No workflow task ever failed: nothing left a run stuck, even for a moment."""
    numbers = iter(task_ids)

    async def look_through() -> None:
        for task_id in numbers:
            verdict.add("failed workflow tasks", await insist(lambda: _failed(site, task_id), "a history"))  # noqa: B023

    await asyncio.gather(*(look_through() for _ in range(HISTORIES_AT_ONCE)))


async def _failed(site: Site, task_id: str) -> list[str]:
    handle = site.client.get_workflow_handle(workflow_id_of(task_id))
    return [
        f"{task_id}: {event.workflow_task_failed_event_attributes.failure.message[:200]}"
        async for event in handle.fetch_history_events()
        if event.event_type == HistoryEvent.EVENT_TYPE_WORKFLOW_TASK_FAILED
        and event.workflow_task_failed_event_attributes.cause not in BENIGN
    ]


def table(plan: Plan, journal: Journal, verdict: Verdict) -> str:
    """Everything in one Markdown table, with examples of each untruth below it."""
    kinds = Counter(fault.kind for fault in journal.faults.values())
    recoveries = sorted(
        fault.recovery_seconds for fault in journal.faults.values() if fault.recovery_seconds is not None
    )
    gap, rate = journal.seconds / max(1, len(journal.faults)), verdict.kinds.total() / max(1, journal.seconds)
    lines = [
        ("tasks", f"{verdict.kinds.total()}: {_counts(verdict.kinds)}"),
        (
            "took",
            f"{journal.seconds / 60:.1f} min, {rate:.2f} tasks a second",
        ),
        ("ends", _counts(verdict.ends)),
        ("faults", f"{kinds.total()}, one every {gap:.1f} s: {_counts(kinds)}"),
        ("events", f"{verdict.events} written, {sum(map(len, journal.told.values()))} told"),
        ("exception records", _counts(verdict.exceptions) or "none"),
        ("recovery after an outage", _spread(recoveries, "until the next event")),
        ("a task's whole time", _spread(verdict.task_seconds, "from start to end")),
        *((name, f"**{len(examples)}**") for name, examples in verdict.untrue.items()),
    ]
    shown = [f"| {name} | {value} |" for name, value in lines]
    named = f" PROFILE={plan.profile}" if plan.profile != CONTRACT.name else ""
    for name, examples in verdict.untrue.items():
        shown += [f"{name}: {example}" for example in examples[:SHOWN]]
    return "\n".join([f"| `make soak TASKS={plan.tasks} SEED={plan.seed}{named}` | |", "| --- | --- |", *shown])


def as_json(plan: Plan, journal: Journal, verdict: Verdict) -> str:
    faults = Counter(fault.kind for fault in journal.faults.values())
    return json.dumps(
        {
            "plan": plan.model_dump(),
            "seconds": journal.seconds,
            "tasks": verdict.kinds,
            "ends": verdict.ends,
            "faults": faults,
            "exceptions": verdict.exceptions,
            "untrue": verdict.untrue,
            "slowest_task_seconds": max(verdict.task_seconds, default=None),
            "slowest_recovery_seconds": max(
                (fault.recovery_seconds or 0.0 for fault in journal.faults.values()), default=None
            ),
        },
        indent=2,
    )


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _spread(seconds: list[float], what: str) -> str:
    if not seconds:
        return "none measured"
    return f"median {statistics.median(seconds):.1f} s, slowest {seconds[-1]:.1f} s {what} ({len(seconds)} measured)"
