"""Tasks whose settlement is unknown: the reconciler takes them from the task store and corrects them."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.running_call import uninterrupted
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.reconcile import UnsettledLook
from comfyui_temporal.contracts.task_store import Correction, UnsettledTask
from store import StoreFailure, StoreUnavailable, TaskStore

TAKEN_AT_ONCE: Final = 50


class UnsettledActivities:
    """Each may be repeated: a taken task is returned again once it is due, and a correction is made once."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    @activity.defn
    async def take_unsettled(self, look: UnsettledLook) -> list[UnsettledTask]:
        """Some tasks whose ledger is due for a check. Raises ApplicationError `internal`, retried."""
        try:
            return await uninterrupted(
                self._store.take_unsettled(every=timedelta(seconds=look.every_seconds), limit=TAKEN_AT_ONCE)
            )
        except StoreUnavailable as failure:
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None

    @activity.defn
    async def correct_settlement(self, correction: Correction) -> bool:
        """Whether the row was corrected. Raises ApplicationError `internal`, retried while PostgreSQL is away."""
        try:
            return await uninterrupted(self._store.correct_settlement(correction))
        except StoreFailure as failure:
            is_final = not isinstance(failure, StoreUnavailable)
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value, non_retryable=is_final) from None
