"""How long the end of a task's row is waited for: another worker is writing it (contract §4)."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow

from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.task_store import RowSeen, TaskRow
from tests.workflows.test_ledger_search import NOON, Looks
from workflows.outside_call import OutsideCall
from workflows.row_look import END_WITHIN, RowLook


class Ending(Looks):
    """A task whose row ends after `seconds`; None: never."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float | None) -> None:
        super().__init__(patch)
        patch.setattr(workflow, "info", lambda: SimpleNamespace(first_execution_run_id="r"))
        self.ends_at = None if seconds is None else NOON + timedelta(seconds=seconds)

    async def read_store(self, *_: Any, **__: Any) -> RowSeen:
        is_over = self.ends_at is not None and self.now >= self.ends_at
        row = cast(TaskRow, SimpleNamespace(ended_at=self.ends_at if is_over else None))
        return RowSeen.model_construct(life=EarlierLife(), row=row, told_points=0, life_seconds=None)


@pytest.mark.parametrize(("seconds", "waited"), [(0, 0), (5, 7), (590, 601)])
async def test_a_row_that_is_about_to_end_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, seconds: float, waited: float
) -> None:
    ending = Ending(monkeypatch, seconds)
    look = RowLook(cast(OutsideCall, ending))
    await look.once()
    row = await look.ended()
    assert row is not None
    assert row.ended_at == NOON + timedelta(seconds=seconds)
    assert ending.now == NOON + timedelta(seconds=waited)


async def test_a_row_that_does_not_end_is_waited_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its give-back may have died."""
    ending = Ending(monkeypatch, None)
    look = RowLook(cast(OutsideCall, ending))
    await look.once()
    assert await look.ended() is None
    assert END_WITHIN <= ending.now - NOON < END_WITHIN + timedelta(seconds=30)
