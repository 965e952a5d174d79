"""Injects faults at random intervals, overlapping where they last, and measures recovery."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from proof.site.waiting import OUTSIDE_ERRORS
from proof.soak.faults import KINDS, OUTAGES
from proof.soak.journal import FaultSeen, Journal
from proof.soak.plan import Plan
from proof.soak.site import SoakSite

ENOUGH_TASKS: Final = 20
"""With fewer open tasks silence may only mean waiting for ComfyUI: no recovery is measured."""


class RecoveryClock:
    """Measures from the end of the last of overlapping outages to the next event that any client receives."""

    def __init__(self, site: SoakSite, journal: Journal) -> None:
        self._site = site
        self._journal = journal
        self._outages = 0
        self._waiting: tuple[float, FaultSeen] | None = None

    def outage_began(self) -> None:
        self._outages += 1
        self._waiting = None

    def outage_over(self, fault: FaultSeen) -> None:
        self._outages -= 1
        if self._outages == 0 and len(self._site.open_tasks) >= ENOUGH_TASKS:
            self._waiting = (time.monotonic(), fault)

    def event_received(self) -> None:
        if self._waiting is not None:
            since, fault = self._waiting
            self._waiting = None
            self._journal.add_fault(fault.model_copy(update={"recovery_seconds": time.monotonic() - since}))


class FaultSchedule:
    """The faults of a plan, from the first one that the journal does not have."""

    def __init__(self, site: SoakSite, plan: Plan, journal: Journal, recovery: RecoveryClock) -> None:
        self._site = site
        self._plan = plan
        self._journal = journal
        self._recovery = recovery

    async def run(self, is_over: asyncio.Event) -> None:
        """Inject faults until `is_over`; returns when all of them have ended. Raises NotRepaired."""
        n = max(self._journal.faults, default=-1) + 1
        async with asyncio.TaskGroup() as running:
            while not await self._pause(n, is_over):
                running.create_task(self._inject(n))
                n += 1

    async def _pause(self, n: int, is_over: asyncio.Event) -> bool:
        seconds = self._plan.dice("pause", n).expovariate(1 / self._plan.mean_gap_seconds)
        try:
            async with asyncio.timeout(seconds):
                return await is_over.wait()
        except TimeoutError:
            return False

    async def _inject(self, n: int) -> None:
        dice = self._plan.dice("fault", n)
        [kind] = dice.choices(list(KINDS), weights=[weight for _, weight in KINDS.values()])
        act, _ = KINDS[kind]
        is_outage = kind in OUTAGES
        if is_outage:
            self._recovery.outage_began()
        began = time.time()
        try:
            detail = await act(self._site, dice)
        except OUTSIDE_ERRORS as error:
            detail = f"not completed: {type(error).__name__}: {error}"
        fault = FaultSeen(n=n, kind=kind, began=began, over=time.time(), detail=detail)
        self._journal.add_fault(fault)
        if is_outage:
            self._recovery.outage_over(fault)
