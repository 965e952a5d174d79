"""A training's dataset in temporary object storage: made before the training, deleted when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.datasets import DatasetActivities
from comfyui_temporal.contracts.calls import SnapshotOrder
from comfyui_temporal.contracts.comfyui import SnapshotReference
from comfyui_temporal.contracts.continuation import DatasetState
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.tasks import TrainingTask
from workflows.failures import TaskFailed, failure_from
from workflows.outside_call import OutsideCall
from workflows.stop import Stop

COPY_WITHIN: Final = timedelta(hours=24)


class TrainingDataset:
    """The snapshot of one task; its deletion is the last undo, and follows a good end too."""

    def __init__(self, task: TrainingTask, outside: OutsideCall, stop: Stop, carried: DatasetState) -> None:
        self._outside = outside
        self._stop = stop
        self._source_uri = task.dataset.source_uri
        self._order = SnapshotOrder(
            call_for=outside.call_for,
            dataset_id=task.dataset.dataset_id,
            source_uri=task.dataset.source_uri,
            files=task.dataset.files,
            manifest=task.dataset.manifest,
            files_sha256=task.dataset.files_sha256,
        )
        self.state = carried

    def carry(self) -> DatasetState:
        return self.state

    async def snapshot(self, closes: datetime | None, check_window: Callable[[], None]) -> SnapshotReference:
        """Copy the dataset, until the GPU window `closes` at the latest.

        Raises TaskFailed `dataset_invalid`, what `check_window` raises past it, or TaskStopped.
        """
        self._stop.raise_if_requested()
        at = closes if closes is not None and workflow.patched("copy-ends-with-the-window") else None
        if at is not None:
            check_window()
        self.state.is_asked = True
        handle = self._outside.visible(
            DatasetActivities.snapshot,
            self._order,
            summary="0 snapshot dataset",
            within=COPY_WITHIN,
            attempt_timeout=COPY_WITHIN,
        )
        await self._outside.waiting.answered(handle, at=at, summary="0 snapshot dataset: until the window closes")
        if not handle.done():
            handle.cancel()
        try:
            self.state.snapshot = await handle
        except FailureError as error:
            self._stop.raise_if_requested()
            if at is not None:
                check_window()
            raise failure_from(error, FailureCode.DATASET_INVALID) from error
        return self.state.snapshot

    @property
    def copied(self) -> SnapshotReference:
        if self.state.snapshot is None:
            raise TaskFailed(FailureCode.DATASET_INVALID, "The dataset was not copied.")
        return self.state.snapshot

    async def delete(self) -> None:
        """Delete the copy, and the list that the gateway put beside it; what is already gone is fine."""
        is_listed = self._order.files_sha256 is not None
        may_be_there = self.state.is_asked or self._outside.earlier.is_possible or is_listed
        if self.state.is_deleted or not may_be_there:
            return
        await self._outside.visible(
            DatasetActivities.delete_snapshot,
            self._order.to_delete(),
            summary="5 delete snapshot",
            attempt_timeout=timedelta(minutes=10),
        )
        self.state.is_deleted = True
