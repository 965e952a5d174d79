"""Events (invariant 4): the kept history, and what a client of the live stream received."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from comfyui_temporal.contracts.task_events import EventType, TaskEvent
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.checks.finished_task import Findings, FinishedTask, Rule

ENDS: Final[Mapping[TaskStatus, EventType]] = {
    TaskStatus.COMPLETED: EventType.COMPLETED,
    TaskStatus.FAILED: EventType.FAILED,
    TaskStatus.CANCELLED: EventType.CANCELLED,
}


def check_events(task: FinishedTask, findings: Findings) -> None:
    """No gaps; accepted comes first; the one end comes last and is the row's; progress never goes back."""
    row, kinds = task.row, [event.event for event in task.events]
    seqs = [event.seq for event in task.events if isinstance(event, TaskEvent)]
    findings.must(seqs == list(range(1, len(seqs) + 1)), Rule.BROKEN_EVENTS, f"the events have a gap: {seqs}")
    times = [event.ts for event in task.events if isinstance(event, TaskEvent)]
    findings.must(times == sorted(times), Rule.BROKEN_EVENTS, "the events' times do not rise with their numbers")
    if row is None:
        findings.must(not kinds, Rule.BROKEN_EVENTS, f"there are events and no row: {kinds}")
        return
    findings.must(kinds[:1] == [EventType.ACCEPTED], Rule.BROKEN_EVENTS, f"the first event is not the start: {kinds}")
    ends = [kind for kind in kinds if kind in ENDS.values()]
    is_end = ends == [ENDS.get(row.status)] and kinds[-1:] == ends
    findings.must(is_end, Rule.BROKEN_EVENTS, f"{row.status}, and the last event is not the one end: {kinds}")
    if task.last_seq is not None:
        is_counted = task.last_seq == len(kinds)
        findings.must(is_counted, Rule.BROKEN_EVENTS, f"the row counts {task.last_seq} events, there are {len(kinds)}")
    _check_progress(task, findings)


def _check_progress(task: FinishedTask, findings: Findings) -> None:
    reached: dict[tuple[int, str | None], float] = {}
    for number, event in enumerate(task.events, start=1):
        at, progress = (event.attempt, event.stage), event.progress or 0.0
        findings.must(progress >= reached.get(at, 0.0), Rule.BROKEN_EVENTS, f"progress goes back with event {number}")
        reached[at] = progress


def check_stream(task: FinishedTask, findings: Findings) -> None:
    """A client received each event once, in order, as it is kept."""
    streamed = task.streamed or ()
    seqs = [each.seq if isinstance(each, TaskEvent) else each for each in streamed]
    kept = {event.seq: event for event in task.events if isinstance(event, TaskEvent)}
    lost, strange = sorted(set(kept) - set(seqs)), sorted(set(seqs) - set(kept))
    findings.must(not lost, Rule.LOST_EVENT, f"the stream lacks {lost}")
    is_in_order = seqs == sorted(set(seqs)) and not strange
    findings.must(is_in_order, Rule.REPEATED_EVENT, f"the stream had {seqs}, {len(kept)} events are kept")
    for each in streamed:
        if isinstance(each, TaskEvent) and each.seq in kept:
            findings.must(each == kept[each.seq], Rule.BROKEN_EVENTS, f"the stream had another event {each.seq}")
