"""Lets faults happen one after another, at random pauses, side by side where they last; measures recovery."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from proof.soak.faults import KINDS, OUTAGES
from proof.soak.journal import FaultSeen, Journal
from proof.soak.plan import Plan
from proof.soak.site import OUTSIDE_ERRORS, Site

ENOUGH_TASKS: Final = 20
"""With fewer open tasks silence may be nothing but waiting for ComfyUI: no recovery is measured."""


class RecoveryClock:
    """From the instant the last of overlapping outages is over to the next event that any client is told."""

    def __init__(self, site: Site, journal: Journal) -> None:
        self._site = site
        self._journal = journal
        self._going_on = 0
        self._waiting: tuple[float, FaultSeen] | None = None

    def outage_began(self) -> None:
        self._going_on += 1
        self._waiting = None

    def outage_over(self, fault: FaultSeen) -> None:
        self._going_on -= 1
        if self._going_on == 0 and len(self._site.open_tasks) >= ENOUGH_TASKS:
            self._waiting = (time.monotonic(), fault)

    def event_told(self) -> None:
        if self._waiting is not None:
            since, fault = self._waiting
            self._waiting = None
            self._journal.add_fault(fault.model_copy(update={"recovery_seconds": time.monotonic() - since}))


class Weather:
    """The faults of a plan, from the first that the journal does not know on."""

    def __init__(self, site: Site, plan: Plan, journal: Journal, recovery: RecoveryClock) -> None:
        self._site = site
        self._plan = plan
        self._journal = journal
        self._recovery = recovery

    async def run(self, is_over: asyncio.Event) -> None:
        """Until `is_over`; returns when all faults are mended. Raises Unmended."""
        n = max(self._journal.faults, default=-1) + 1
        async with asyncio.TaskGroup() as going_on:
            while not await self._pause(n, is_over):
                going_on.create_task(self._strike(n))
                n += 1

    async def _pause(self, n: int, is_over: asyncio.Event) -> bool:
        seconds = self._plan.dice("pause", n).expovariate(1 / self._plan.mean_gap_seconds)
        try:
            async with asyncio.timeout(seconds):
                return await is_over.wait()
        except TimeoutError:
            return False

    async def _strike(self, n: int) -> None:
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
            detail = f"not carried through: {type(error).__name__}: {error}"
        fault = FaultSeen(n=n, kind=kind, began=began, over=time.time(), detail=detail)
        self._journal.add_fault(fault)
        if is_outage:
            self._recovery.outage_over(fault)
