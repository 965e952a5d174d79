"""The saga: all undos run concurrently, and none hides another's bug."""

from __future__ import annotations

import asyncio

import pytest
from temporalio.client import WorkflowFailureError
from temporalio.testing import WorkflowEnvironment

from tests.workflows.probe import probed
from workflows.undo import Undo


class Bug(Exception):
    """An unexpected error."""


async def test_all_are_undone_side_by_side_and_each_once(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> list[str]:
        undo, done, is_job_cancelled = Undo(), list[str](), asyncio.Event()

        async def cancel_hold(reason: str) -> None:
            await is_job_cancelled.wait()  # an order of one after the other would never end
            done.append(f"hold: {reason}")

        async def cancel_job(reason: str) -> None:
            done.append(f"job: {reason}")
            is_job_cancelled.set()

        async def another(reason: str) -> None:
            done.append("pushed twice")

        undo.push("hold", cancel_hold)
        undo.push("job", cancel_job)
        undo.push("job", another)
        await undo.all("cancelled")
        return done

    assert (await probed(temporal_env, lines)).result == ["job: cancelled", "hold: cancelled"]


async def test_nothing_was_begun_and_nothing_is_undone(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> None:
        await Undo().all("cancelled")

    assert (await probed(temporal_env, lines)).result is None


async def test_a_bug_in_one_surfaces_after_the_others_have_landed(temporal_env: WorkflowEnvironment) -> None:
    landed: list[str] = []

    async def lines() -> None:
        async def broken(reason: str) -> None:
            raise Bug("the first one")

        async def slow(reason: str) -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            landed.append(reason)

        undo = Undo()
        undo.push("job", broken)
        undo.push("hold", slow)
        await undo.all("cancelled")

    with pytest.raises(WorkflowFailureError) as failed:
        await probed(temporal_env, lines)
    assert "the first one" in str(failed.value.cause)
    assert landed == ["cancelled"]
