"""Finds the tasks whose run is over while their row is open, and starts a give-back for each (invariant 8).

A schedule starts it. A run counts as over when it is found closed twice, a pause apart. By then a call that was in
flight when the run was terminated has ended, and a last write that was late has reached the row.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import FailureError, WorkflowAlreadyStartedError

from activities.closed_runs import ClosedRunActivities
from comfyui_temporal.contracts.give_back import GiveBackRun, give_back_id_of
from comfyui_temporal.contracts.reconcile import ClosedRun, OpenTasksLook, ReconcileOrder, ReconcileResult
from workflows.correction import Corrections
from workflows.give_back import GiveBackWorkflow
from workflows.guards import validated
from workflows.outside_call import HEARTBEAT_TIMEOUT, RETRY, STORE_TIMEOUT

TASK_TIMEOUT: Final = timedelta(seconds=3)
"""After this long another worker continues a run that a killed worker held."""
MAX_PAGES: Final = 20
MAX_CLOSED: Final = 200
"""Of one run; the run that it continues as takes the rest."""
LOOKS_AT_UNSETTLED: Final = "unknown-settlements-looked-at"
REASON: Final = "found by the reconciler"


@workflow.defn
class ReconcileWorkflow:
    """One pass over the open rows."""

    @workflow.run
    async def run(self, order: ReconcileOrder) -> ReconcileResult:
        order = validated(order, ReconcileOrder)
        closed, cursor, unseen = await self._found_closed(order)
        if closed:
            summary = f"2 wait: look again at {len(closed)} closed runs"
            await workflow.sleep(timedelta(seconds=order.pause_seconds), summary=summary)
            closed = await workflow.execute_activity_method(
                ClosedRunActivities.still_closed,
                closed,
                start_to_close_timeout=STORE_TIMEOUT,
                heartbeat_timeout=HEARTBEAT_TIMEOUT,
                retry_policy=RETRY,
                summary="2 look again",
            )
        begun = [task.task_id for task in closed if await self._begin_give_back(task)]
        so_far = {
            "given_back": order.given_back + len(begun),
            "unseen": order.unseen + unseen,
            "not_started": order.not_started + len(closed) - len(begun),
        }
        if cursor is not None:
            workflow.continue_as_new(order.model_copy(update={"cursor": cursor, **so_far}))
        corrected = 0
        if workflow.patched(LOOKS_AT_UNSETTLED):
            corrected = await Corrections().made(every_seconds=order.look_again_seconds)
        return ReconcileResult(task_ids=begun, corrected=corrected, **so_far)

    async def _found_closed(self, order: ReconcileOrder) -> tuple[list[ClosedRun], str | None, int]:
        """The closed runs of some pages, the cursor of the next run, and how many rows could not be read."""
        closed: list[ClosedRun] = []
        cursor, unseen = order.cursor, 0
        for _ in range(MAX_PAGES):
            seen = await workflow.execute_activity_method(
                ClosedRunActivities.closed_among_open,
                OpenTasksLook(quiet_seconds=order.pause_seconds, cursor=cursor),
                start_to_close_timeout=STORE_TIMEOUT,
                heartbeat_timeout=HEARTBEAT_TIMEOUT,
                retry_policy=RETRY,
                summary="1 open rows whose run is closed",
            )
            closed += seen.closed
            cursor = seen.cursor
            unseen += seen.unseen
            if cursor is None or len(closed) >= MAX_CLOSED:
                break
        return closed, cursor, unseen

    async def _begin_give_back(self, task: ClosedRun) -> bool:
        """Start it and do not wait: one that takes long, or cannot be started, delays no other."""
        try:
            await workflow.start_child_workflow(
                GiveBackWorkflow.run,
                GiveBackRun(task_id=task.task_id, reason=REASON),
                id=give_back_id_of(task.task_id),
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                # A give-back is idempotent: a second one finds the task ended.
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                task_timeout=TASK_TIMEOUT,
                static_summary=f"give back {task.task_id}, whose run is {task.how}",
            )
        except WorkflowAlreadyStartedError:
            workflow.logger.info("%s is being given back already", task.task_id)
        except (RuntimeError, FailureError) as error:
            # The server refused this one child. The SDK has no types for most of the reasons.
            workflow.logger.error("The give-back of %s could not be started: %s", task.task_id, error)
            return False
        return True
