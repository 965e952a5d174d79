"""A request to end a task early: the first one counts, and it is decided once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from temporalio import workflow
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.testing import WorkflowEnvironment

from tests.workflows.probe import probed
from workflows.failures import TaskStopped
from workflows.stop import Stop


def test_the_first_request_decides_how_the_run_ends() -> None:
    stop = Stop()
    stop.ask("no longer wanted")
    stop.ask("cancelled by an operator", by_temporal=True)

    assert (stop.reason, stop.by_temporal) == ("no longer wanted", False)


def test_a_request_that_comes_too_late_changes_nothing() -> None:
    stop = Stop()
    stop.close()
    stop.ask("no longer wanted", by_temporal=True)

    stop.raise_if_requested()
    assert (stop.requested, stop.by_temporal, stop.outcome) == (False, False, "too_late")


def test_an_accepted_request_stays_accepted() -> None:
    stop = Stop()
    stop.ask("no longer wanted")
    with pytest.raises(TaskStopped, match="no longer wanted"):
        stop.raise_if_requested()

    stop.close()
    stop.ask("once more", by_temporal=True)

    assert (stop.reason, stop.by_temporal, stop.outcome) == ("no longer wanted", False, "accepted")


@pytest.mark.parametrize("is_in_time", [True, False])
async def test_the_update_is_answered_once_it_is_decided(is_in_time: bool) -> None:
    stop = Stop()
    answer = asyncio.create_task(stop.cancel_task("no longer wanted"))
    await asyncio.sleep(0)
    assert not answer.done()

    if is_in_time:
        with pytest.raises(TaskStopped):
            stop.raise_if_requested()
    else:
        stop.close()

    assert (await answer).outcome == ("accepted" if is_in_time else "too_late")


# As a run


class Bug(Exception):
    """An unexpected error."""


async def cancel(handle: WorkflowHandle[Any, Any]) -> None:
    await handle.cancel(reason="by hand")


async def writer() -> None:
    """It writes for as long as the run lives."""
    await asyncio.Event().wait()


async def test_a_cancellation_by_temporal_is_a_request_with_its_reason(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> list[Any]:
        stop = Stop()

        async def flow() -> list[Any]:
            await workflow.wait_condition(lambda: stop.requested)
            return [stop.reason, stop.by_temporal]

        return await stop.uninterrupted(flow(), writer())

    assert (await probed(temporal_env, lines, cancel)).result == ["by hand", True]


@pytest.mark.parametrize("ends", ["cancelled", "delivered", "committed by another caller"])
async def test_only_a_cancellation_that_decides_how_the_task_ends_ends_the_run_canceled(
    temporal_env: WorkflowEnvironment, ends: str
) -> None:
    async def lines() -> str:
        stop = Stop()

        async def flow() -> str:
            await workflow.wait_condition(lambda: stop.requested)
            if ends == "delivered":
                stop.close()
                return ends
            with contextlib.suppress(TaskStopped):
                stop.raise_if_requested()
            if ends == "committed by another caller":
                stop.overrule()
            return ends

        return await stop.uninterrupted(flow(), writer())

    if ends != "cancelled":
        assert (await probed(temporal_env, lines, cancel)).result == ends
        return
    with pytest.raises(WorkflowFailureError) as failed:
        await probed(temporal_env, lines, cancel)
    assert isinstance(failed.value.cause, CancelledError)


async def test_a_stop_by_update_ends_with_the_flows_own_result(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> str:
        stop = Stop()

        async def flow() -> str:
            stop.ask("no longer wanted")
            with contextlib.suppress(TaskStopped):
                stop.raise_if_requested()
            return "given back"

        return await stop.uninterrupted(flow(), writer())

    assert (await probed(temporal_env, lines)).result == "given back"


@pytest.mark.parametrize("of", ["flow", "writer"])
async def test_a_bug_in_flow_or_writer_surfaces(temporal_env: WorkflowEnvironment, of: str) -> None:
    async def lines() -> None:
        async def broken() -> None:
            raise Bug(f"in the {of}")

        flow, writing = (broken(), writer()) if of == "flow" else (writer(), broken())
        await Stop().uninterrupted(flow, writing)

    with pytest.raises(WorkflowFailureError) as failed:
        await probed(temporal_env, lines)
    assert isinstance(failed.value.cause, ApplicationError)
    assert failed.value.cause.message == f"in the {of}"
