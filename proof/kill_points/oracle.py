"""What must be true of each task in the end: the shared rules, and how soon work continued."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from temporalio.api.enums.v1 import EventType as Happened
from temporalio.client import WorkflowHistory

from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.checks.evidence import Services, Sources
from proof.checks.finished_task import Exempt, Expected
from proof.checks.histories import replay_failures
from proof.checks.judge import judge
from proof.kill_points.shorter_waits import shorter_waits
from proof.site.site import Site
from worker import WORKFLOWS

WORK: Final = {
    Happened.EVENT_TYPE_WORKFLOW_TASK_STARTED,
    Happened.EVENT_TYPE_WORKFLOW_TASK_COMPLETED,
    Happened.EVENT_TYPE_ACTIVITY_TASK_STARTED,
    Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
}
"""What a worker does, unlike what is done to a run from outside."""
READS_AT_ONCE: Final = 8
ALWAYS_EXEMPT: Final = frozenset({Exempt.RESULT})
"""The runs' own results are not read: the rows are judged."""


@dataclass
class Ending:
    """A task that should have ended, and what its plan expects. `problems` and `recovered` are filled in."""

    task_id: str
    may_end: frozenset[TaskStatus]
    jobs: int | None
    """How many jobs it has, where the fault does not change that."""
    ends_runs: bool
    streamed: list[TaskEvent]
    back: datetime
    problems: list[str]
    recovered: Callable[[float], None]
    histories: list[WorkflowHistory] = field(default_factory=list)


async def judge_all(site: Site, endings: Sequence[Ending]) -> None:
    """Add every problem to its task."""
    sources = site.sources
    services = await sources.services()
    turn = asyncio.Semaphore(READS_AT_ONCE)

    async def judge_one(ending: Ending) -> None:
        async with turn:
            await _judge(sources, services, ending)

    await asyncio.gather(*(judge_one(ending) for ending in endings))
    by_run = {history.run_id: ending for ending in endings for history in ending.histories}
    with shorter_waits():
        failures = await replay_failures([history for e in endings for history in e.histories], WORKFLOWS)
    for run_id, failure in failures.items():
        by_run[run_id].problems.append(f"its history does not replay: {failure}")


async def _judge(sources: Sources, services: Services, ending: Ending) -> None:
    ending.histories = await sources.histories(ending.task_id)
    task = await sources.task(ending.task_id, services, streamed=ending.streamed, histories=ending.histories)
    exempt = set(ALWAYS_EXEMPT)
    if ending.ends_runs:
        exempt.add(Exempt.NO_ROW)
        if task.row is not None and task.row.status is not TaskStatus.FAILED:
            exempt.add(Exempt.SNAPSHOT)  # terminated between its last event and the deletion
    expected = Expected(ending.may_end, ending.jobs, is_delivered=True)
    ending.problems += [problem for problem in services.problems if ending.task_id in problem]
    ending.problems += [str(finding) for finding in judge(task, expected, exempt)]
    _measure_recovery(ending)


def _measure_recovery(ending: Ending) -> None:
    """From the failed part's return to the next action of a worker, by the server's clock."""
    done = [
        event.event_time.ToDatetime(UTC)
        for history in ending.histories
        for event in history.events
        if event.event_type in WORK
    ]
    later = [at for at in done if at > ending.back]
    if later:
        ending.recovered((min(later) - ending.back).total_seconds())
