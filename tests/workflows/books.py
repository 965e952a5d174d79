"""The one shared assertion: invariants 1 to 4, checked from outside after every scenario."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from temporalio.api.enums.v1 import EventType as HistoryEvent
from temporalio.api.enums.v1 import WorkflowTaskFailedCause
from temporalio.api.history import v1 as history
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHistoryEventFilterType
from temporalio.exceptions import ApplicationError, CancelledError

from comfyui_temporal.contracts.task_store import TaskExceptionRow
from comfyui_temporal.contracts.tasks import EventType, TaskEvent, TaskStatus
from proof.simulators.task_money import TaskMoney
from tests.workflows.platform import Handle, Platform

ENDS = {
    TaskStatus.COMPLETED: EventType.COMPLETED,
    TaskStatus.FAILED: EventType.FAILED,
    TaskStatus.CANCELLED: EventType.CANCELLED,
}
BENIGN_TASK_FAILURES = {
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_COMMAND,
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_UPDATE,
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW,
    # The server's own, where more signals come in one workflow task than it keeps aside.
    WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND,
}
EXPLAINED = {
    HistoryEvent.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED,
    HistoryEvent.EVENT_TYPE_TIMER_STARTED,
    HistoryEvent.EVENT_TYPE_MARKER_RECORDED,
}
"""Events that bear a summary; a marker is an activity that ran locally."""
PATCH_MARKER = "core_patch"
"""... or the name of a patch that this run was decided with (docs/versioning.md)."""
CLOSE_EVENT = WorkflowHistoryEventFilterType.CLOSE_EVENT
MAY_BE_LEFT = {"write", "get_job", "get_training", "ledger", "look"}
"""Activities that a run may leave behind where it continues as new: keyed writes, and reads."""

UNTOLD = {"settlement_unknown", "hold_left_to_expiry", "undo_unfinished"}
"""Exceptions of tasks of whose points nobody can tell what became of them."""


@dataclass
class Ending:
    """How a task ended, as seen from outside."""

    status: TaskStatus
    code: str | None
    """The failure's type, or None."""
    result: dict[str, Any]
    """The result object; empty for a run that ended Canceled."""
    events: list[TaskEvent]
    charged: int
    records: list[TaskExceptionRow] = field(default_factory=list)

    @property
    def exceptions(self) -> list[str]:
        """Codes of the exception records."""
        return [record.code for record in self.records]

    @property
    def kinds(self) -> list[str]:
        """The events as `type stage`, in order."""
        return [f"{event.event.value} {event.stage or '-'}" for event in self.events]


async def ended(platform: Platform, handle: Handle, *, exempt: Collection[str] = ()) -> Ending:
    """Wait for the task's end and assert that nothing that may never be untrue is.

    `exempt` names what cannot be known or stopped under a fault that takes it away: `hold_expires` (a nameless hold
    ends by expiry), `job_runs_out` (a nameless or unstoppable job). `bug`: workflow tasks were made to fail. What the
    field's credits service never tells is exempt by `proof/simulators/task_money.py`, by its name and amount.
    """
    ending = await _how_it_ended(platform, handle)
    task_id = handle.id.removeprefix("task-")
    await _check_money(platform, task_id, ending, exempt)
    await _check_jobs(platform, task_id, exempt)
    _check_events(ending)
    await _check_row(platform, task_id, ending)
    assert platform.snapshot_files(task_id) == [], "a dataset's copy is temporary"
    await check_history(platform, handle, exempt)
    return ending


async def ended_without_its_run(platform: Platform, task_id: str) -> Ending:
    """The same assertion on a task whose run was terminated or vanished: its row tells how it ended."""
    row = await platform.store.task(task_id)
    assert row is not None and row.ended_at is not None, row
    result = {
        "credits": row.credits.model_dump(),
        "result_urls": row.result_urls,
        "output": row.output,
    }
    records = await platform.store.exceptions(task_id=task_id)
    charged = await platform.simulators.admin.credits.charged(task_id)
    code = row.error.code if row.error else None
    events = await platform.store.events(task_id)
    ending = Ending(row.status, code, result, events, charged, records)
    await _check_money(platform, task_id, ending, ())
    await _check_jobs(platform, task_id, ())
    _check_events(ending)
    assert platform.snapshot_files(task_id) == []
    return ending


async def _how_it_ended(platform: Platform, handle: Handle) -> Ending:
    code: str | None = None
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        if isinstance(error.cause, CancelledError):
            result = {}
        else:
            assert isinstance(error.cause, ApplicationError), repr(error.cause)
            code = error.cause.type
            result = error.cause.details[0] if error.cause.details else {}
    task_id = handle.id.removeprefix("task-")
    events = await platform.store.events(task_id)
    status = TaskStatus(result.get("status", TaskStatus.CANCELLED))
    if not result:
        assert (await handle.describe()).status is WorkflowExecutionStatus.CANCELED
    charged = await platform.simulators.admin.credits.charged(task_id)
    records = await platform.store.exceptions(task_id=task_id)
    return Ending(status, code, result, events, charged, records)


async def _check_money(platform: Platform, task_id: str, ending: Ending, exempt: Collection[str]) -> None:
    """Each hold resolved once; charged the price once where completed, nothing and nothing handed out elsewhere."""
    books = await platform.simulators.admin.credits.balance_check()
    assert books.ok, books.problems
    money = await _money(platform, task_id, ending)
    assert not money.leaks() or "hold_expires" in exempt, money.leaks()
    assert not money.mischarges(), money.mischarges()
    if ending.result:
        _check_told(ending)
    if ending.status is TaskStatus.COMPLETED:
        committed = [hold for hold in money.holds if hold.phase == "committed"]
        assert len(committed) <= 1, committed
        return
    assert ending.charged == 0
    assert not ending.result.get("result_urls") and not ending.result.get("output")
    for event in ending.events:
        assert not event.result_urls and not event.output, event


async def _money(platform: Platform, task_id: str, ending: Ending) -> TaskMoney:
    credits = platform.simulators.admin.credits
    return TaskMoney(
        platform.simulators.credits_profile,
        await credits.holds(task_id),
        await credits.ledger(task_id),
        told=ending.result["credits"]["charged"] if ending.result else 0,
        records=[(record.code, record.details) for record in ending.records],
    )


def _check_told(ending: Ending) -> None:
    """What is told agrees with itself, and no event says that points came back where that is not known."""
    credits = ending.result["credits"]
    if credits["settlement"] == "unknown":
        assert (credits["charged"], credits["returned"]) == (None, None)
        assert not any(event.credits_delta for event in ending.events if _says_unknown(event)), ending.kinds
        return
    assert credits["settlement"] == "settled"
    assert credits["returned"] == max(0, credits["held"] - credits["charged"])


def _says_unknown(event: TaskEvent) -> bool:
    return event.message is not None and "not known" in event.message


async def _check_jobs(platform: Platform, task_id: str, exempt: Collection[str]) -> None:
    """No job or training keeps running whose task has ended."""
    alive = [run for run in await platform.simulators.admin.comfyui.jobs(task_id) if not run.is_over]
    assert not alive or "job_runs_out" in exempt, alive


def _check_events(ending: Ending) -> None:
    """Gapless, the last one is the end, progress never back within an attempt and stage."""
    events = ending.events
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[0].event is EventType.ACCEPTED
    assert events[-1].event is ENDS[ending.status], ending.kinds
    assert sum(event.event in ENDS.values() for event in events) == 1, ending.kinds
    moved = sum(event.credits_delta or 0 for event in events)
    assert moved == -ending.charged or set(ending.exceptions) & UNTOLD, "what the events tell is what was charged"
    reached: dict[tuple[int, str | None], float] = {}
    for event in events:
        at = (event.attempt, event.stage)
        assert (event.progress or 0.0) >= reached.get(at, 0.0), ending.kinds
        reached[at] = event.progress or 0.0


async def _check_row(platform: Platform, task_id: str, ending: Ending) -> None:
    row = await platform.store.task(task_id)
    assert row is not None and row.status is ending.status
    if ending.result:
        assert row.credits.model_dump() == ending.result["credits"]


async def runs_of(platform: Platform, handle: Handle) -> list[Handle]:
    """The task's runs, oldest first: each but the last continued as new."""
    runs: list[Handle] = []
    run_id = handle.first_execution_run_id
    while run_id:
        run = platform.client.get_workflow_handle(handle.id, run_id=run_id)
        runs.append(run)
        run_id = None
        if (await run.describe()).status is WorkflowExecutionStatus.CONTINUED_AS_NEW:
            [closing] = [event async for event in run.fetch_history_events(event_filter_type=CLOSE_EVENT)]
            run_id = closing.workflow_execution_continued_as_new_event_attributes.new_execution_run_id
    return runs or [handle]


async def check_history(platform: Platform, handle: Handle, exempt: Collection[str] = ()) -> None:
    """No workflow task ever failed: nothing that came in left a run stuck, even for a moment.

    No run continued as new before its calls had ended: an answer that nobody hears is a hold that nobody knows. And
    every activity and timer says in a line what it is for.
    """
    runs = await runs_of(platform, handle)
    for run in runs:
        open_calls: dict[int, str] = {}
        async for event in run.fetch_history_events():
            if event.event_type == HistoryEvent.EVENT_TYPE_WORKFLOW_TASK_FAILED:
                failed = event.workflow_task_failed_event_attributes
                assert failed.cause in BENIGN_TASK_FAILURES or "bug" in exempt, failed
            if event.event_type in EXPLAINED and event.marker_recorded_event_attributes.marker_name != PATCH_MARKER:
                assert event.user_metadata.summary.data, event
            _note_calls(event, open_calls)
        assert run is runs[-1] or not set(open_calls.values()) - MAY_BE_LEFT, open_calls


def _note_calls(event: history.HistoryEvent, open_calls: dict[int, str]) -> None:
    """Keep the activities that are scheduled and have not ended, by the id of the event that scheduled them."""
    if event.HasField("activity_task_scheduled_event_attributes"):
        open_calls[event.event_id] = event.activity_task_scheduled_event_attributes.activity_type.name
    for ending in ("completed", "failed", "timed_out", "canceled"):
        name = f"activity_task_{ending}_event_attributes"
        if event.HasField(name):  # type: ignore[arg-type]
            open_calls.pop(getattr(event, name).scheduled_event_id)
