"""Giving back what a run left that ended without its own clean-up (contract §7 rollback)."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from comfyui_temporal.contracts.calls import Post, SnapshotOrder
from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.continuation import AskedHold, AskedJob
from comfyui_temporal.contracts.credits import ChargeRequest
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import CallerId, CallerText, OwnModel
from comfyui_temporal.contracts.handed_on import KeptModel, Order
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import CreditsSummary, TaskStatus

GIVE_BACK_WORKFLOW: Final = "GiveBackWorkflow"
_NOTHING: Final[tuple[Any, ...]] = (None, [], {}, "", 0, False)
GIVE_BACK_PREFIX: Final = "give-back-"


def give_back_id_of(task_id: str) -> str:
    """The only workflow id that a task's give-back runs under."""
    return GIVE_BACK_PREFIX + task_id


class GiveBackOrder(KeptModel):
    """Which task is given back, and who wants it why."""

    task_id: CallerId
    reason: Annotated[CallerText, Field(max_length=500)] = ""


class GiveBackRun(GiveBackOrder, Order):
    """Argument of `GiveBackWorkflow`."""

    model_config = Order.model_config


class OwnEnd(KeptModel):
    """How a run ended by itself. Its row can be open all the same: the store was restored from an older backup."""

    status: TaskStatus
    code: FailureCode | None = None
    message: str = ""
    result_urls: list[str] = []
    output: TrainingOutput | None = None


class LeftBehind(KeptModel):
    """What an ended run left, as its history and the task's row tell it.

    What a newer worker found besides may hold money: it is not read without it, and waits for a worker that knows it.
    """

    row: TaskRow
    how: str
    """How the run ended: `terminated`, `timed_out`, `failed`, `vanished` …"""
    holds: list[AskedHold] = []
    holds_before: int = 0
    """How many more were granted, all of them over long ago."""
    jobs: list[AskedJob] = []
    charges: list[Post[ChargeRequest]] = []
    """Asked for after delivery, where the hold had ended."""
    asked_again: int = 0
    """How many of the holds were asked for more than once."""
    cost: int | None = None
    """Points that were to be committed after delivery; None where no commit had been asked for."""
    snapshot: SnapshotOrder | None = None
    """What is to be deleted; it names no files."""
    own_end: OwnEnd | None = None
    """How the run ended by itself; None where it did not, or had not begun anything."""

    @model_validator(mode="before")
    @classmethod
    def _known_as_a_whole(cls, found: Any) -> Any:
        if isinstance(found, dict):
            unknown = [name for name in found if name not in cls.model_fields and found[name] not in _NOTHING]
            if unknown:
                raise ValueError(f"a newer worker found {', '.join(unknown)}, which this one cannot give back")
        return found


GiveBackOutcome = Literal["given_back", "already_charged", "nothing_held", "settlement_unknown"]


class GiveBackResult(OwnModel):
    """Result of `GiveBackWorkflow`.

    `given_back`: hold and job are given back and the task has failed. `already_charged`: it had been charged, and is
    completed. `nothing_held`: it had ended and given back everything itself. `settlement_unknown`: whether it was
    charged could not be learned; the reconciler looks again.
    """

    task_id: str
    outcome: GiveBackOutcome
    credits: CreditsSummary


def outcome_of(credits: CreditsSummary, if_not_charged: GiveBackOutcome) -> GiveBackOutcome:
    """What a give-back came to, by an ended task's credits."""
    if credits.charged is None:
        return "settlement_unknown"
    return "already_charged" if credits.charged else if_not_charged
