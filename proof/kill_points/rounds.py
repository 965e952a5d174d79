"""One round: every task is brought to its point and kept there, the fault is injected, all tasks must end well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TASK_QUEUE, TRAINING_WORKFLOW, TaskStatus, workflow_id_of
from proof.kill_points.gates import AFTER_EFFECT, BEFORE_REPORT
from proof.kill_points.kinds import Kind
from proof.kill_points.oracle import Ending, judge_all
from proof.kill_points.paths import task_of
from proof.kill_points.points import Point
from proof.kill_points.site import TENANT, RoundSite, key_of
from proof.simulators.admin_wire import Fault
from proof.site.recorder import Recorder
from proof.site.waiting import OUTSIDE_ERRORS, until

STARTS_AT_ONCE: Final = 8
REACH_SECONDS: Final = 90.0
END_SECONDS: Final = 90.0
STREAM_SECONDS: Final = 20.0
TASK_TIMEOUT: Final = timedelta(seconds=3)
"""As `comfyui_temporal/client/start.py` starts tasks."""
HELD_UP_SECONDS: Final = 110.0
"""Shorter than the gated worker's patience: a reply that a healthy service holds back arrives in the end."""


@dataclass
class Cell:
    """One point in one kind's round, and its outcome."""

    point: Point
    kind: Kind
    task_id: str
    fault: str | None = None
    """The simulator's fault that keeps it there, as `key_of` names it."""
    problems: list[str] = field(default_factory=list)
    is_first_try: bool = True
    """Whether its call had not been retried before the fault: then nothing waits for a longer pause."""
    recovery_seconds: float | None = None
    """From the failed part's return to a worker's next action for it; None if there was nothing to do."""

    @property
    def is_reached_in_worker(self) -> bool:
        return self.point.gate is not None and self.fault is None

    @property
    def may_end(self) -> frozenset[TaskStatus]:
        return self.kind.may_end | {self.point.path.ends}


class Laps:
    """How long each part of a round took."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._since = now - self._since, now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.laps.items())


async def run_round(site: RoundSite, kind: Kind, points: Sequence[Point], number: int, laps: Laps) -> list[Cell]:
    """Every cell with its problems; none is ok."""
    await site.admin.reset()
    await site.set_up()
    site.gates.forget()
    recorder = Recorder(site)
    cells = [Cell(point, kind, f"kp-{number}-{n}") for n, point in enumerate(points, start=1)]
    try:
        reached = await _all_reached(site, cells, recorder)
        laps.lap("reached")
        await asyncio.gather(*(_record_tries(site, cell) for cell in reached))
        await _approach(site, reached)
        back = await kind.inject(site, [cell.task_id for cell in reached])
        laps.lap("fault")
        await asyncio.gather(*(_after(site, cell) for cell in cells))
        await _all_ended(site, cells)
        await recorder.finish(STREAM_SECONDS)
        laps.lap("ended")
        await judge_all(site, [_ending(cell, recorder, back) for cell in cells])
        laps.lap("judged")
    except OUTSIDE_ERRORS as failure:
        for cell in cells:
            cell.problems.append(f"the round was broken off: {type(failure).__name__} {failure}")
    finally:
        site.gates.open_all()
        await recorder.finish(0)
    return cells


async def _all_reached(site: RoundSite, cells: Sequence[Cell], recorder: Recorder) -> list[Cell]:
    """Those that reached their points; for the others that is a problem."""
    turn = asyncio.Semaphore(STARTS_AT_ONCE)

    async def bring(cell: Cell) -> None:
        try:
            async with turn:
                await _prepare(site, cell)
                recorder.follow(TENANT, cell.task_id)
                await _start(site, cell)
            await cell.point.path.lead(site, cell.task_id)
            await until(lambda: _is_reached(site, cell), "its point", seconds=REACH_SECONDS, look_seconds=0.2)
        except (TimeoutError, AssertionError) as failure:
            cell.problems.append(f"it never came to its point: {failure}")

    await asyncio.gather(*(bring(cell) for cell in cells))
    return [cell for cell in cells if not cell.problems]


async def _prepare(site: RoundSite, cell: Cell) -> None:
    point, task_id = cell.point, cell.task_id
    await point.path.before(site, task_id)
    if point.gate is None:
        return
    is_loss = cell.kind.name == "reply-lost"
    if point.phase == AFTER_EFFECT and (is_loss or cell.kind.is_reply_in_flight):
        fault = await _hold_up_reply(site, cell, "drop" if is_loss else "delay")
        cell.fault = key_of(site.service_of(point.gate.call), fault)
        return
    gate = point.gate.model_copy(update={"loses": is_loss and point.phase == BEFORE_REPORT})
    site.gates.close(task_id, gate)


async def _hold_up_reply(site: RoundSite, cell: Cell, kind: str) -> Fault:
    gate = cell.point.gate
    assert gate is not None
    n = int(gate.about.rpartition(":")[2]) if ":" in gate.about else 1
    # The nth call of a route is the one whose key has that number. Undos count by hold and job instead.
    nth = n if gate.call in ("submit_job", "create_training", "pre_deduct") else 1
    given: dict[str, Any] = {"route": gate.call, "task_id": cell.task_id, "nth": nth, "when": "after"}
    if kind == "delay":
        given["seconds"] = HELD_UP_SECONDS
    return await site.service_of(gate.call).fault(kind, **given)


async def _start(site: RoundSite, cell: Cell) -> None:
    task = task_of(site, cell.point.scene, cell.task_id, cell.point.path)
    await site.client.start_workflow(
        IMAGE_WORKFLOW if cell.point.scene == "image" else TRAINING_WORKFLOW,
        task,
        id=workflow_id_of(cell.task_id),
        task_queue=TASK_QUEUE,
        task_timeout=TASK_TIMEOUT,
    )


async def _is_reached(site: RoundSite, cell: Cell) -> bool:
    if cell.fault is not None:
        return cell.fault in await site.hits()
    if cell.is_reached_in_worker:
        return site.gates.is_reached(cell.task_id)
    assert cell.point.path.parked is not None
    return await cell.point.path.parked(site, cell.task_id)


async def _record_tries(site: RoundSite, cell: Cell) -> None:
    described = (await site.handle(cell.task_id).describe()).raw_description
    cell.is_first_try = all(pending.attempt <= 1 for pending in described.pending_activities)


async def _approach(site: RoundSite, cells: Sequence[Cell]) -> None:
    """Run the approaches, each its number of milliseconds before the fault, the earliest first."""
    paths = sorted(
        (cell for cell in cells if cell.point.path.approach is not None),
        key=lambda cell: -cell.point.path.milliseconds,
    )
    leads = [cell.point.path.milliseconds for cell in paths] + [0]
    for n, cell in enumerate(paths):
        assert cell.point.path.approach is not None
        await cell.point.path.approach(site, cell.task_id)
        await asyncio.sleep((leads[n] - leads[n + 1]) / 1000)


async def _after(site: RoundSite, cell: Cell) -> None:
    """Continue a task that waits for an action from outside."""
    try:
        await until(lambda: _pushed(site, cell), "a push", seconds=10)
    except TimeoutError as failure:
        cell.problems.append(str(failure))


async def _pushed(site: RoundSite, cell: Cell) -> bool:
    await cell.point.path.after(site, cell.task_id)
    return True


async def _all_ended(site: RoundSite, cells: Sequence[Cell]) -> None:
    waiting = {cell.task_id: cell for cell in cells}

    async def none_left() -> bool:
        for task_id in list(waiting):
            if await _has_ended(site, task_id, may_lack_row=waiting[task_id].kind.ends_runs):
                del waiting[task_id]
        return not waiting

    try:
        await until(none_left, "the ends", seconds=END_SECONDS, look_seconds=0.3)
    except TimeoutError:
        for cell in waiting.values():
            cell.problems.append(f"it has not ended within {END_SECONDS:g} s")


async def _has_ended(site: RoundSite, task_id: str, *, may_lack_row: bool) -> bool:
    row = await site.row(task_id)
    if row is None:
        # Terminated before it claimed its id: nothing was begun. A claim in flight has ended by then.
        return may_lack_row
    if row.ended_at is None:
        return False
    info = (await site.handle(task_id).describe()).raw_description.workflow_execution_info
    return info.HasField("close_time")


def _ending(cell: Cell, recorder: Recorder, back: datetime) -> Ending:
    return Ending(
        task_id=cell.task_id,
        may_end=cell.may_end,
        jobs=cell.point.path.jobs if not cell.kind.may_end else None,
        ends_runs=cell.kind.ends_runs,
        streamed=recorder.received.get(cell.task_id, []),
        back=back.astimezone(UTC),
        problems=cell.problems,
        recovered=lambda seconds: setattr(cell, "recovery_seconds", seconds),
    )
