"""The schedule of the reconciler, one for each task queue: every worker creates it at its start, `doctor` reads it."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import Any, Final

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionExecutionStartWorkflow,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleDescription,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.contracts.reconcile import RECONCILE_WORKFLOW, ReconcileOrder, ReconcileResult, reconcile_id_of
from runtime.settings import Settings

RPC_TIMEOUT: Final = timedelta(seconds=5)
TASK_TIMEOUT: Final = timedelta(seconds=3)
"""After this time another worker takes over a pass from a killed one."""
PASSES_LOOKED_AT: Final = 3
RESULT_SECONDS: Final = 1.0
"""The schedule does not wait for a pass that still runs."""
CATCH_UP: Final = timedelta(seconds=10)
"""One pass is enough after an outage: it finds everything that earlier ones would have found."""


async def ensure_reconciler(client: Client, settings: Settings) -> None:
    """Create the schedule, or update an existing one to these settings; a paused one stays paused. Raises RPCError."""
    schedule_id, schedule = reconcile_id_of(settings.task_queue), _schedule(settings)
    try:
        await client.create_schedule(schedule_id, schedule, rpc_timeout=RPC_TIMEOUT)
    except ScheduleAlreadyRunningError:

        def brought_up(standing: ScheduleUpdateInput) -> ScheduleUpdate:
            schedule.state = standing.description.schedule.state
            return ScheduleUpdate(schedule)

        await client.get_schedule_handle(schedule_id).update(brought_up, rpc_timeout=RPC_TIMEOUT)


async def standing_reconciler(client: Client, task_queue: str) -> ScheduleDescription | None:
    """The schedule on the server; None if there is none. Raises RPCError."""
    try:
        return await client.get_schedule_handle(reconcile_id_of(task_queue)).describe(rpc_timeout=RPC_TIMEOUT)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return None


async def last_pass(client: Client, standing: ScheduleDescription) -> ReconcileResult | None:
    """The result of the schedule's newest ended pass; None if none has completed, or it cannot be read."""
    for taken in reversed(standing.info.recent_actions[-PASSES_LOOKED_AT:]):
        if not isinstance(taken.action, ScheduleActionExecutionStartWorkflow):
            continue
        handle: WorkflowHandle[Any, ReconcileResult] = client.get_workflow_handle(
            taken.action.workflow_id, result_type=ReconcileResult
        )
        with contextlib.suppress(RPCError, WorkflowFailureError, TimeoutError):
            return await asyncio.wait_for(handle.result(), RESULT_SECONDS)
    return None


def _schedule(settings: Settings) -> Schedule:
    return Schedule(
        action=ScheduleActionStartWorkflow(
            RECONCILE_WORKFLOW,
            ReconcileOrder(pause_seconds=settings.reconcile_pause_seconds),
            id=reconcile_id_of(settings.task_queue),
            task_queue=settings.task_queue,
            task_timeout=TASK_TIMEOUT,
            static_summary="give back what runs left that ended without their own clean-up",
        ),
        spec=ScheduleSpec(
            intervals=[ScheduleIntervalSpec(every=timedelta(seconds=settings.reconcile_every_seconds))],
        ),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=CATCH_UP),
    )
