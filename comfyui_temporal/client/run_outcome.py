"""How a run ended, for each way that Temporal reports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import ValidationError
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, TerminatedError, TimeoutError

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.give_back import GiveBackOutcome
from comfyui_temporal.contracts.scenes import AnyResult, scene_of_message
from comfyui_temporal.contracts.tasks import TaskStatus

TERMINATED: Final = "terminated"
_ENDED: Final = "The run ended in Temporal without its own clean-up. The reconciler looked after it: "
GIVEN_BACK: Final[dict[GiveBackOutcome, str]] = {
    "given_back": f"{_ENDED}job and credits were given back, nothing was charged.",
    "already_charged": f"{_ENDED}the task had been delivered and charged, so it counts as completed.",
    "nothing_held": f"{_ENDED}nothing was held any more.",
    "settlement_unknown": f"{_ENDED}it is not known yet whether it was charged; the ledger is read again each hour.",
}


async def ended_as(handle: WorkflowHandle[Any, Any]) -> dict[str, Any]:
    """Wait until the run ends: `status`, `code`, `sentence` and `result` of a TaskOutcome. Raises RPCError."""
    try:
        result: AnyResult = await handle.result()
    except WorkflowFailureError as failure:
        return _failed(failure.cause)
    cause = result.error_details
    return {"status": result.status, "result": result, "sentence": cause.message if cause else None}


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
            sentence = "The run was terminated in Temporal and gave nothing back itself."
            return failed | {"code": TERMINATED, "sentence": sentence}
        case TimeoutError():
            sentence = "The run reached a Temporal timeout that its starter had set; this system sets none."
            return failed | {"code": FailureCode.TIMEOUT.value, "sentence": sentence}
        case _:
            return failed | {"code": FailureCode.INTERNAL.value, "sentence": str(cause)}


def _result_in(details: Sequence[Any]) -> AnyResult | None:
    """The result object in a failed run's failure details (contract §8)."""
    if not details or not isinstance(details[0], dict):
        return None
    spec = scene_of_message(details[0])
    if spec is None:
        return None
    try:
        return spec.result.model_validate(details[0])
    except ValidationError:
        return None
