"""The saga: what was begun is given back, all of it side by side, each until it lands.

Each mechanism notes what it is about to do before it does it, and its undo bears that it never happened. One party's
outage never keeps another's undo; a refusal inside an undo is an answer and stops none of the rest (pitfall 38).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from temporalio import workflow

UndoStep = Callable[[str], Awaitable[None]]


class Undo:
    """The undos of one task, pushed before their dos."""

    def __init__(self) -> None:
        self._steps: dict[str, UndoStep] = {}

    def push(self, name: str, step: UndoStep) -> None:
        """Register an undo; pushing the same name again changes nothing."""
        self._steps.setdefault(name, step)

    async def all(self, reason: str) -> None:
        """Run every undo at once and wait for the last.

        An exception is a bug: it surfaces after the others have landed.
        """
        tasks = [asyncio.create_task(_run(step, reason), name=name) for name, step in self._steps.items()]
        if tasks:
            await workflow.wait(tasks)
        for task in tasks:
            task.result()


async def _run(step: UndoStep, reason: str) -> None:
    await step(reason)
