"""What happened, as readable lines. It costs almost nothing while it is off."""

from __future__ import annotations

from typing import Any

from temporalio.api.common.v1 import Payload

from proof.simulation.sdk import WorkflowActivationJob, WorkflowCommand
from proof.simulation.timeline import START, Timeline


class Trace:
    """Lines of one schedule, each with the seconds since its beginning; kept only when they are wanted."""

    def __init__(self, timeline: Timeline, *, is_wanted: bool) -> None:
        self._timeline = timeline
        self.is_wanted = is_wanted
        self.lines: list[str] = []

    def __call__(self, line: str, *values: Any) -> None:
        """A callable value is called only when the line is wanted."""
        if self.is_wanted:
            values = tuple(value() if callable(value) else value for value in values)
            self.lines.append(f"{self._timeline.now - START:10.3f} {line % values if values else line}"[:400])


def job_text(job: WorkflowActivationJob) -> str:
    kind = job.WhichOneof("variant")
    if kind == "signal_workflow":
        return "signal " + ", ".join(_shown(payload) for payload in job.signal_workflow.input)
    if kind == "do_update":
        return f"update {job.do_update.name} ({job.do_update.id})"
    if kind == "resolve_activity":
        return f"result of #{job.resolve_activity.seq}: {job.resolve_activity.result.WhichOneof('status')}"
    if kind == "fire_timer":
        return f"timer {job.fire_timer.seq}"
    return str(kind)


def _shown(payload: Payload) -> str:
    return payload.data[:160].decode("utf-8", "replace")


def command_text(command: WorkflowCommand) -> str:
    kind = command.WhichOneof("variant")
    if kind in ("schedule_activity", "schedule_local_activity"):
        scheduled = getattr(command, kind)
        return f"{kind} #{scheduled.seq} {scheduled.activity_type} {_shown(scheduled.arguments[0])}"
    if kind == "fail_workflow_execution":
        return f"fail {command.fail_workflow_execution.failure.message}"
    if kind == "complete_workflow_execution":
        return f"complete {_shown(command.complete_workflow_execution.result)}"
    return str(command).replace("\n", " ")[:120]
