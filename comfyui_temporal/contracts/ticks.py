"""Ticks: reports of a job that change only its figures (contract §2). The gateway stores them without the workflow.

The task's row keeps what the workflow last took of its current job. Only a report that is equal to it but for its
figures is a tick, at every gateway. All others are signals.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.task_store import TakenReport

FIGURES: Final = frozenset({"sequence", "progress", "next_eta", "queue_position", "gpu_hours_used"})


def digest_of(update: JobUpdate) -> str:
    """A hash of all that a report says beside its figures."""
    said = update.model_dump_json(exclude=set(FIGURES), exclude_defaults=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def report_taken(update: JobUpdate) -> TakenReport:
    """What the row keeps of a report that the workflow took."""
    return TakenReport(job_id=update.job_id, sequence=update.sequence, digest=digest_of(update))


class Tick(OwnModel):
    """A report that may be a tick. The task's row decides."""

    task_id: str
    job_id: str
    sequence: int
    digest: str
    progress: float | None = None
    next_eta: Instant | None = None
    queue_position: int | None = None
    traceparent: str | None = None

    @classmethod
    def of(cls, task_id: str, update: JobUpdate, traceparent: str | None = None) -> Tick:
        return cls(
            task_id=task_id,
            traceparent=traceparent,
            digest=digest_of(update),
            **update.model_dump(include={"job_id", "sequence", "progress", "next_eta", "queue_position"}),
        )


class TickVerdict(StrEnum):
    """What the task's row says about a tick."""

    WRITTEN = "written"
    """It is an event of the task now."""
    OUTDATED = "outdated"
    """A newer report of the job was written before: it changes nothing."""
    ENDED = "ended"
    """The task has ended: it changes nothing."""
    TOO_EARLY = "too_early"
    """Less than a second after the last one, or another writer has the row: the newest is written when that is over."""
    LOCKED = "locked"
    """Another writer has the row, which did not know a report like it: what that writes decides."""
    NOT_KNOWN = "not_known"
    """The workflow has not taken a report like it, as far as the row knows: it needs a signal."""
