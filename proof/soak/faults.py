"""What goes wrong. Each kind is one function: it injects a fault, waits until it is over, and returns what it did.

Kinds in `OUTAGES` stop a part: the time until work continues after them is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import httpx
import psutil
from standardwebhooks import Webhook

from comfyui_temporal.contracts.tasks import workflow_id_of
from proof.simulators.admin_client import AdminRefused, ServiceAdmin
from proof.simulators.admin_wire import FaultKind, RunSeen
from proof.site.parts import PARTS
from proof.site.waiting import OUTSIDE_ERRORS, insist
from proof.soak.plan import TENANTS
from proof.soak.site import SoakSite

Act = Callable[[SoakSite, random.Random], Awaitable[str]]

NETWORK_FAULTS: Final = (
    FaultKind.DROP,
    FaultKind.DELAY,
    FaultKind.ACT_LATE,
    FaultKind.ERROR,
    FaultKind.RATE_LIMIT,
    FaultKind.HTML,
    FaultKind.GARBAGE,
)
CALLBACK_FAULTS: Final = (
    FaultKind.CALLBACK_WITHHOLD,
    FaultKind.CALLBACK_DUPLICATE,
    FaultKind.CALLBACK_REORDER,
    FaultKind.CALLBACK_LATE,
    FaultKind.CALLBACK_GARBAGE,
    FaultKind.CALLBACK_FORGE,
)
GPU_FAULTS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("preempt", {}),
    ("fail", {"code": "gpu_out_of_memory"}),
    ("fail", {"code": "internal", "retryable": True}),
    ("forget", {}),
    ("stall", {}),
)
RICH: Final = 100_000_000
FLOOD: Final = 100
FLOOD_AT_ONCE: Final = 20
JUMPS_SECONDS: Final = (10, 60, 200, 400, 1_000)
"""Two of them outlive a hold: at the soak's pace one lasts about five minutes."""


def restarted(part: str, number: signal.Signals = signal.SIGKILL) -> Act:
    """A part is signalled; the local stack starts it again."""

    async def act(site: SoakSite, dice: random.Random) -> str:
        return await _restarted(site, part, number)

    return act


async def postgres_restarted(site: SoakSite, dice: random.Random) -> str:
    """Fast shutdown, immediate shutdown or the postmaster killed."""
    return await _restarted(site, "postgres", dice.choice([signal.SIGINT, signal.SIGQUIT, signal.SIGKILL]))


async def simulator_killed(site: SoakSite, dice: random.Random) -> str:
    return await _restarted(site, dice.choice(["comfyui", "credits"]), signal.SIGKILL)


async def process_paused(site: SoakSite, dice: random.Random) -> str:
    """SIGSTOP for a while: its connections stay open, and it answers nothing."""
    part, seconds = dice.choice(PARTS), dice.uniform(1, 6)
    async with site.parts.alone_with(part) as process:
        family = [process, *process.children(recursive=True)]
        try:
            for member in family:
                member.suspend()
            await asyncio.sleep(seconds)
        finally:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.resume()
        await site.parts.until_ready(part)
    return f"{part} for {seconds:.1f} s"


async def cpu_starved(site: SoakSite, dice: random.Random) -> str:
    """Twice as many busy processes as there are processors."""
    seconds = dice.uniform(2, 6)
    busy = f"import time; end = time.time() + {seconds}\nwhile time.time() < end: pass"
    count = 2 * (psutil.cpu_count() or 1)
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-c", busy) for _ in range(count)]
    for process in processes:
        await process.wait()
    return f"{count} busy processes for {seconds:.1f} s"


async def network_faults(site: SoakSite, dice: random.Random) -> str:
    """Answers are lost, late, errors, rate limits, a proxy's page or no JSON."""
    service = dice.choice([site.admin.comfyui, site.admin.credits])
    kinds, rate = dice.sample(NETWORK_FAULTS, dice.randint(1, 4)), dice.uniform(0.1, 0.6)
    return await _scheduled(service, dice, rate, kinds, seconds=dice.uniform(2, 6))


async def callback_faults(site: SoakSite, dice: random.Random) -> str:
    """Callbacks are withheld, repeated, out of order, late, broken or forged."""
    kinds, rate = dice.sample(CALLBACK_FAULTS, dice.randint(1, 4)), dice.uniform(0.3, 0.9)
    done = await _scheduled(site.admin.comfyui, dice, rate, kinds, seconds=dice.uniform(3, 8), route="callback")
    if dice.random() < 0.5:
        await insist(site.admin.comfyui.release_callbacks, "release of callbacks")
    return done


async def callback_flood(site: SoakSite, dice: random.Random) -> str:
    """Old callbacks with a valid signature, garbage and forgeries, for open tasks and for unknown ones."""
    runs = await _runs_of_some(site, dice, 5)
    bodies = [_callback(dice, run) for run in dice.choices(runs, k=FLOOD)] if runs else []
    gate = asyncio.Semaphore(FLOOD_AT_ONCE)
    answers: dict[int, int] = {}

    async def send(task_id: str, content: bytes, headers: dict[str, str]) -> None:
        async with gate:
            with contextlib.suppress(httpx.HTTPError):
                response = await site.gateway.post(f"/callbacks/comfyui/{task_id}", content=content, headers=headers)
                answers[response.status_code] = answers.get(response.status_code, 0) + 1

    webhook = Webhook(site.stack.callback_secret)
    await asyncio.gather(*(send(*_signed(webhook, dice, task_id, body)) for task_id, body in bodies))
    return f"{len(bodies)} callbacks, answers {dict(sorted(answers.items()))}"


async def clock_jumps(site: SoakSite, dice: random.Random) -> str:
    """The simulators' clocks move on: work is done at once, holds expire."""
    seconds = dice.choices(JUMPS_SECONDS, weights=[4, 4, 2, 1, 1])[0]
    await insist(lambda: site.admin.credits.advance(seconds), "clock of credits")
    await insist(lambda: site.admin.comfyui.advance(seconds), "clock of ComfyUI")
    return f"{seconds} s"


async def users_cancel(site: SoakSite, dice: random.Random) -> str:
    """By the gateway, by Temporal's own cancel, or both, at any moment of a task's life."""
    chosen = _some_open(site, dice, dice.randint(1, 3))
    for task_id in chosen:
        tenant_id = TENANTS[site.open_tasks.get(task_id, 0) % len(TENANTS)]
        way = dice.choice(["gateway", "temporal", "both"])
        with contextlib.suppress(*OUTSIDE_ERRORS):
            if way != "temporal":
                path = f"/api/v1/tasks/{task_id}/cancel"
                await site.gateway.post(path, json={"reason": "no longer wanted"}, headers=site.bearer(tenant_id))
            if way != "gateway":
                await site.client.get_workflow_handle(workflow_id_of(task_id)).cancel()
    return f"{len(chosen)} tasks"


async def run_terminated(site: SoakSite, dice: random.Random) -> str:
    """The run ends without its own clean-up, and the reconciler gives back what it left."""
    # Before its claim a run leaves nothing, and no other part knows it.
    query = "SELECT task_id FROM tasks WHERE task_id = ANY($1::text[]) AND ended_at IS NULL"
    chosen = [row["task_id"] for row in await site.table.rows(query, _some_open(site, dice, 1))]
    for task_id in chosen:
        with contextlib.suppress(*OUTSIDE_ERRORS):
            await site.client.get_workflow_handle(workflow_id_of(task_id)).terminate("soak")
    return f"{len(chosen)} tasks"


async def gpus_fail(site: SoakSite, dice: random.Random) -> str:
    """Jobs are preempted, fail with or without a retry, are forgotten, or stall for a while."""
    done, stalled = [], []
    for run in await _runs_of_some(site, dice, dice.randint(1, 4)):
        action, given = dice.choice(GPU_FAULTS)
        if action == "stall":
            stalled.append(run)  # also where its answer is lost: nothing else lets it go on
        if await _acted(site, run, action, **given):
            done.append(action)
    await asyncio.sleep(dice.uniform(1, 4))
    for run in stalled:
        await insist(partial(go_on, site, run), "a stalled job")
    return ", ".join(done) or "no job"


async def go_on(site: SoakSite, run: RunSeen) -> None:
    """Let a stalled job go on; one that is over, or was never stalled, stays as it is."""
    with contextlib.suppress(AdminRefused):
        await site.admin.comfyui.act(run.run_id, "resume")


async def balance_empty(site: SoakSite, dice: random.Random) -> str:
    """One tenant has no points for a while: holds are refused."""
    tenant_id = dice.choice(TENANTS)
    await site.set_balances(0, tenant_id)
    await asyncio.sleep(dice.uniform(1, 3))
    await site.set_balances(RICH, tenant_id)
    return tenant_id


KINDS: Final[dict[str, tuple[Act, float]]] = {
    "worker_killed": (restarted("worker"), 1.0),
    "worker_stopped": (restarted("worker", signal.SIGTERM), 0.5),
    "gateway_killed": (restarted("gateway"), 1.0),
    "temporal_killed": (restarted("temporal"), 1.0),
    "postgres_restarted": (postgres_restarted, 1.0),
    "simulator_killed": (simulator_killed, 1.5),
    "process_paused": (process_paused, 1.5),
    "cpu_starved": (cpu_starved, 0.5),
    "network_faults": (network_faults, 2.0),
    "callback_faults": (callback_faults, 2.0),
    "callback_flood": (callback_flood, 1.0),
    "clock_jumps": (clock_jumps, 1.5),
    "users_cancel": (users_cancel, 3.0),
    "run_terminated": (run_terminated, 0.5),
    "gpus_fail": (gpus_fail, 3.0),
    "balance_empty": (balance_empty, 0.5),
}
"""Kind → what it does, and how often it comes against the others."""
OUTAGES: Final = frozenset(
    {
        *("worker_killed", "worker_stopped", "gateway_killed", "temporal_killed", "postgres_restarted"),
        *("simulator_killed", "process_paused", "cpu_starved", "network_faults"),
    }
)


async def _restarted(site: SoakSite, part: str, number: signal.Signals) -> str:
    await site.parts.restart(part, number)
    return f"{part} by {number.name}"


async def _scheduled(
    service: ServiceAdmin,
    dice: random.Random,
    rate: float,
    kinds: list[FaultKind],
    *,
    seconds: float,
    route: str | None = None,
) -> str:
    seed = dice.getrandbits(32)
    await insist(lambda: service.schedule(seed, rate, kinds, route), "fault switchboard")
    await asyncio.sleep(seconds)
    await insist(lambda: _removed(service, seed), "fault switchboard")
    return f"{', '.join(kinds)} at {rate:.0%} for {seconds:.1f} s"


async def _removed(service: ServiceAdmin, seed: int) -> None:
    """Remove the faults of a schedule, those of an order whose answer was lost too: by their ids these would stay."""
    for fault in await service.faults():
        if fault.match.seed == seed:
            await service.remove_fault(fault)


def _some_open(site: SoakSite, dice: random.Random, count: int) -> list[str]:
    open_tasks = sorted(site.open_tasks)
    return dice.sample(open_tasks, min(count, len(open_tasks)))


async def _runs_of_some(site: SoakSite, dice: random.Random, count: int) -> list[RunSeen]:
    """The newest job of some open tasks; none while ComfyUI is away."""
    runs = []
    for task_id in _some_open(site, dice, count):
        with contextlib.suppress(*OUTSIDE_ERRORS):
            runs += (await site.admin.comfyui.jobs(task_id))[-1:]
    return runs


async def _acted(site: SoakSite, run: RunSeen, action: str, **given: Any) -> bool:
    try:
        await site.admin.comfyui.act(run.run_id, action, **given)
    except AdminRefused:
        return False  # it is over already
    except OUTSIDE_ERRORS:
        return False
    return True


def _callback(dice: random.Random, run: RunSeen) -> tuple[str, dict[str, Any] | None]:
    """The task that it goes to, and an old state of its job; None is garbage."""
    is_image = run.kind == "image"
    named = {"job_id": run.run_id, "job_status": "queued"} if is_image else {}
    named = named or {"training_id": run.run_id, "training_status": "queued"}
    old = {**named, "task_id": run.task_id, "sequence": 1, "occurred_at": datetime.now(UTC).isoformat()}
    draw = dice.random()
    if draw < 0.1:
        return "soak-unknown", {**old, "task_id": "soak-unknown"}
    return run.task_id, None if draw < 0.3 else old


def _signed(
    webhook: Webhook, dice: random.Random, task_id: str, body: dict[str, Any] | None
) -> tuple[str, bytes, dict[str, str]]:
    content = b"{no json" if body is None else json.dumps(body).encode()
    now, webhook_id = datetime.now(UTC), f"soak-{uuid.UUID(int=dice.getrandbits(128))}"
    signature = webhook.sign(webhook_id, now, content.decode())
    if dice.random() < 0.1:
        signature = "v1,Zm9yZ2Vk"
    named = {"webhook-id": webhook_id, "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}
    return task_id, content, {**named, "Content-Type": "application/json"}
