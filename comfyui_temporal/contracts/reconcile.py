"""Finding tasks whose run has ended while their row is open: the reconciler's data (invariant 8)."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.handed_on import Order

RECONCILE_WORKFLOW: Final = "ReconcileWorkflow"
RECONCILE_PREFIX: Final = "reconcile-"


def reconcile_id_of(task_queue: str) -> str:
    """The id of the schedule whose runs use this task queue. Its runs' ids begin with it."""
    return RECONCILE_PREFIX + task_queue


class ReconcileOrder(Order):
    """Argument of `ReconcileWorkflow`. A continued run starts after `cursor`."""

    pause_seconds: Annotated[float, Field(ge=0, le=3_600)] = 60.0
    """How long a row must be unchanged, and its run then be found closed, before it is given back."""
    cursor: str | None = None
    given_back: int = 0
    """By the runs before this one."""
    unseen: int = 0
    """Rows that the runs before this one could not check."""
    not_started: int = 0
    """Give-backs that the runs before this one could not start."""
    look_again_seconds: Annotated[float, Field(ge=0, le=86_400)] = 3_600.0
    """How often the ledger of a task whose settlement is unknown is checked again, for a day."""


class OpenTasksLook(OwnModel):
    """One page of open rows without a write for `quiet_seconds`; oldest first."""

    quiet_seconds: float
    cursor: str | None = None


class UnsettledLook(OwnModel):
    """Which unknown settlements are due: those that were not checked for `every_seconds`."""

    every_seconds: float


class ClosedRun(OwnModel):
    """A task whose row is open and whose run has ended. `run_id` is None if Temporal does not know any run of it."""

    task_id: str
    workflow_id: str
    run_id: str | None = None
    how: str
    """`terminated`, `timed_out`, `failed`, `vanished` …"""


class OpenTasksSeen(OwnModel):
    """The result of a page. `cursor` leads to the next page, None at the end."""

    closed: list[ClosedRun] = []
    cursor: str | None = None
    unseen: int = 0
    """Rows of the page that could not be checked: left to the next pass, and kept for `doctor`."""


class ReconcileResult(OwnModel):
    """Result of `ReconcileWorkflow`: how many give-backs were started, and which of them by its last run.

    `unseen` rows could not be checked and `not_started` give-backs could not be started: the next pass retries both.
    """

    given_back: int
    task_ids: list[str]
    unseen: int = 0
    not_started: int = 0
    corrected: int = 0
    """Rows whose settlement was unknown and is now known."""
