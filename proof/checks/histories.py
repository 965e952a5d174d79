"""Temporal's histories (invariant 6): no workflow task failed, and each step says what it is for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

from comfyui_temporal.plugin import TasksPlugin
from proof.checks.finished_task import Exempt, Findings, Rule

BENIGN: Final = frozenset(
    {
        # The server's own answers to a message that came while a workflow task was being completed.
        WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_COMMAND,
        WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_UPDATE,
        # More signals came in one workflow task than the server keeps aside.
        WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND,
    }
)
BY_A_RESET: Final = WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW
SUMMARISED: Final = frozenset(
    {
        EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED,
        EventType.EVENT_TYPE_TIMER_STARTED,
        EventType.EVENT_TYPE_MARKER_RECORDED,
    }
)
"""Events that have a summary; a marker is an activity that ran locally."""
PATCH_MARKER: Final = "core_patch"
"""... or the name of a patch that this run uses (docs/versioning.md)."""
MAY_BE_LEFT: Final = frozenset({"write", "get_job", "get_training", "ledger", "look"})
"""Activities that a run may leave behind where it continues as new: keyed writes, and reads."""
ACTIVITY_ENDS: Final = tuple(
    f"activity_task_{end}_event_attributes" for end in ("completed", "failed", "timed_out", "canceled")
)


def check_history(events: Sequence[HistoryEvent], exempt: frozenset[Exempt], findings: Findings) -> None:
    """One run. It must not continue as new before its calls have ended: a lost answer may be a hold that is unknown."""
    benign = BENIGN | ({BY_A_RESET} if Exempt.RESET in exempt else frozenset())
    open_calls: dict[int, str] = {}
    for event in events:
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED and Exempt.BUG not in exempt:
            failed = event.workflow_task_failed_event_attributes
            findings.must(failed.cause in benign, Rule.FAILED_WORKFLOW_TASK, failed.failure.message[:300])
        if event.event_type in SUMMARISED and event.marker_recorded_event_attributes.marker_name != PATCH_MARKER:
            has_summary = bool(event.user_metadata.summary.data)
            findings.must(has_summary, Rule.BROKEN_HISTORY, f"event {event.event_id} has no summary")
        _record_call(event, open_calls)
    if events and events[-1].event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW:
        left = sorted(set(open_calls.values()) - MAY_BE_LEFT)
        findings.must(not left, Rule.BROKEN_HISTORY, f"the run continued as new and left {left} behind")


def _record_call(event: HistoryEvent, open_calls: dict[int, str]) -> None:
    """Keep the activities that are scheduled and have not ended, by the id of the event that scheduled them."""
    if event.HasField("activity_task_scheduled_event_attributes"):
        open_calls[event.event_id] = event.activity_task_scheduled_event_attributes.activity_type.name
    for name in ACTIVITY_ENDS:
        if event.HasField(name):  # type: ignore[arg-type]
            open_calls.pop(getattr(event, name).scheduled_event_id)


async def replay_failures(histories: Sequence[WorkflowHistory], workflows: Sequence[type]) -> dict[str, Exception]:
    """Run id → why its history does not replay with the present code."""
    results = await Replayer(workflows=workflows, plugins=[TasksPlugin()]).replay_workflows(
        _each(histories), raise_on_replay_failure=False
    )
    return dict(results.replay_failures)


async def _each(histories: Sequence[WorkflowHistory]) -> AsyncIterator[WorkflowHistory]:
    for history in histories:
        yield history
