"""The saga: everything that was begun is undone, in parallel, and each undo is retried until it succeeds.

Each mechanism records an action before it happens, and its undo must tolerate that the action never happened. One
party's outage never delays another's undo. A refusal inside an undo is an answer and stops no other undo (pitfall 38).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from temporalio import workflow

UndoStep = Callable[[str], Awaitable[None]]


class Undo:
    """The undos of one task, each pushed before its action."""

    def __init__(self) -> None:
        self._steps: dict[str, UndoStep] = {}

    def push(self, name: str, step: UndoStep) -> None:
        """Register an undo; pushing the same name again changes nothing."""
        self._steps.setdefault(name, step)

    async def all(self, reason: str) -> None:
        """Run all undos at the same time and wait for the last one.

        An exception is a bug. It is raised after the others have ended.
        """
        tasks = [asyncio.create_task(_run(step, reason), name=name) for name, step in self._steps.items()]
        if tasks:
            await workflow.wait(tasks)
        for task in tasks:
            task.result()


async def _run(step: UndoStep, reason: str) -> None:
    await step(reason)
