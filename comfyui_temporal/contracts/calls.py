"""One call to another service, as an activity gets it: body and key are in history before the call takes effect."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import Field

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.handed_on import KeptModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import DatasetManifest

Body = TypeVar("Body")


class CallFor(OwnModel):
    """The owner of a call: our token names this tenant and user (contract §7)."""

    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    is_rollback: bool = False
    first_execution_run_id: str | None = None
    run_number: int = 0
    """Of the calling run; see `comfyui_temporal.contracts.lives.TaskRun`."""


class Post(KeptModel, Generic[Body]):
    """A POST. `key` is its `X-Idempotency-Key`; the same key always goes with the same body (contract §4)."""

    call_for: CallFor
    key: str
    body: Body
    is_undo: bool = False
    """Repeats a key to learn what it made, so that it can be undone; also for a task that has ended."""
    has_read_ledger: bool = False
    """A commit or charge after the task's ledger was read, which showed that no earlier life has settled the task."""
    price: int | None = None
    """Of a commit or charge: the whole price of the delivered work in points, also beyond the hold, for a give-back.

    It is not sent. None where an older worker made the request.
    """


def number_in(key: str) -> int:
    """`n` of an idempotency key `{task_id}:{step}:{n}`."""
    return int(key.rpartition(":")[2])


class JobCall(KeptModel):
    """A call about one job or training: `key` only for POSTs (start, cancel)."""

    call_for: CallFor
    job_id: str
    key: str | None = None


class GpuQuestion(CallFor):
    """Whether there are GPUs of `gpu_type`, or of any type."""

    gpu_type: str | None = None


class LedgerQuery(OwnModel):
    """Which ledger entries to read. `task_id` narrows the list if the service supports it (ours)."""

    call_for: CallFor
    task_id: str
    limit: int = Field(default=200, ge=1, le=1000)


class SnapshotOrder(KeptModel):
    """A dataset to be copied to temporary object storage under the task's own folder.

    The files are given in one of three ways, as in `contracts.tasks.DatasetSource`. Without any, all files are copied.
    """

    call_for: CallFor
    dataset_id: str
    source_uri: str
    files: list[str] | None = None
    manifest: DatasetManifest | None = None
    files_sha256: str | None = None

    def to_delete(self) -> SnapshotOrder:
        """The same folder without a list, which a deletion does not need."""
        return SnapshotOrder(call_for=self.call_for, dataset_id=self.dataset_id, source_uri=self.source_uri)
