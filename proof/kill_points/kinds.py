"""The kinds of fault. Each is injected once for all tasks of a round, and returns when the failed part is back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from temporalio.service import RPCError

from comfyui_temporal.contracts.tasks import TaskStatus
from proof.kill_points.gates import AFTER_EFFECT, BEFORE_REPORT
from proof.kill_points.paths import Act, ask_to_cancel, finish, grow_dearer
from proof.kill_points.points import Point
from proof.kill_points.site import CREDITS_ROUTES, RoundSite
from proof.site.waiting import OUTSIDE_ERRORS, until

Inject = Callable[[RoundSite, Sequence[str]], Awaitable[datetime]]

OUT_SECONDS: Final = 1.0
"""How long a part other than the worker stays away."""
SETTLE_SECONDS: Final = 0.3
GIVE_BACK_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Kind:
    """A kind of fault, the points that it fits, and how else tasks may end because of it."""

    name: str
    inject: Inject
    fits: Callable[[Point], bool]
    may_end: frozenset[TaskStatus] = frozenset()
    is_reply_in_flight: bool = False
    """`after effect`: the reply is held in the service (else that is the point `after reply`)."""
    ends_runs: bool = False
    """Runs end without their own clean-up: the reconciler's turn."""


async def _loosen(site: RoundSite) -> None:
    """Open all gates and remove all faults. Both services must be up."""
    site.gates.open_all()
    await site.admin.remove_faults()
    await site.admin.comfyui.release_callbacks()


def _now() -> datetime:
    return datetime.now(UTC)


async def worker_killed(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    await site.parts.kill("worker")
    await _loosen(site)
    await site.parts.start("worker")
    return _now()


async def worker_stopped(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    """SIGTERM: the calls in flight may end meanwhile."""
    stopping = asyncio.create_task(site.parts.kill("worker", signal.SIGTERM))
    await asyncio.sleep(SETTLE_SECONDS)
    await _loosen(site)
    await stopping
    await site.parts.start("worker")
    return _now()


def part_killed(part: str) -> Inject:
    """The tasks continue meanwhile, as far as they can."""

    async def inject(site: RoundSite, task_ids: Sequence[str]) -> datetime:
        await site.parts.kill(part)
        site.gates.open_all()
        await asyncio.sleep(OUT_SECONDS)
        await site.parts.start(part)
        back = _now()
        await _loosen(site)
        return back

    return inject


async def reply_lost(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    """Each task's reply was lost by a fault, or in the worker, when the task came to its point."""
    await _loosen(site)
    return _now()


async def cancelled(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    """In turn by the update and by a Temporal cancellation."""
    await _ask_all_to_cancel(site, task_ids)
    await asyncio.sleep(SETTLE_SECONDS)
    await _loosen(site)
    return _now()


async def terminated(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    """Calls in flight go on until their worker learns that the run is gone."""
    for task_id in task_ids:
        with contextlib.suppress(RPCError):
            await site.handle(task_id).terminate("by a kill point")
    await _loosen(site)
    return _now()


async def terminated_then_worker_killed(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    """The worker is killed while it gives back what the terminated runs left."""
    await terminated(site, task_ids)

    async def is_begun() -> bool:
        rows = [await site.row(task_id) for task_id in task_ids]
        return any(row is not None and row.ended_at is not None for row in rows)

    await until(is_begun, "the first that is given back", seconds=GIVE_BACK_SECONDS)
    await site.parts.kill("worker")
    await site.parts.start("worker")
    return _now()


async def _ask_all_to_cancel(site: RoundSite, task_ids: Sequence[str]) -> None:
    for number, task_id in enumerate(task_ids):
        if number % 2:
            with contextlib.suppress(RPCError):
                await site.handle(task_id).cancel()
        else:
            await ask_to_cancel(site, task_id)


def worker_killed_then(act: Act) -> Inject:
    """The worker is killed; before it is started again something happens to each task."""

    async def inject(site: RoundSite, task_ids: Sequence[str]) -> datetime:
        await site.parts.kill("worker")
        await _loosen(site)
        for task_id in task_ids:
            with contextlib.suppress(*OUTSIDE_ERRORS):
                await act(site, task_id)
        await site.parts.start("worker")
        return _now()

    return inject


async def worker_killed_then_cancelled(site: RoundSite, task_ids: Sequence[str]) -> datetime:
    await site.parts.kill("worker")
    await _loosen(site)
    await _ask_all_to_cancel(site, task_ids)
    await site.parts.start("worker")
    return _now()


def _anywhere(point: Point) -> bool:
    return True


def _no_reply_in_flight(point: Point) -> bool:
    return point.phase != AFTER_EFFECT


def _of_service(is_credits: bool) -> Callable[[Point], bool]:
    """Points whose reply in flight, if any, comes from the service that fails."""

    def fits(point: Point) -> bool:
        is_own = point.gate is not None and (point.gate.call in CREDITS_ROUTES) is is_credits
        return point.phase != AFTER_EFFECT or is_own

    return fits


def _loses(point: Point) -> bool:
    return point.phase == AFTER_EFFECT or (point.phase == BEFORE_REPORT and not point.is_route)


def _trains(point: Point) -> bool:
    return point.scene == "training"


_CANCELLED: Final = frozenset({TaskStatus.CANCELLED})
KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("worker-killed", worker_killed, _anywhere, is_reply_in_flight=True),
        Kind("worker-stopped", worker_stopped, _no_reply_in_flight),
        Kind("temporal-killed", part_killed("temporal"), _no_reply_in_flight),
        Kind("gateway-killed", part_killed("gateway"), _no_reply_in_flight),
        Kind("postgres-killed", part_killed("postgres"), _no_reply_in_flight),
        Kind("comfyui-killed", part_killed("comfyui"), _of_service(is_credits=False), is_reply_in_flight=True),
        Kind("credits-killed", part_killed("credits"), _of_service(is_credits=True), is_reply_in_flight=True),
        Kind("reply-lost", reply_lost, _loses),
        Kind("cancelled", cancelled, _no_reply_in_flight, _CANCELLED),
        Kind("terminated", terminated, _no_reply_in_flight, frozenset({TaskStatus.FAILED}), ends_runs=True),
        Kind(
            "terminated+killed",
            terminated_then_worker_killed,
            _no_reply_in_flight,
            frozenset({TaskStatus.FAILED}),
            ends_runs=True,
        ),
        Kind("killed+cancelled", worker_killed_then_cancelled, _anywhere, _CANCELLED, is_reply_in_flight=True),
        Kind("killed+delivered", worker_killed_then(finish), _anywhere, is_reply_in_flight=True),
        Kind("killed+dearer", worker_killed_then(grow_dearer), _trains, is_reply_in_flight=True),
    )
}
