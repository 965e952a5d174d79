"""Giving back what a run left that ended without its own clean-up (contract §7 rollback)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from contracts.calls import Post, SnapshotOrder
from contracts.carried import AskedHold, AskedJob
from contracts.credits import ChargeRequest
from contracts.fields import CallerId, CallerModel, CallerText, OwnModel
from contracts.task_store import TaskRow
from contracts.tasks import CreditsSummary

GIVE_BACK_WORKFLOW: Final = "GiveBackWorkflow"
GIVE_BACK_PREFIX: Final = "give-back-"


def give_back_id_of(task_id: str) -> str:
    """The only workflow id that a task's give-back runs under."""
    return GIVE_BACK_PREFIX + task_id


class GiveBackOrder(CallerModel):
    """Argument of `GiveBackWorkflow`."""

    task_id: CallerId
    reason: Annotated[CallerText, Field(max_length=500)] = ""


class LeftBehind(OwnModel):
    """What an ended run left, as its history and the task's row tell it."""

    row: TaskRow
    how: str
    """How the run ended: `terminated`, `timed_out`, `failed`, `vanished` …"""
    holds: list[AskedHold] = []
    holds_before: int = 0
    """How many more were granted, all of them over long ago."""
    jobs: list[AskedJob] = []
    charges: list[Post[ChargeRequest]] = []
    """Asked for after delivery, where the hold had ended."""
    snapshot: SnapshotOrder | None = None
    """What is to be deleted; it names no files."""


class GiveBackResult(OwnModel):
    """Result of `GiveBackWorkflow`.

    `given_back`: hold and job are given back and the task has failed. `already_charged`: it had been charged, and is
    completed. `nothing_held`: it had ended and given back everything itself.
    """

    task_id: str
    outcome: Literal["given_back", "already_charged", "nothing_held"]
    credits: CreditsSummary
