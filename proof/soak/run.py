"""One session of a soak: tasks, faults and recorder side by side, then the verdict."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

from local_stack.folder import RunFolder
from proof.simulators.admin_wire import Fault
from proof.simulators.credits_profile import FIELD
from proof.soak.faults import RICH
from proof.soak.journal import Journal
from proof.soak.plan import USERS, Plan
from proof.soak.recorder import Recorder
from proof.soak.site import PARTS, Site, insist, opened_site
from proof.soak.verdict import as_json, judge, table
from proof.soak.weather import RecoveryClock, Weather
from proof.soak.workload import Workload

PROGRESS_SECONDS: Final = 10.0
STREAMS_SECONDS: Final = 60.0
IMAGE_GPUS: Final = 48
TRAINING_GPUS: Final = 12
FAILING_COMMITS: Final = 0.05


async def soak(folder: RunFolder, plan: Plan, journal: Journal) -> bool:
    """Go on with the plan on the stack in `folder`, print progress and the table. Whether all is as it must be.

    Raises Unmended.
    """
    stack = folder.description()
    assert stack is not None, "the stack has just become ready"
    async with opened_site(folder, stack) as site:
        await _furnish(site, plan)
        recovery = RecoveryClock(site, journal)
        recorder = Recorder(site, journal, recovery.event_told)
        workload = Workload(site, plan, recorder)
        began = time.monotonic()
        try:
            await _run_through(workload, Weather(site, plan, journal, recovery), recorder, journal)
        finally:
            journal.add_seconds(time.monotonic() - began)
        await _mended(site)
        await recorder.finish(STREAMS_SECONDS)
        print("All over; looking into books, jobs, events and histories …", flush=True)
        verdict = await judge(site, plan, journal)
    print(table(plan, journal, verdict), flush=True)
    (folder.path.parent / "result.json").write_text(as_json(plan, journal, verdict))
    return verdict.is_good


async def _run_through(workload: Workload, weather: Weather, recorder: Recorder, journal: Journal) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(recorder.run(workload.all_started))
        group.create_task(weather.run(workload.faults_over))
        showing = group.create_task(_show(workload, journal))
        await workload.run()
        showing.cancel()


async def _furnish(site: Site, plan: Plan) -> None:
    """Enough GPUs and points that both run short only where a fault says so; and what the service is like."""
    await insist(lambda: site.admin.comfyui.set_gpus("rtx4090", IMAGE_GPUS), "GPUs")
    await insist(lambda: site.admin.comfyui.set_gpus("a100", TRAINING_GPUS), "GPUs")
    await _mended(site)
    if plan.profile == FIELD.name:
        await insist(lambda: _acting_and_failing(site, plan.seed), "fault switchboard")


async def _acting_and_failing(site: Site, seed: int) -> Fault:
    """Now and then a commit acts and answers 500, all the while (contract §4, field)."""
    return await site.admin.credits.fault(
        "error", route="commit", status=500, when="after", probability=FAILING_COMMITS, seed=seed, times=None
    )


async def _mended(site: Site) -> None:
    """No fault stands, nothing is withheld, every account is full, every part is there."""
    for part in PARTS:
        await site.until_back(part)
    await insist(site.admin.remove_faults, "fault switchboard")
    await insist(site.admin.comfyui.release_callbacks, "release of callbacks")
    for tenant_id, user_id in USERS.items():
        await insist(lambda t=tenant_id, u=user_id: site.admin.credits.set_balance(RICH, t, u), "accounts")  # type: ignore[misc]


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
