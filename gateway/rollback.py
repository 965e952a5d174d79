"""Rolling a task's credits back on request (contract §7).

An open task is cancelled: it gives everything back itself. `GiveBackWorkflow` gives back a task whose run ended
without its own clean-up. Charges stay: refunds are out of scope.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy

from comfyui_temporal.client.submission import WORKFLOW_TASK_TIMEOUT
from comfyui_temporal.contracts.fields import shortened
from comfyui_temporal.contracts.give_back import (
    GIVE_BACK_WORKFLOW,
    GiveBackOrder,
    GiveBackResult,
    give_back_id_of,
    outcome_of,
)
from comfyui_temporal.contracts.tasks import CancelTask, workflow_id_of
from comfyui_temporal.contracts.tasks_api import TaskView
from comfyui_temporal.runs import RunStatus
from gateway.problems import Problem, ProblemCode
from gateway.task_bodies import RollbackOrder, RollbackOutcome
from gateway.tasks import Tasks
from gateway.temporal_calls import RPC_TIMEOUT, bounded, described, temporal_problems
from runtime.caller_tokens import Caller

WAIT_SECONDS: Final = 10.0
"""How long a request waits for a give-back, which continues in any case."""


class Rollback:
    """Rolls tasks back."""

    def __init__(self, temporal: Client, tasks: Tasks, *, task_queue: str) -> None:
        self._temporal = temporal
        self._tasks = tasks
        self._task_queue = task_queue

    async def roll_back(self, caller: Caller, task_id: str, order: RollbackOrder) -> RollbackOutcome:
        """What became of the task's hold. Raises Problem: `already_charged`, `settlement_unknown`, `still_ending`, …"""
        task = await self._tasks.owned(caller, task_id)
        if task.ended_at is not None:
            return _of_ended(task)
        run = await described(self._temporal, workflow_id_of(task_id))
        if run is not None and run.status is RunStatus.PAUSED:
            raise Problem(
                ProblemCode.WORKER_UNAVAILABLE,
                f"The run of task {task_id} is paused in Temporal and gives nothing back while it is paused: unpause "
                "it and try again.",
            )
        if run is not None and not run.status.is_over:
            return await self._cancelled(caller, task, order)
        return await self._given_back(task, order)

    async def _cancelled(self, caller: Caller, task: TaskView, order: RollbackOrder) -> RollbackOutcome:
        reason = shortened(f"Rolled back by {caller.user_id}. {order.reason}".strip())
        answer = await self._tasks.cancel(caller, task.task_id, CancelTask(reason=reason))
        now = await self._tasks.owned(caller, task.task_id)
        if answer.outcome == "accepted":
            return RollbackOutcome(outcome="cancelled", credits=now.credits)
        if now.ended_at is not None:
            return _of_ended(now)
        raise Problem(
            ProblemCode.STILL_ENDING,
            f"Task {task.task_id} has been delivered or is ending; its credits are being settled. Try again.",
        )

    async def _given_back(self, task: TaskView, order: RollbackOrder) -> RollbackOutcome:
        handle: WorkflowHandle[Any, GiveBackResult] = await bounded(
            self._temporal.start_workflow(
                GIVE_BACK_WORKFLOW,
                GiveBackOrder(task_id=task.task_id, reason=order.reason),
                id=give_back_id_of(task.task_id),
                task_queue=self._task_queue,
                result_type=GiveBackResult,
                # Repeating a give-back is harmless: the second one finds the task ended.
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                static_summary=f"give back {task.task_id}, for {task.tenant_id}",
                task_timeout=WORKFLOW_TASK_TIMEOUT,
                rpc_timeout=RPC_TIMEOUT,
            )
        )
        try:
            with temporal_problems():
                result = await asyncio.wait_for(asyncio.shield(_result_of(handle)), WAIT_SECONDS)
        except WorkflowFailureError as failure:
            raise Problem(
                ProblemCode.STILL_ENDING, f"Task {task.task_id} could not be given back: {failure.cause}. Try again."
            ) from None
        except Problem:
            return RollbackOutcome(outcome="giving_back", credits=task.credits)
        return _of_outcome(task.task_id, result)


async def _result_of(handle: WorkflowHandle[Any, GiveBackResult]) -> GiveBackResult:
    return await handle.result()


def _of_ended(task: TaskView) -> RollbackOutcome:
    result = GiveBackResult(
        task_id=task.task_id,
        outcome=outcome_of(task.credits, "nothing_held"),
        credits=task.credits,
    )
    return _of_outcome(task.task_id, result)


def _of_outcome(task_id: str, result: GiveBackResult) -> RollbackOutcome:
    if result.outcome == "already_charged":
        raise Problem(
            ProblemCode.ALREADY_CHARGED,
            f"Task {task_id} was delivered and {result.credits.charged} points were charged: "
            "there is no hold left to give back.",
        )
    if result.outcome == "settlement_unknown":
        raise Problem(
            ProblemCode.SETTLEMENT_UNKNOWN,
            f"It is unknown whether task {task_id} was charged, so nothing can be rolled back. The ledger is checked "
            "hourly for a day: try again later, or look into the credits service's ledger.",
        )
    outcome: Literal["given_back", "nothing_held"] = result.outcome
    return RollbackOutcome(outcome=outcome, credits=result.credits)
