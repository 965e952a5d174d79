"""A small selection of the kill points on the real stack, and that its oracle sees what it is there to see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from comfyui_temporal.contracts.tasks import TaskStatus
from proof.kill_points.__main__ import chosen_points, run_rounds
from proof.kill_points.gates import BEFORE_SEND, Gate
from proof.kill_points.kinds import KINDS, Kind
from proof.kill_points.oracle import Ending, judge_all
from proof.kill_points.paths import PLAIN, WAITING, task_of
from proof.kill_points.points import ROUTES, all_points
from proof.kill_points.report import failures, table
from proof.kill_points.rounds import Cell
from proof.kill_points.site import RoundSite, opened_site
from proof.kill_points.stack import KillableStack
from proof.simulators.credits_profile import CONTRACT, FIELD, CreditsProfile
from proof.site.waiting import until

FEW = (
    "image: submit_job, after effect",
    "image: commit, before report",
    "image: write last event, before send",
    "image: continue as new, 10 ms after",
    "image: cancel_hold, after reply",
)
RECOVERY_SECONDS = 30.0
"""Other tests run beside it: work that goes on is what counts here; `make kill-points` measures how soon."""


@pytest_asyncio.fixture(scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    made = tmp_path_factory.mktemp("kill-points")
    for above in (made, made.parent):  # PostgreSQL, as another user where this is root, passes through
        above.chmod(0o755)
    yield made


async def all_ok(
    folder: Path, kinds: list[Kind], labels: tuple[str, ...], profile: CreditsProfile = CONTRACT
) -> list[Cell]:
    points = chosen_points(labels)
    cells = await run_rounds(
        KillableStack(folder / "run", profile), kinds, points, within_seconds=RECOVERY_SECONDS, most=40
    )
    assert not failures(cells), failures(cells)
    return cells


@pytest.mark.slow
async def test_a_worker_killed_at_some_points_costs_no_task(folder: Path) -> None:
    cells = await all_ok(folder, [KINDS["worker-killed"]], FEW)
    assert {cell.point.label for cell in cells} == set(FEW)
    assert "**failed**" not in table(cells)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind", ["temporal-killed", "postgres-killed", "credits-killed", "reply-lost", "terminated+killed"]
)
async def test_other_faults_at_many_points_cost_no_task(folder: Path, kind: str) -> None:
    await all_ok(folder, [KINDS[kind]], ("submit_job,", "pre_deduct,", "commit,", "write last event", "wait for C"))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_calls_of_the_fields_credits_service_cost_no_task(folder: Path) -> None:
    """There a hold whose answer was lost is taken twice: the first stays open, and exactly its points are recorded."""
    calls = ("pre_deduct,", "commit,", "charge,", "cancel_hold,")
    await all_ok(folder, [KINDS["reply-lost"], KINDS["worker-killed"]], calls, FIELD)


@pytest.mark.slow
async def test_the_oracle_reports_an_open_hold_and_a_running_job(folder: Path) -> None:
    """An open task judged as if it had ended."""
    async with opened_site(KillableStack(folder / "run")) as site:
        problems = await _judged_while_open(site)
    assert any("holds are still open" in problem for problem in problems), problems
    assert any("jobs still run" in problem for problem in problems), problems
    assert any("its row is open" in problem for problem in problems), problems
    assert any("the stream lacks" in problem for problem in problems), problems


async def _judged_while_open(site: RoundSite) -> list[str]:
    task_id = "kp-open"
    await WAITING.before(site, task_id)
    await site.client.start_workflow(
        "ImageGenerationWorkflow", task_of(site, "image", task_id, WAITING), id=f"task-{task_id}", task_queue="comfyui"
    )
    assert WAITING.parked is not None
    parked = WAITING.parked
    await until(lambda: parked(site, task_id), "a waiting task", seconds=30)
    ending = Ending(
        task_id=task_id,
        may_end=frozenset({TaskStatus.COMPLETED}),
        jobs=1,
        ends_runs=False,
        streamed=[],
        back=datetime.now(UTC),
        problems=[],
        recovered=lambda _: None,
    )
    await judge_all(site, [ending])
    return ending.problems


def test_every_call_of_the_flows_has_a_kill_point() -> None:
    gated = {point.gate.call for point in all_points() if point.gate}
    assert gated >= ROUTES | {"claim", "write", "snapshot", "delete_snapshot"}
    assert len({point.label for point in all_points()}) == len(all_points())
    assert any(point.path is PLAIN for point in all_points())


def test_a_gate_takes_the_call_it_names() -> None:
    class Call:
        key = "task-1:pre_deduct:2"

    gate = Gate(call="pre_deduct", phase=BEFORE_SEND, about="pre_deduct:2")
    assert gate.takes("pre_deduct", [Call()])
    assert not gate.takes("commit", [Call()])
    assert not Gate(call="pre_deduct", phase=BEFORE_SEND, about="pre_deduct:1").takes("pre_deduct", [Call()])
