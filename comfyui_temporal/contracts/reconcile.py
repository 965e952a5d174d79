"""Finding tasks whose run is over while their row is open: what the reconciler hands on (invariant 8)."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.handed_on import Order

RECONCILE_WORKFLOW: Final = "ReconcileWorkflow"
RECONCILE_PREFIX: Final = "reconcile-"


def reconcile_id_of(task_queue: str) -> str:
    """The id of the schedule whose runs go to this task queue; its runs' ids begin with it."""
    return RECONCILE_PREFIX + task_queue


class ReconcileOrder(Order):
    """Argument of `ReconcileWorkflow`; a continued run goes on after `cursor`."""

    pause_seconds: Annotated[float, Field(ge=0, le=3_600)] = 60.0
    """How long a row must have stood still, and how long a run is then found closed, before it is given back."""
    cursor: str | None = None
    given_back: int = 0
    """By the runs before this one."""
    unseen: int = 0
    """Rows that the runs before this one could not look at."""
    not_started: int = 0
    """Give-backs that the runs before this one could not start."""
    look_again_seconds: Annotated[float, Field(ge=0, le=86_400)] = 3_600.0
    """How often the ledger of a task whose settlement is unknown is looked at again, for a day."""


class OpenTasksLook(OwnModel):
    """One page of open rows that nothing was written to for `quiet_seconds`; oldest first."""

    quiet_seconds: float
    cursor: str | None = None


class UnsettledLook(OwnModel):
    """Which unknown settlements are due: those that were not looked at for `every_seconds`."""

    every_seconds: float


class ClosedRun(OwnModel):
    """A task whose row is open and whose run is over. `run_id` is None where Temporal knows no run of it."""

    task_id: str
    workflow_id: str
    run_id: str | None = None
    how: str
    """`terminated`, `timed_out`, `failed`, `vanished` …"""


class OpenTasksSeen(OwnModel):
    """What a page showed. `cursor` leads to the next page, None at the end."""

    closed: list[ClosedRun] = []
    cursor: str | None = None
    unseen: int = 0
    """Rows of the page that could not be looked at: left to the next pass, and kept for `doctor`."""


class ReconcileResult(OwnModel):
    """Result of `ReconcileWorkflow`: how many give-backs were started, and which by its last run.

    `unseen` rows could not be looked at, `not_started` give-backs not be started: the next pass tries both again.
    """

    given_back: int
    task_ids: list[str]
    unseen: int = 0
    not_started: int = 0
    corrected: int = 0
    """Rows whose settlement was unknown and is known now."""
