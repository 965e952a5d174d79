"""The soak's judge sees each untruth, and none where there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.api.enums.v1 import EventType as HistoryEvent
from temporalio.api.history.v1 import HistoryEvent as Event

from proof.soak.journal import FaultSeen, Journal
from proof.soak.plan import Plan
from proof.soak.site import Site
from proof.soak.verdict import judge, table

PLAN = Plan(tasks=2)
COMPLETED, CANCELLED = PLAN.task_id(0), PLAN.task_id(1)


def row(task_id: str, status: str, charged: int, **given: Any) -> dict[str, Any]:
    told = {"scene": "image.generate", "ended_at": 1, "seconds": 5.0, "code": None}
    return {"task_id": task_id, "status": status, "charged": charged, **told, **given}


def entry(task_id: str, kind: str, change: int, frozen_change: int) -> Any:
    return SimpleNamespace(task_id=task_id, kind=kind, change=change, frozen_change=frozen_change)


class World:
    """What everybody would answer after two tasks: one completed for 24 points, one cancelled."""

    def __init__(self, folder: Path) -> None:
        self.rows = [row(COMPLETED, "completed", 24), row(CANCELLED, "cancelled", 0)]
        self.ledger = [
            entry(COMPLETED, "pre_deduct", -24, 24),
            entry(COMPLETED, "commit", 0, -24),
            entry(CANCELLED, "pre_deduct", -18, 18),
            entry(CANCELLED, "cancel", 18, -18),
        ]
        self.holds = [SimpleNamespace(pre_deduct_id="h", task_id=COMPLETED, phase="committed", amount=24)]
        self.jobs = [SimpleNamespace(run_id="j", task_id=COMPLETED, phase="over", is_over=True)]
        self.events = {COMPLETED: ["task.accepted", "task.completed"], CANCELLED: ["task.accepted", "task.cancelled"]}
        self.exceptions: list[dict[str, Any]] = []
        self.plan = PLAN
        self.running: list[str] = []
        self.problems: list[str] = []
        self.history: list[Event] = []
        self.journal = Journal(folder)
        self.journal.begin(PLAN)
        self.journal.add_told({COMPLETED: [1, 2], CANCELLED: [1, 2]})

    async def untrue(self) -> dict[str, list[str]]:
        """Only what is not empty."""
        verdict = await judge(cast(Site, self), self.plan, self.journal)
        return {name: examples for name, examples in verdict.untrue.items() if examples}

    @property
    def table(self) -> Any:
        async def rows(query: str, *_: Any) -> list[dict[str, Any]]:
            if "FROM task_exceptions" in query:
                return [] if "count(*)" in query else self.exceptions
            if "FROM task_events" in query:
                told = self.events.items()
                return [
                    {"task_id": task_id, "seq": seq, "event": kind}
                    for task_id, kinds in told
                    for seq, kind in enumerate(kinds, 1)
                ]
            return self.rows

        return SimpleNamespace(rows=rows)

    @property
    def admin(self) -> Any:
        credits = SimpleNamespace(
            ledger=answering(self.ledger),
            holds=answering(self.holds),
            balance_check=answering(SimpleNamespace(problems=self.problems)),
        )
        return SimpleNamespace(credits=credits, comfyui=SimpleNamespace(jobs=answering(self.jobs)))

    @property
    def client(self) -> Any:
        async def runs() -> Any:
            for workflow_id in self.running:
                yield SimpleNamespace(id=workflow_id)

        async def history() -> Any:
            for event in self.history:
                yield event

        handle = SimpleNamespace(fetch_history_events=history)
        return SimpleNamespace(list_workflows=lambda _query: runs(), get_workflow_handle=lambda _id: handle)


def answering(value: Any) -> Any:
    async def answer() -> Any:
        return value

    return answer


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_nothing_is_untrue_where_all_is_well(world: World) -> None:
    assert await world.untrue() == {}


async def test_a_second_commit_is_a_double_charge(world: World) -> None:
    world.ledger.append(entry(COMPLETED, "commit", -24, 0))
    assert list(await world.untrue()) == ["double charges"]


async def test_a_charge_for_a_cancelled_task_is_a_double_charge(world: World) -> None:
    world.ledger[-1] = entry(CANCELLED, "commit", 0, -18)
    assert list(await world.untrue()) == ["double charges"]


async def test_a_charge_that_never_came_is_told(world: World) -> None:
    world.ledger[1] = entry(COMPLETED, "cancel", 24, -24)
    assert list(await world.untrue()) == ["charges that differ from what the task tells"]


async def test_an_open_hold_and_a_running_job_are_found(world: World) -> None:
    world.holds[0].phase = "open"
    world.jobs[0].is_over = False
    assert list(await world.untrue()) == ["leaked holds", "orphan jobs"]


@pytest.mark.parametrize(
    ("told", "name"),
    [([1], "lost events"), ([1, 2, 2], "repeated events"), ([2, 1], "repeated events"), ([], "lost events")],
)
async def test_a_client_must_be_told_each_event_once_and_in_order(world: World, told: list[int], name: str) -> None:
    world.journal.add_told({COMPLETED: told})
    assert list(await world.untrue()) == [name]


@pytest.mark.parametrize(
    "kinds", [["task.accepted"], ["task.completed", "task.accepted"], ["task.accepted", "task.failed"]]
)
async def test_a_history_must_end_as_its_task_did(world: World, kinds: list[str]) -> None:
    world.events[COMPLETED] = kinds
    world.journal.add_told({COMPLETED: list(range(1, len(kinds) + 1))})
    assert list(await world.untrue()) == ["event histories with a gap or a wrong end"]


async def test_tasks_that_are_missing_or_open_are_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proof.soak.workload.CLOSING_SECONDS", 0.0)
    world.rows = [row(COMPLETED, "completed", 24, ended_at=None)]
    world.running = ["task-" + COMPLETED]
    assert list(await world.untrue()) == ["tasks not begun", "tasks not ended", "runs still open"]


async def test_a_workflow_task_that_failed_is_found(world: World) -> None:
    world.history = [Event(event_type=HistoryEvent.EVENT_TYPE_WORKFLOW_TASK_FAILED)]
    assert list(await world.untrue()) == ["failed workflow tasks"]


async def test_a_doubled_hold_is_no_leak_where_nobody_can_name_it(world: World) -> None:
    """On the field's credits service, and only with its points recorded."""
    world.holds.append(SimpleNamespace(pre_deduct_id="second", task_id=COMPLETED, phase="open", amount=24))
    recorded = {"task_id": COMPLETED, "code": "hold_doubled", "details": '{"amount": 24}'}
    world.exceptions = [recorded]
    assert list(await world.untrue()) == ["leaked holds"]
    world.plan = PLAN.model_copy(update={"profile": "field"})
    assert await world.untrue() == {}
    world.exceptions = []
    assert list(await world.untrue()) == ["leaked holds"]
    world.exceptions = [{**recorded, "details": '{"amount": 20}'}]
    assert list(await world.untrue()) == ["leaked holds"]


async def test_a_charge_that_is_not_known_is_told_as_unknown_and_recorded(world: World) -> None:
    world.rows[0]["charged"] = None
    assert list(await world.untrue()) == ["charges that differ from what the task tells"]
    world.exceptions = [{"task_id": COMPLETED, "code": "settlement_unknown", "details": "{}"}]
    assert await world.untrue() == {}


async def test_a_hold_of_no_task_is_a_leak(world: World) -> None:
    world.holds.append(SimpleNamespace(pre_deduct_id="stray", task_id="soak-unknown", phase="open", amount=24))
    assert list(await world.untrue()) == ["leaked holds"]


async def test_the_table_tells_zeros_and_the_slowest_recovery(world: World) -> None:
    fault = FaultSeen(n=0, kind="worker_killed", began=1.0, over=3.0)
    world.journal.add_fault(fault)
    world.journal.add_fault(fault.model_copy(update={"recovery_seconds": 2.5}))
    text = table(PLAN, world.journal, await judge(cast(Site, world), PLAN, world.journal))
    assert "| double charges | **0** |" in text
    assert "slowest 2.5 s" in text
    assert "worker_killed 1" in text


def test_a_journal_is_read_again_but_for_a_half_written_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(PLAN)
    journal.add_fault(FaultSeen(n=4, kind="clock_jumps", began=1.0, over=2.0))
    journal.add_told({COMPLETED: [1, 2]})
    journal.add_seconds(60.0)
    with (tmp_path / "soak.jsonl").open("a") as file:
        file.write('{"told": {"soak-1-')
    again = Journal(tmp_path)
    assert (again.plan, list(again.faults), again.told, again.seconds) == (PLAN, [4], {COMPLETED: [1, 2]}, 60.0)


def test_the_same_seed_makes_the_same_tasks(tmp_path: Path) -> None:
    tasks = [Plan(tasks=200, seed=3).task(n, tmp_path) for n in range(200)]
    assert tasks == [Plan(tasks=200, seed=3).task(n, tmp_path) for n in range(200)]
    assert {task.scene.value for task in tasks} == {"image.generate", "model.train"}
    assert tasks[:5] != [Plan(tasks=200, seed=4).task(n, tmp_path) for n in range(5)]
