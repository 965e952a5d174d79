"""A task's lives: which of its runs acts, and what a run may not know of the runs before it.

A run that was reset keeps its workflow id and its `first_execution_run_id`, gets another `run_id`, and forgets what
came after the reset's event. The forgotten part is in the task's row and in the ledger.
"""

from __future__ import annotations

from typing import Final

from comfyui_temporal.contracts.fields import OwnModel

STORE_UNAVAILABLE: Final = "store_unavailable"
"""The type of a call's failure if the task store, which is read before the call, does not answer."""
TASK_ENDED: Final = "task_ended"
"""The message of the refusal that a run gets if its task has ended or is being given back."""
READ_THE_LEDGER: Final = "read_the_ledger"
"""The message of the refusal that a commit gets if an earlier life of the task may have settled it."""


class TaskRun(OwnModel):
    """The acting run of a task. `run_number` counts continue-as-new: 0 for a chain's first run."""

    task_id: str
    run_id: str
    run_number: int = 0
    first_execution_run_id: str | None = None
    """None if a worker of release 0.1.0 scheduled the call."""
    is_current: bool = False
    """Temporal has just named it as the workflow's current run: it acts, although it was superseded."""

    @property
    def was_reset(self) -> bool:
        """Whether the run itself shows that it was reset: a chain's first run has the chain's id."""
        return self.run_number == 0 and self.first_execution_run_id not in (None, self.run_id)


class EarlierLife(OwnModel):
    """What the task's row knows beyond the acting run. Without an earlier life no field is set."""

    lives: int = 0
    """How many times the task's run was reset; 1 for a row that the store had lost."""
    has_ended: bool = False
    is_given_back: bool = False
    """A give-back has claimed the row because it found the task's run closed."""
    is_superseded: bool = False
    """Another run has taken the task over: the calling run was reset away, or belongs to another task."""
    is_row_missing: bool = False
    is_store_away: bool = False
    is_known: bool = False
    """The row already knew what the reply names before the call was answered."""

    @property
    def is_possible(self) -> bool:
        """Whether something may have been done for the task that the acting run does not know."""
        return self.lives > 0 or self.has_ended or self.is_given_back or self.is_row_missing or self.is_store_away

    @property
    def is_sure(self) -> bool:
        """Whether the row records an earlier life, or was itself lost."""
        return self.lives > 0 or self.is_row_missing

    @property
    def must_stop(self) -> bool:
        """Whether the acting run must start nothing more."""
        return self.has_ended or self.is_given_back or self.is_superseded
