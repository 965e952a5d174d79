"""The details of a run in the Temporal UI."""

from __future__ import annotations

from datetime import UTC, datetime

from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.task_store import PriceToConfirm, TaskState
from comfyui_temporal.contracts.tasks import CreditsSummary, TaskStatus
from workflows.details import current_details, escaped

UNTIL = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def waiting_row(status: TaskStatus, what: str, until: datetime | None) -> str:
    details = current_details(TaskState(version=1, status=status), waits_for=what, until=until, last_news_at=None)
    return next(line for line in details.splitlines() if line.startswith("- **waits for:**"))


def test_an_open_task_says_what_it_waits_for_and_until_when() -> None:
    row = waiting_row(TaskStatus.RUNNING, "ComfyUI", UNTIL)

    assert row == "- **waits for:** ComfyUI, until 2026&#45;01&#45;02 03:04:05 UTC"


def test_without_a_limit_none_is_named() -> None:
    assert waiting_row(TaskStatus.RUNNING, "credits to be settled", None) == "- **waits for:** credits to be settled"


def test_a_task_that_has_ended_waits_for_nothing() -> None:
    assert waiting_row(TaskStatus.COMPLETED, "credits to be settled", None) == "- **waits for:** &#45;"


def test_the_details_show_what_an_operator_needs_first() -> None:
    state = TaskState(
        version=1,
        status=TaskStatus.RUNNING,
        stage="training",
        progress=41.6,
        job_id="tr1",
        attempts=2,
        credits=CreditsSummary(estimated=120, held=160, charged=100, returned=60),
        confirmation=PriceToConfirm(estimated_cost=180, confirm_by=UNTIL),
        error=ErrorDetails(code="node_error", message="node 4", retryable=False),
    )

    details = current_details(state, waits_for="", until=None, last_news_at=UNTIL)

    assert details.splitlines() == [
        "- **status:** running",
        "- **stage:** training 42 %",
        "- **job:** tr1 &#40;attempt 2&#41;",
        "- **credits:** estimated 120, held 160, charged 100, returned 60",
        "- **waits for:** &#45;",
        "- **last update from ComfyUI:** 2026&#45;01&#45;02 03:04:05 UTC",
        "- **to be confirmed:** 180 points, see confirm&#95;price",
        "- **last error:** node&#95;error: node 4",
    ]


def test_before_the_first_job_update_the_details_show_none() -> None:
    state = TaskState(version=1, status=TaskStatus.QUEUED)

    details = current_details(state, waits_for="", until=None, last_news_at=None)

    assert "- **stage:** &#45; 0 %" in details
    assert "- **job:** &#45; &#40;attempt 0&#41;" in details
    assert "- **last update from ComfyUI:** &#45;" in details
    assert "to be confirmed" not in details
    assert "last error" not in details


def test_text_from_outside_is_no_markup_and_no_second_line() -> None:
    assert escaped("a | b\n[x](y)") == "a &#124; b &#91;x&#93;&#40;y&#41;"


def test_unknown_points_are_shown_as_unknown() -> None:
    state = TaskState(version=1, status=TaskStatus.COMPLETED, credits=CreditsSummary(held=24))
    state.credits.charged = state.credits.returned = None

    details = current_details(state, waits_for="", until=None, last_news_at=None)

    assert "- **credits:** estimated 0, held 24, charged unknown, returned unknown" in details
