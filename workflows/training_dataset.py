"""A training's dataset in temporary object storage: copied before the training, deleted when it has ended."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.datasets import DatasetActivities
from comfyui_temporal.contracts.calls import SnapshotOrder
from comfyui_temporal.contracts.comfyui import SnapshotReference
from comfyui_temporal.contracts.continuation import DatasetState
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.tasks import TrainingTask
from workflows.failures import TaskFailed, failure_from
from workflows.gpu_window import Window
from workflows.outside_call import OutsideCall
from workflows.stop import Stop

COPY_WITHIN: Final = timedelta(hours=24)
DELETE_TIMEOUT: Final = timedelta(minutes=10)


class TrainingDataset:
    """The snapshot of one task. Its deletion is the last undo, and follows a completed task too."""

    def __init__(
        self, task: TrainingTask, outside: OutsideCall, stop: Stop, window: Window, state: DatasetState
    ) -> None:
        self._task = task
        self._outside = outside
        self._stop = stop
        self._window = window
        self.state = state
        self._order = SnapshotOrder(
            call_for=outside.call_for,
            dataset_id=task.dataset.dataset_id,
            source_uri=task.dataset.source_uri,
            files=task.dataset.files,
            manifest=task.dataset.manifest,
            files_sha256=task.dataset.files_sha256,
        )

    def carry(self) -> DatasetState:
        return self.state

    def check_addresses(self, policy: Policy) -> None:
        """Raise TaskFailed `input_invalid` for an address outside the tenant's own prefixes (contract §8)."""
        dataset = self._task.dataset
        if dataset.names_files_twice:
            raise TaskFailed(
                FailureCode.INPUT_INVALID,
                "The input is not valid: dataset: files and manifest exclude each other: name the files in one way.",
            )
        addresses = {
            "dataset.source_uri": dataset.source_uri,
            "dataset.manifest.uri": dataset.manifest.uri if dataset.manifest else None,
            "resume_from": self._task.resume_from,
        }
        for field, uri in addresses.items():
            if uri is not None and not policy.is_own_address(uri):
                roots = ", ".join(policy.dataset_roots) or "no folder: COMFYUI_TEMPORAL_DATASET_ROOTS names none"
                raise TaskFailed(
                    FailureCode.INPUT_INVALID, f"The input is not valid: {field}: must lie under one of {roots}."
                )

    async def snapshot(self) -> SnapshotReference:
        """Copy the dataset, until the GPU window closes at the latest.

        Raises TaskFailed `dataset_invalid`, `gpu_unavailable` past the window, or TaskStopped.
        """
        self._stop.raise_if_requested()
        closes = self._window.closes
        at = closes if closes is not None and workflow.patched("copy-ends-with-the-window") else None
        if at is not None:
            self._window.check()
        self.state.is_asked = True
        handle = self._outside.visible(
            DatasetActivities.snapshot,
            self._order,
            summary="0 snapshot dataset",
            within=COPY_WITHIN,
            attempt_timeout=COPY_WITHIN,
        )
        await self._outside.waits.answered(handle, at=at, summary="0 wait: snapshot dataset (until the window closes)")
        if not handle.done():
            handle.cancel()
        try:
            self.state.snapshot = await handle
        except FailureError as error:
            self._stop.raise_if_requested()
            if at is not None:
                self._window.check()
            raise failure_from(error, FailureCode.DATASET_INVALID) from error
        return self.state.snapshot

    @property
    def copied(self) -> SnapshotReference:
        """The snapshot. Raises TaskFailed `dataset_invalid` where there is none."""
        if self.state.snapshot is None:
            raise TaskFailed(FailureCode.DATASET_INVALID, "The dataset was not copied.")
        return self.state.snapshot

    async def delete(self) -> None:
        """Delete the copy, and the list that the gateway stored with it. It is no error if they are gone already."""
        is_listed = self._order.files_sha256 is not None
        may_exist = self.state.is_asked or self._outside.earlier.is_possible or is_listed
        if self.state.is_deleted or not may_exist:
            return
        await self._outside.visible(
            DatasetActivities.delete_snapshot,
            self._order.to_delete(),
            summary=self._outside.labels.delete_snapshot,
            attempt_timeout=DELETE_TIMEOUT,
        )
        self.state.is_deleted = True
