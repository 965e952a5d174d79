"""The verdict: the shared rules on every task, checks of the whole stack, and the table."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from comfyui_temporal.contracts.tasks import TaskStatus
from proof.checks.evidence import Services, Sources
from proof.checks.finished_task import Exempt, Expected, FinishedTask, Rule
from proof.checks.judge import judge
from proof.simulators.credits_profile import CONTRACT
from proof.site.waiting import insist
from proof.soak.journal import Journal
from proof.soak.plan import Plan
from proof.soak.site import SoakSite
from proof.soak.workload import still_running

READS_AT_ONCE: Final = 8
SHOWN: Final = 5
EXEMPT: Final = frozenset({Exempt.RESULT, Exempt.SNAPSHOT})
"""Rows are judged, not results; a run that was terminated before its last deletion leaves the dataset's copy."""
NOT_BEGUN, RUN_OPEN, FALSE_LEDGER = "tasks not begun", "runs still open", "contradictions in the ledger"
MUST_BE_ZERO: Final = (NOT_BEGUN, RUN_OPEN, *(rule for rule in Rule if rule != Rule.LEFT_SNAPSHOT), FALSE_LEDGER)


@dataclass
class Verdict:
    """The broken rules, by rule, and what else there is to report."""

    findings: dict[str, list[str]] = field(default_factory=lambda: {str(name): [] for name in MUST_BE_ZERO})
    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    exceptions: Counter[str] = field(default_factory=Counter)
    events: int = 0
    task_seconds: list[float] = field(default_factory=list)
    """From a task's start to its end, ascending."""

    @property
    def is_good(self) -> bool:
        return not any(self.findings.values())

    def add(self, name: str, examples: Iterable[str]) -> None:
        self.findings[name] += examples


async def judge_all(site: SoakSite, plan: Plan, journal: Journal) -> Verdict:
    """Judge every task, after all faults. Raises NotRepaired."""
    verdict = Verdict()
    rows = await site.table.rows(
        "SELECT task_id, scene, status, ended_at, extract(epoch FROM ended_at - created_at)::float8 AS seconds, "
        "error->>'code' AS code FROM tasks WHERE task_id LIKE $1",
        f"soak-{plan.seed}-%",
    )
    begun = {row["task_id"] for row in rows}
    verdict.add(NOT_BEGUN, {plan.task_id(n) for n in range(plan.tasks)} - begun)
    verdict.task_seconds = sorted(row["seconds"] for row in rows if row["ended_at"] is not None)
    verdict.kinds.update(row["scene"] for row in rows)
    verdict.ends.update(f"{row['status']} ({row['code']})" if row["code"] else row["status"] for row in rows)
    verdict.add(RUN_OPEN, await still_running(site))
    services = await insist(site.sources.services, "both services")
    verdict.add(FALSE_LEDGER, services.problems)
    verdict.add(Rule.LEAKED_HOLD, _strangers(services, begun, "holds", "open"))
    verdict.add(Rule.ORPHAN_JOB, _strangers(services, begun, "jobs", "waiting", "working"))
    await _judge_tasks(site.sources, services, sorted(begun), journal, verdict)
    codes = await site.table.rows("SELECT code, count(*) AS n FROM task_exceptions GROUP BY code")
    verdict.exceptions.update({row["code"]: row["n"] for row in codes})
    return verdict


def _strangers(services: Services, begun: set[str], what: str, *phases: str) -> list[str]:
    """Holds or jobs in these phases that belong to no task of this soak."""
    found: Any = getattr(services, what)
    return [f"{task_id}: {each}" for task_id in set(found) - begun for each in found[task_id] if each.phase in phases]


async def _judge_tasks(
    sources: Sources, services: Services, task_ids: list[str], journal: Journal, verdict: Verdict
) -> None:
    waiting = iter(task_ids)

    async def judge_some() -> None:
        for task_id in waiting:
            task = await insist(lambda: _evidence(sources, services, task_id, journal), "a task's evidence")  # noqa: B023
            verdict.events += len(task.events)
            for finding in judge(task, _expected(task), EXEMPT):
                verdict.add(finding.rule, [f"{task_id} {task.row.status if task.row else ''}: {finding}"])

    await asyncio.gather(*(judge_some() for _ in range(READS_AT_ONCE)))


async def _evidence(sources: Sources, services: Services, task_id: str, journal: Journal) -> FinishedTask:
    histories = await sources.histories(task_id)
    return await sources.task(task_id, services, streamed=journal.received.get(task_id, []), histories=histories)


def _expected(task: FinishedTask) -> Expected:
    """Every task here has a price; where the charge is unknown, a record has to say so."""
    is_known = task.row is not None and task.row.credits.charged is not None
    return Expected(ends=frozenset(TaskStatus), is_delivered=is_known)


def table(plan: Plan, journal: Journal, verdict: Verdict) -> str:
    """Everything in one Markdown table, with examples of each finding below it."""
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
        ("events", f"{verdict.events} kept, {sum(map(len, journal.received.values()))} received"),
        ("exception records", _counts(verdict.exceptions) or "none"),
        ("recovery after an outage", _spread(recoveries, "until the next event")),
        ("a task's whole time", _spread(verdict.task_seconds, "from start to end")),
        *((name, f"**{len(examples)}**") for name, examples in verdict.findings.items()),
    ]
    shown = [f"| {name} | {value} |" for name, value in lines]
    named = f" PROFILE={plan.profile}" if plan.profile != CONTRACT.name else ""
    for name, examples in verdict.findings.items():
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
            "findings": verdict.findings,
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
