"""The worker's log tells a task's story: what happened and why, never a prompt, and no line for each percent."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from structlog.testing import capture_logs

from activities.task_story import TaskStory
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskState, TaskWrite
from comfyui_temporal.contracts.tasks import TaskStatus

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PREEMPTED = ErrorDetails(code="gpu_preempted", message="a lighthouse at dusk was too much", retryable=True)


def fact(key: str, status: str = "running", **fields: Any) -> Fact:
    values = {"key": key, "event": EventType.RUNNING, "ts": NOW, "attempt": 1, "status": TaskStatus(status), **fields}
    return Fact.model_validate(values)


def told(*facts: Fact, **state: Any) -> list[dict[str, Any]]:
    write = TaskWrite(
        task_id="t",
        first_execution_run_id="r",
        state=TaskState(version=1, status=TaskStatus.RUNNING, **state),
        facts=list(facts),
    )
    with capture_logs() as lines:
        TaskStory().written(write)
    return [dict(line) for line in lines]


def test_each_step_is_one_line_at_info() -> None:
    lines = told(
        fact("held:1", credits_delta=-24, event=EventType.CREDITS),
        fact("job-1:1", stage="processing", progress=0, sequence=1),
        fact("job-1:2", stage="processing", progress=50, sequence=2),
        fact("retry:1"),
        fact("job-2:9", stage="delivery", progress=100, sequence=9),
        fact("settled", event=EventType.CREDITS, credits_delta=0),
        fact("end", "failed", event=EventType.FAILED, is_end=True, error=PREEMPTED),
        error=PREEMPTED,
    )
    assert [line["event"] for line in lines if line["log_level"] == "info"] == [
        *("task_held", "task_runs", "task_retried", "task_delivered", "task_settled", "task_failed")
    ]
    [progress] = [line for line in lines if line["log_level"] == "debug"]
    assert progress["progress"] == 50
    by_event = {line["event"]: line for line in lines}
    assert by_event["task_held"]["points"] == -24
    assert by_event["task_retried"]["code"] == by_event["task_failed"]["code"] == "gpu_preempted"
    assert "lighthouse" not in str(lines), "no text from outside"
