"""What a person reads of a task: what is not known is said to be unknown, and how old figures are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from comfyui_temporal.client.models import TaskDetails, TaskSummary
from comfyui_temporal.command_line.reports import credit_lines, details_lines
from comfyui_temporal.contracts.credits import LedgerEntry
from comfyui_temporal.contracts.tasks import (
    CreditsSummary,
    ImageResult,
    SettlementState,
    TaskStatus,
    TrainingProgress,
)
from doctor.books import _check_task
from doctor.finding import Verdict

UNKNOWN = CreditsSummary(held=24, charged=None, returned=None, settlement=SettlementState.UNKNOWN)


def test_an_unknown_settlement_names_no_points_that_were_charged() -> None:
    lines = dict(credit_lines(UNKNOWN))
    assert lines["points"] == "estimated 0, held 24"
    assert lines["settlement"].startswith("unknown")


def test_a_known_settlement_is_shown_in_one_line() -> None:
    settled = CreditsSummary(held=24, charged=20, returned=4, settlement=SettlementState.SETTLED)
    assert dict(credit_lines(settled)) == {"points": "estimated 0, held 24, charged 20, returned 4"}


def test_the_result_of_an_earlier_release_counts_as_settled() -> None:
    """Release 0.1.0 reported no `settlement`."""
    old = {"task_id": "t", "status": TaskStatus.COMPLETED, "credits": {"held": 24, "charged": 20, "returned": 4}}
    credits = ImageResult.model_validate(old).credits
    assert (credits.settlement, credits.charged) == (SettlementState.SETTLED, 20)


def test_the_books_of_a_ledger_by_reason_are_no_sum() -> None:
    """−24 for the hold and −24 for its commit: 24 were charged."""
    entries = [
        LedgerEntry(ledger_id=reason, task_id="t", change=-24, reason=reason) for reason in ("commit", "pre_deduct")
    ]
    right = _check_task("t", entries, CreditsSummary(held=24, charged=24, settlement=SettlementState.SETTLED))
    assert right.verdict is Verdict.OK
    assert _check_task("t", entries, UNKNOWN).verdict is Verdict.WRONG


@pytest.mark.parametrize(("hours", "shown"), [(2, "2 h 0 min ago"), (None, "")], ids=["reported", "not yet"])
def test_show_says_how_old_the_figures_are(hours: int | None, shown: str) -> None:
    as_of = datetime.now(UTC) - timedelta(hours=hours) if hours else None
    progress = TrainingProgress(task_id="t", status=TaskStatus.RUNNING, stage="processing", progress=42.0, as_of=as_of)
    details = TaskDetails(task=TaskSummary(task_id="t", workflow_id="task-t"), progress=progress)
    lines = dict(details_lines(details))
    assert (lines["stage"], lines["as of"]) == ("processing, 42 %", shown)
