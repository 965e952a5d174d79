"""The wish to end a task early: the first one counts, and it is decided once."""

from __future__ import annotations

import asyncio

import pytest

from workflows.failures import TaskStopped
from workflows.stop import Stop


def test_the_first_wish_decides_what_the_run_ends_as() -> None:
    stop = Stop()
    stop.ask("no longer wanted")
    stop.ask("cancelled by an operator", by_temporal=True)

    assert (stop.reason, stop.by_temporal) == ("no longer wanted", False)


def test_a_wish_that_comes_too_late_is_no_wish() -> None:
    stop = Stop()
    stop.close()
    stop.ask("no longer wanted", by_temporal=True)

    stop.obey()
    assert (stop.requested, stop.by_temporal, stop.outcome) == (False, False, "too_late")


def test_what_was_obeyed_stays_accepted() -> None:
    stop = Stop()
    stop.ask("no longer wanted")
    with pytest.raises(TaskStopped, match="no longer wanted"):
        stop.obey()

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
            stop.obey()
    else:
        stop.close()

    assert (await answer).outcome == ("accepted" if is_in_time else "too_late")
