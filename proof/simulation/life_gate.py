"""The check before calls that begin or settle something: the task's row is read (contract §4, earlier lives).

begin     submit, create, start, pre-deduct: not once the task has ended; wait for a store that is away
charge    as begin, and not before the ledger was read where an earlier life may have charged
settle    commit: as charge, but it does not wait for a store that is away
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobAccepted, TrainingAccepted
from comfyui_temporal.contracts.credits import HoldReply
from comfyui_temporal.contracts.errors import Answer, FailureCode, Refusal
from comfyui_temporal.contracts.lives import READ_THE_LEDGER, TASK_ENDED, EarlierLife
from proof.simulation.store_model import Caller, StoreModel

START: Final = frozenset({"submit_job", "create_training", "start_training", "pre_deduct"})
SETTLING: Final = frozenset({"commit", "charge"})


class StoreAway(Exception):
    """The task store did not answer: the call was not made."""


class LifeGate:
    """Lets a call through, or answers in the other party's stead. `is_away`: whether the store does not answer now."""

    def __init__(self, store: StoreModel, is_away: Callable[[], bool]) -> None:
        self._store = store
        self._is_away = is_away

    def through(self, name: str, asked: Any, caller: Caller, call: Callable[[Any], Any]) -> Any:
        """Raises StoreAway, and what the call raises."""
        if name not in START | SETTLING or (isinstance(asked, Post) and asked.is_undo):
            return call(asked)
        life = self._life(name, asked, caller)
        if life.must_stop:
            return Answer(refusal=_refusal(TASK_ENDED), earlier_life=life)
        has_read = isinstance(asked, Post) and asked.has_read_ledger
        if name in SETTLING and life.is_possible and not has_read:
            return Answer(refusal=_refusal(READ_THE_LEDGER), earlier_life=life)
        answer = call(asked)
        return answer if name in SETTLING else self._noted(answer, life)

    def _life(self, name: str, asked: Any, caller: Caller) -> EarlierLife:
        if self._is_away():
            if name != "commit":
                raise StoreAway
            return EarlierLife(is_store_away=True)
        return self._store.register(caller.run_id, asked.call_for.run_number, asked.call_for.first_execution_run_id)

    def _noted(self, answer: Answer[Any], life: EarlierLife) -> Answer[Any]:
        is_known = False
        match answer.reply:
            case HoldReply(pre_deduct_id=made):
                is_known = self._store.record_id(made, self._store.hold_ids)
            case JobAccepted(job_id=made) | TrainingAccepted(training_id=made):
                is_known = self._store.record_id(made, self._store.job_ids)
        if not life.is_possible:
            return answer
        return answer.model_copy(update={"earlier_life": life.model_copy(update={"is_known": is_known})})


def _refusal(message: str) -> Refusal:
    return Refusal(code=FailureCode.TASK_CONFLICT, message=message, http_status=0, sentence=f"Not made: {message}.")
