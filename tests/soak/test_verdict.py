"""The soak's verdict counts what the shared rules find, and what only the whole stack can show."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from comfyui_temporal.contracts.tasks import TaskStatus
from proof.checks.evidence import Services
from proof.checks.finished_task import FinishedTask, Rule
from proof.soak.journal import FaultSeen, Journal
from proof.soak.plan import Plan
from proof.soak.site import SoakSite
from proof.soak.verdict import FALSE_LEDGER, NOT_BEGUN, RUN_OPEN, judge_all, table
from tests.checks.test_judge import hold, task

PLAN = Plan(tasks=2)
COMPLETED, CANCELLED = PLAN.task_id(0), PLAN.task_id(1)


def row(task_id: str, status: str) -> dict[str, Any]:
    return {
        **{"task_id": task_id, "status": status, "scene": "image.generate"},
        **{"ended_at": 1, "seconds": 5.0, "code": None},
    }


class World:
    """A stack after two tasks: one completed, one cancelled."""

    def __init__(self, folder: Path) -> None:
        self.rows = [row(COMPLETED, "completed"), row(CANCELLED, "cancelled")]
        self.tasks = {COMPLETED: task(), CANCELLED: task(TaskStatus.CANCELLED)}
        self.services = Services({}, {}, {}, [])
        self.running: list[str] = []
        self.journal = Journal(folder)
        self.journal.begin(PLAN)
        self.journal.add_received({COMPLETED: [1, 2, 3, 4], CANCELLED: [1, 2]})

    async def findings(self) -> dict[str, list[str]]:
        """Only what is not empty."""
        verdict = await judge_all(cast(SoakSite, self), PLAN, self.journal)
        return {name: examples for name, examples in verdict.findings.items() if examples}

    @property
    def table(self) -> Any:
        async def rows(query: str, *_: Any) -> list[dict[str, Any]]:
            return [] if "FROM task_exceptions" in query else self.rows

        return SimpleNamespace(rows=rows)

    @property
    def sources(self) -> Any:
        async def services() -> Services:
            return self.services

        async def histories(_task_id: str) -> list[Any]:
            return []

        async def one(task_id: str, _services: Services, **collected: Any) -> FinishedTask:
            return FinishedTask(**{**vars(self.tasks[task_id]), "streamed": collected["streamed"]})

        return SimpleNamespace(services=services, histories=histories, task=one)

    @property
    def client(self) -> Any:
        async def runs() -> Any:
            for workflow_id in self.running:
                yield SimpleNamespace(id=workflow_id)

        return SimpleNamespace(list_workflows=lambda _query: runs())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_nothing_is_found_where_all_is_well(world: World) -> None:
    assert await world.findings() == {}


async def test_what_the_shared_rules_find_is_counted_by_rule(world: World) -> None:
    world.tasks[COMPLETED] = task(holds=[hold(24, "open")], snapshot_files=["left.png"])
    assert list(await world.findings()) == [Rule.LEAKED_HOLD]


async def test_a_task_whose_stream_did_not_come_to_its_end_has_lost_its_events(world: World) -> None:
    del world.journal.received[CANCELLED]
    assert list(await world.findings()) == [Rule.LOST_EVENT]


async def test_tasks_that_are_missing_and_runs_that_are_open_are_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proof.soak.workload.CLOSING_SECONDS", 0.0)
    del world.rows[1]
    world.running = ["task-" + COMPLETED]
    assert list(await world.findings()) == [NOT_BEGUN, RUN_OPEN]


async def test_a_hold_and_a_job_of_no_task_and_a_false_ledger_are_found(world: World) -> None:
    strange: Any = {"soak-unknown": [SimpleNamespace(phase="open")]}
    running: Any = {"soak-unknown": [SimpleNamespace(phase="working")]}
    world.services = Services({}, strange, running, ["the books do not balance"])
    assert list(await world.findings()) == [Rule.LEAKED_HOLD, Rule.ORPHAN_JOB, FALSE_LEDGER]


async def test_the_table_shows_zeros_and_the_slowest_recovery(world: World) -> None:
    fault = FaultSeen(n=0, kind="worker_killed", began=1.0, over=3.0)
    world.journal.add_fault(fault)
    world.journal.add_fault(fault.model_copy(update={"recovery_seconds": 2.5}))
    text = table(PLAN, world.journal, await judge_all(cast(SoakSite, world), PLAN, world.journal))
    assert "| double charges | **0** |" in text
    assert "slowest 2.5 s" in text
    assert "worker_killed 1" in text


def test_a_journal_is_read_again_but_for_a_half_written_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(PLAN)
    journal.add_fault(FaultSeen(n=4, kind="clock_jumps", began=1.0, over=2.0))
    journal.add_received({COMPLETED: [1, 2]})
    journal.add_seconds(60.0)
    with (tmp_path / "soak.jsonl").open("a") as file:
        file.write('{"received": {"soak-1-')
    again = Journal(tmp_path)
    assert (again.plan, list(again.faults), again.received, again.seconds) == (PLAN, [4], {COMPLETED: [1, 2]}, 60.0)


def test_the_same_seed_makes_the_same_tasks(tmp_path: Path) -> None:
    tasks = [Plan(tasks=200, seed=3).task(n, tmp_path) for n in range(200)]
    assert tasks == [Plan(tasks=200, seed=3).task(n, tmp_path) for n in range(200)]
    assert {task.scene.value for task in tasks} == {"image.generate", "model.train"}
    assert tasks[:5] != [Plan(tasks=200, seed=4).task(n, tmp_path) for n in range(5)]
