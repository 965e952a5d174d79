"""The answer to a start that waits (contract §6 `Prefer: wait`, §8 `wait_until_held`)."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import CallerModel, OwnModel
from comfyui_temporal.contracts.task_store import TaskState

WAIT_UNTIL_HELD: Final = "wait_until_held"
"""The update's name, and the id by which repeats wait. One id has one answer, for ever."""
MAX_WAIT_SECONDS: Final = 60
"""A start waits for no longer; a longer wait counts as this one."""


CREDITS_REFUSED: Final = frozenset(
    {
        *(FailureCode.INSUFFICIENT_BALANCE, FailureCode.QUOTA_EXCEEDED),
        *(FailureCode.NOT_AUTHORIZED, FailureCode.PRICE_MISMATCH),
    }
)
"""A task that fails with one of these before anything is held: its credits are refused."""
INPUT_REFUSED: Final = frozenset({FailureCode.INPUT_INVALID, FailureCode.DATASET_INVALID})
ID_REFUSED: Final = frozenset({FailureCode.TASK_EXISTS, FailureCode.TASK_CONFLICT})
WaitFor = Literal["held"]


class Reached(StrEnum):
    """How far a task has come, as a start that waits sees it."""

    HELD = "held"
    """Credits are held, or the task costs nothing."""
    CONFIRMATION = "confirmation"
    """A training waits for its price to be confirmed."""
    ENDED = "ended"


class WaitUntilHeld(CallerModel):
    """Argument of the update `wait_until_held`: it has no fields."""


class StartAnswer(OwnModel):
    """Answer to `wait_until_held`. `state`: the task's row at that moment; an ended one names its error."""

    reached: Reached
    state: TaskState
