"""What answers report about earlier lives of this task: its run was reset, or the store was (contract §4).

The calls that begin something read the task's row first. Under a row that has ended, or is being given back, a run
begins nothing more: it gives back what it holds and returns the row's outcome.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from comfyui_temporal.contracts.errors import Answer, RefusalKind
from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE, EarlierLife
from comfyui_temporal.contracts.requests import is_key_conflict
from workflows.failures import RowEnded

MOST_KEYS_TAKEN: Final = 100
"""So many keys in a row at most are an earlier life's, beyond those of which is known what they made."""
KEYS_BOUNDED: Final = "taken-keys-bounded"


def is_of_store(error: BaseException | None) -> bool:
    """Whether a call failed because the task store, which is read before it, did not answer."""
    while error is not None:
        if isinstance(error, ApplicationError) and error.type == STORE_UNAVAILABLE:
            return True
        error = error.__cause__
    return False


def was_stopped(answer: Answer[Any]) -> bool:
    """Whether a call was not made because the task's row lets nothing more begin."""
    return answer.refusal is not None and answer.refusal.kind is RefusalKind.TASK_ENDED


class EarlierLives:
    """Everything that was reported so far. It is one of the concerns of a run that waits for its job."""

    def __init__(self) -> None:
        self.life = EarlierLife()

    @property
    def is_possible(self) -> bool:
        """Whether something may have been done for the task that this run does not know."""
        return self.life.is_possible

    def learn_from(self, answer: Answer[Any]) -> None:
        if answer.earlier_life is not None:
            self.add(answer.earlier_life)

    def add(self, life: EarlierLife) -> None:
        """Merge a report with those before: a later one may lack what is known, while the store is away for example."""
        known = self.life
        flags = {name: True for name in EarlierLife.model_fields if getattr(known, name) is True}
        self.life = life.model_copy(update={**flags, "lives": max(known.lives, life.lives), "is_known": False})

    def raise_if_ended(self) -> None:
        """Raise RowEnded where nothing more may be begun."""
        if self.life.must_stop:
            raise RowEnded()

    # As a concern of the follow loop

    def has_update(self) -> bool:
        return self.life.must_stop

    def due(self) -> datetime | None:
        return None

    def check(self) -> None:
        self.raise_if_ended()


def is_key_of_earlier_life(answer: Answer[Any], earlier: EarlierLives) -> bool:
    """Whether an earlier life of the task used the key with another body."""
    return is_key_conflict(answer) and earlier.is_possible


def are_not_of_earlier_life(taken: int, *, known: int = 0) -> bool:
    """Whether `taken` keys in a row are too many to be an earlier life's: the service would refuse each further one."""
    return taken >= known + MOST_KEYS_TAKEN and workflow.patched(KEYS_BOUNDED)


class EarlierLifePossible(Exception):
    """A call that settles was not made: the task's ledger is read first. `charged`: points charged before it."""

    def __init__(self, *, charged: int = 0) -> None:
        self.charged = charged
        super().__init__()


def raise_unless_settled(answer: Answer[Any]) -> None:
    """Raise RowEnded or EarlierLifePossible where a call that settles was not made."""
    if was_stopped(answer):
        raise RowEnded()
    if answer.refusal is not None and answer.refusal.kind is RefusalKind.READ_THE_LEDGER:
        raise EarlierLifePossible()
