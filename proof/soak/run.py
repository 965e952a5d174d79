"""One session of a soak: tasks, faults and recorder in parallel, then the verdict."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

from local_stack.folder import RunFolder
from proof.simulators.admin_wire import Fault
from proof.simulators.credits_profile import FIELD, PROFILES
from proof.site.parts import PARTS
from proof.site.recorder import Received, Recorder
from proof.site.waiting import insist
from proof.soak.fault_schedule import FaultSchedule, RecoveryClock
from proof.soak.faults import RICH, go_on
from proof.soak.journal import Journal
from proof.soak.plan import TENANTS, Plan
from proof.soak.site import SoakSite
from proof.soak.verdict import as_json, judge_all, table
from proof.soak.workload import Workload

PROGRESS_SECONDS: Final = 10.0
STREAMS_SECONDS: Final = 60.0
TASKS_A_STREAM: Final = 5
IMAGE_GPUS: Final = 48
TRAINING_GPUS: Final = 12
FAILING_COMMITS: Final = 0.05


async def soak(folder: RunFolder, plan: Plan, journal: Journal) -> bool:
    """Go on with the plan on the stack in `folder`, print progress and the table. Whether all is as it must be.

    Raises NotRepaired.
    """
    stack = folder.description()
    assert stack is not None, "the stack has just become ready"
    async with SoakSite.connected(folder, stack, PROFILES[plan.profile]) as site:
        await _set_up(site, plan)
        recovery = RecoveryClock(site, journal)
        recorder = Recorder(
            site,
            tasks_a_stream=TASKS_A_STREAM,
            on_event=recovery.event_received,
            on_end=lambda received: journal.add_received(_seqs(received)),
        )
        workload = Workload(site, plan, recorder, journal.received)
        began = time.monotonic()
        try:
            await _run_through(workload, FaultSchedule(site, plan, journal, recovery), recorder, journal)
        finally:
            journal.add_seconds(time.monotonic() - began)
        await _repaired(site)
        await recorder.finish(STREAMS_SECONDS)
        print("All tasks are over; judging ledger, jobs, events and histories …", flush=True)
        verdict = await judge_all(site, plan, journal)
    print(table(plan, journal, verdict), flush=True)
    (folder.path.parent / "result.json").write_text(as_json(plan, journal, verdict))
    return verdict.is_good


def _seqs(received: Received) -> dict[str, list[int]]:
    return {task_id: [event.seq for event in events] for task_id, events in received.items()}


async def _run_through(workload: Workload, faults: FaultSchedule, recorder: Recorder, journal: Journal) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(recorder.run(workload.all_started))
        group.create_task(faults.run(workload.faults_over))
        showing = group.create_task(_show(workload, journal))
        await workload.run()
        showing.cancel()


async def _set_up(site: SoakSite, plan: Plan) -> None:
    """Enough GPUs and points that both run short only by a fault; and the profile's permanent faults."""
    await insist(lambda: site.admin.comfyui.set_gpus("rtx4090", IMAGE_GPUS), "GPUs")
    await insist(lambda: site.admin.comfyui.set_gpus("a100", TRAINING_GPUS), "GPUs")
    await _repaired(site)
    if plan.profile == FIELD.name:
        await insist(lambda: _acting_and_failing(site, plan.seed), "fault switchboard")


async def _acting_and_failing(site: SoakSite, seed: int) -> Fault:
    """Some commits act and answer 500 (contract §4, field)."""
    return await site.admin.credits.fault(
        "error", route="commit", status=500, when="after", probability=FAILING_COMMITS, seed=seed, times=None
    )


async def _none_stalled(site: SoakSite) -> None:
    for run in await site.admin.comfyui.jobs():
        if not run.is_over:
            await go_on(site, run)


async def _repaired(site: SoakSite) -> None:
    """No fault is set, nothing is withheld, no job is stalled, every account is full, every part is ready."""
    for part in PARTS:
        await site.parts.until_ready(part)
    await insist(site.admin.remove_faults, "fault switchboard")
    await insist(site.admin.comfyui.release_callbacks, "release of callbacks")
    await insist(lambda: _none_stalled(site), "stalled jobs")
    for tenant_id in TENANTS:
        await site.set_balances(RICH, tenant_id)


async def _show(workload: Workload, journal: Journal) -> None:
    began, ended_before = time.monotonic(), workload.ended
    total = workload.plan.tasks
    with suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            rate = (workload.ended - ended_before) / (time.monotonic() - began)
            left = f", about {(total - workload.ended) / rate / 60:.0f} min left" if rate else ""
            print(
                f"{workload.ended:>6} of {total} ended, {workload.open_tasks} open, {rate:.1f} a second, "
                f"{len(journal.faults)} faults{left}",
                flush=True,
            )
