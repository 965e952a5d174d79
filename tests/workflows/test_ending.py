"""What a task's end publishes where an earlier life has published points of its own (contract §4, earlier lives)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow

from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.task_store import RowSeen
from tests.workflows.holds_in_memory import Parties
from workflows.attempts import Attempts
from workflows.ending import Outcome, TaskEnding
from workflows.failures import TaskStopped
from workflows.forgotten_jobs import ForgottenJobs
from workflows.job_watch import JobWatch
from workflows.outside_call import OutsideCall
from workflows.row_look import RowLook
from workflows.settlement import Settlement
from workflows.stop import Stop
from workflows.task_record import TaskRecord
from workflows.undo import Undo


class Ended(Parties):
    """A task that ends after a reset. Its row's events hold `told_points`."""

    def __init__(self, patch: pytest.MonkeyPatch, told_points: int) -> None:
        super().__init__(patch)
        self.earlier.add(EarlierLife(lives=1))
        self._told_points = told_points
        patch.setattr(workflow, "all_handlers_finished", lambda: True)

    async def read_store(self, *_: Any, **__: Any) -> RowSeen:
        seen = await super().read_store()
        seen.row = cast(Any, SimpleNamespace(ended_at=None, job_ids=[], hold_ids=[]))
        seen.told_points = self._told_points
        return seen

    def ending(self, charged: int) -> TaskEnding:
        async def nothing(*_: Any) -> None:
            pass

        for name in ("failed", "end", "completed", "delivered"):
            setattr(self.records, name, lambda *_, **__: None)
        cast(Any, self.records).all_written = nothing
        outside, record = cast(OutsideCall, self), cast(TaskRecord, self.records)
        return TaskEnding(
            outside,
            record,
            Stop(),
            cast(JobWatch, None),
            self.credit_hold(HoldState(charged=charged)),
            cast(Attempts, SimpleNamespace(all_old_cancelled=nothing)),
            cast(ForgottenJobs, SimpleNamespace(cancel=nothing, learn_and_cancel=nothing)),
            RowLook(outside),
            cast(Settlement, None),
            Undo(),
            nothing,
        )


@pytest.mark.parametrize(
    ("told", "charged"), [(-24, 0), (0, 24), (-24, 36), (-24, 24)], ids=["came back", "charged", "dearer", "the same"]
)
async def test_the_points_of_all_events_add_up_to_what_was_charged_after_a_reset(
    monkeypatch: pytest.MonkeyPatch, told: int, charged: int
) -> None:
    """A caller who adds them up would else see points gone that came back, or work that nobody paid."""
    task = Ended(monkeypatch, told)
    outcome = Outcome() if charged else Outcome(end=TaskStopped(""))
    await task.ending(charged).publish(outcome)
    assert told + task.records.points == -charged
