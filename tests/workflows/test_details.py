"""What a run says of itself in the Temporal UI."""

from __future__ import annotations

from datetime import UTC, datetime

from contracts.task_store import TaskState
from contracts.tasks import TaskStatus
from workflows.details import current_details

UNTIL = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def waiting_row(status: TaskStatus, what: str, until: datetime | None) -> str:
    details = current_details(TaskState(version=1, status=status), waits_for=what, until=until, last_news_at=None)
    return next(line for line in details.splitlines() if line.startswith("| waits for"))


def test_an_open_task_says_what_it_waits_for_and_until_when() -> None:
    row = waiting_row(TaskStatus.RUNNING, "ComfyUI", UNTIL)

    assert row == "| waits for | ComfyUI, until 2026&#45;01&#45;02 03:04:05 UTC |"


def test_without_a_limit_none_is_named() -> None:
    assert waiting_row(TaskStatus.RUNNING, "credits to be settled", None) == "| waits for | credits to be settled |"


def test_a_task_that_has_ended_waits_for_nothing() -> None:
    assert waiting_row(TaskStatus.COMPLETED, "credits to be settled", None) == "| waits for | &#45; |"
