"""The one shared assertion: every rule of proof/checks, on every task that a scenario has ended."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHistoryEventFilterType
from temporalio.exceptions import ApplicationError, CancelledError

from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.task_store import TaskExceptionRow
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.checks.evidence import Sources
from proof.checks.finished_task import Exempt, Findings, FinishedTask
from proof.checks.histories import PATCH_MARKER, check_history
from proof.checks.judge import judge
from store import StoreUnavailable
from tests.waiting import until
from tests.workflows.platform import Handle, Platform, task_id_of

CLOSE_EVENT = WorkflowHistoryEventFilterType.CLOSE_EVENT
SCENARIO = frozenset({Exempt.STREAM, Exempt.RESET})
"""What no scenario here can know: no client follows its stream, and any run may have been reset."""
WITHOUT_RUN = SCENARIO | {Exempt.RESULT, Exempt.HISTORY}


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
    """Wait for the task's end and assert every rule. `exempt`: values of `Exempt` that this scenario's fault needs."""
    code, result = await _result_of(handle)
    task_id = task_id_of(handle)
    await _assert_judged(platform, task_id, SCENARIO | {Exempt(name) for name in exempt}, result, handle)
    status = TaskStatus(result.get("status", TaskStatus.CANCELLED))
    return await _ending(platform, task_id, status, code, result)


async def give_back(platform: Platform, handle: Handle) -> Handle:
    """Start the give-back of a task whose run has ended."""
    return await platform.client.start_workflow(
        GIVE_BACK_WORKFLOW,
        GiveBackOrder(task_id=task_id_of(handle)),
        id=give_back_id_of(task_id_of(handle)),
        task_queue=platform.task_queue,
    )


async def ended_without_its_run(platform: Platform, task_id: str, *, exempt: Collection[str] = ()) -> Ending:
    """The same assertion on a task whose run was terminated or vanished: its row shows how it ended."""
    await _assert_judged(platform, task_id, WITHOUT_RUN | {Exempt(name) for name in exempt})
    row = await platform.store.task(task_id)
    assert row is not None
    result = {"credits": row.credits.model_dump(), "result_urls": row.result_urls, "output": row.output}
    return await _ending(platform, task_id, row.status, row.error.code if row.error else None, result)


async def _ending(
    platform: Platform, task_id: str, status: TaskStatus, code: str | None, result: dict[str, Any]
) -> Ending:
    events, records = await platform.store.events(task_id), await platform.store.exceptions(task_id=task_id)
    charged = await platform.simulators.admin.credits.charged(task_id)
    return Ending(status, code, result, events, charged, records)


async def _result_of(handle: Handle) -> tuple[str | None, dict[str, Any]]:
    """The failure's type, or None, and the run's result object."""
    try:
        return None, await handle.result()
    except WorkflowFailureError as error:
        if isinstance(error.cause, CancelledError):
            assert (await handle.describe()).status is WorkflowExecutionStatus.CANCELED
            return None, {}
        assert isinstance(error.cause, ApplicationError), repr(error.cause)
        return error.cause.type, error.cause.details[0] if error.cause.details else {}


async def _assert_judged(
    platform: Platform,
    task_id: str,
    exempt: Collection[Exempt],
    result: dict[str, Any] | None = None,
    handle: Handle | None = None,
) -> None:
    simulators = platform.simulators
    sources = Sources(
        simulators.credits_profile,
        simulators.admin,
        platform.store,
        platform.client,
        platform.folder / "objects",
        platform.policy.get("prices", PriceTable()),
    )
    services = await sources.services(task_id)
    assert not services.problems, services.problems
    histories = [await run.fetch_history() for run in await runs_of(platform, handle)] if handle else None

    async def read() -> FinishedTask | None:
        with suppress(StoreUnavailable):  # a scenario may just have cut it off
            return await sources.task(task_id, services, result=result, histories=histories)
        return None

    task = await until(read, within_seconds=20)
    whose = {task_id, *(run.tenant_id for run in task.jobs), *(hold.tenant_id for hold in task.holds)}
    by_hand = {Exempt.PRICE} if whose & platform.told_by_hand else set()
    findings = judge(task, exempt={*exempt, *by_hand})
    assert not findings, "; ".join(f"{finding.rule}: {finding.text}" for finding in findings)


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


async def check_histories(platform: Platform, handle: Handle, exempt: Collection[str] = ()) -> None:
    """Assert the rules on the histories of a task's runs, whether or not it has ended."""
    findings = Findings()
    for run in await runs_of(platform, handle):
        history = await run.fetch_history()
        check_history(history.events, SCENARIO | {Exempt(name) for name in exempt}, findings)
    assert not findings.found, findings.found


__all__ = ["PATCH_MARKER", "Ending", "check_histories", "ended", "ended_without_its_run", "give_back", "runs_of"]
