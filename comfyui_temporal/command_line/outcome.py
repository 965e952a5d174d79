"""How a task ended, whatever way Temporal tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, TerminatedError, TimeoutError

from comfyui_temporal.command_line.connection import RPC_TIMEOUT, Connection, Server, sentences
from comfyui_temporal.command_line.failures import ExitCode, UnknownTask
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.tasks import (
    IMAGE_WORKFLOW,
    TRAINING_WORKFLOW,
    CreditsSummary,
    ImageResult,
    TaskStatus,
    TrainingResult,
    workflow_id_of,
)
from comfyui_temporal.runs import describe_run

RESULT_TYPES: dict[str, type[ImageResult] | type[TrainingResult]] = {
    IMAGE_WORKFLOW: ImageResult,
    TRAINING_WORKFLOW: TrainingResult,
}


class TaskOutcome(OwnModel):
    """The end of a task. `code` and `sentence` say why it did not complete."""

    task_id: str
    workflow_id: str
    status: TaskStatus
    code: str | None = None
    sentence: str | None = None
    result: ImageResult | TrainingResult | None = None
    ui_url: str | None = None

    @property
    def credits(self) -> CreditsSummary | None:
        return self.result.credits if self.result else None

    @property
    def exit_code(self) -> ExitCode:
        match self.status:
            case TaskStatus.COMPLETED:
                return ExitCode.COMPLETED
            case TaskStatus.CANCELLED:
                return ExitCode.CANCELLED
            case _:
                return ExitCode.FAILED


async def find_task(client: Client, server: Server, task_id: str) -> WorkflowHandle[Any, Any]:
    """A handle that knows the task's result type. Raises UnknownTask."""
    workflow_id = workflow_id_of(task_id)
    with sentences(server, task_id=task_id):
        run = await describe_run(client, workflow_id, rpc_timeout=RPC_TIMEOUT)
    result_type = RESULT_TYPES.get(run.workflow_type)
    if result_type is None:
        raise UnknownTask(f"Workflow {workflow_id!r} is a {run.workflow_type}, no task of this system.")
    return client.get_workflow_handle(workflow_id, result_type=result_type)


async def outcome_of(handle: WorkflowHandle[Any, Any], connection: Connection, task_id: str) -> TaskOutcome:
    """Wait for the task's end and say how it ended. Raises RPCError."""
    try:
        result: ImageResult | TrainingResult = await handle.result()
        cause = result.error_details
        ended = {"status": result.status, "result": result, "sentence": cause.message if cause else None}
    except WorkflowFailureError as failure:
        ended = _failed(failure.cause)
    run = await describe_run(connection.client, handle.id, rpc_timeout=RPC_TIMEOUT)
    ui_url = connection.server.ui_link(handle.id, run.run_id)
    return TaskOutcome(task_id=task_id, workflow_id=handle.id, ui_url=ui_url, **ended)


def _failed(cause: BaseException | None) -> dict[str, Any]:
    failed: dict[str, Any] = {"status": TaskStatus.FAILED}
    match cause:
        case CancelledError():
            return {
                "status": TaskStatus.CANCELLED,
                "code": FailureCode.CANCELLED.value,
                "sentence": "The run was cancelled in Temporal.",
                "result": _result_in(cause.details),
            }
        case ApplicationError():
            code = cause.type or FailureCode.INTERNAL.value
            return failed | {"code": code, "sentence": cause.message, "result": _result_in(cause.details)}
        case TerminatedError():
            sentence = "The run was terminated: no clean-up ran. Its hold ends by expiry, its job may still run."
            return failed | {"code": "terminated", "sentence": sentence}
        case TimeoutError():
            sentence = "The run ran into a Temporal time-out that its starter had set; this system sets none."
            return failed | {"code": FailureCode.TIMEOUT.value, "sentence": sentence}
        case _:
            return failed | {"code": FailureCode.INTERNAL.value, "sentence": str(cause)}


def _result_in(details: Sequence[Any]) -> ImageResult | TrainingResult | None:
    """The result object that a failed run carries in its failure's details (contract §8)."""
    if not details or not isinstance(details[0], dict):
        return None
    model = TrainingResult if "training_id" in details[0] else ImageResult
    try:
        return model.model_validate(details[0])
    except ValidationError:
        return None
