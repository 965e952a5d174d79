"""A task's story in the worker's log, one line for each thing that happened: started, submitted, held, delivered,
settled, retried and why, ended. Never a prompt, and no text from outside: codes and numbers alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import structlog

from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskClaim, TaskWrite

log = structlog.get_logger(__name__)

MAX_TASKS: Final = 10_000
_WORDS: Final = {
    "accepted": "accepted",
    "submitted": "submitted",
    "held": "held",
    "given_back": "given_back",
    "settled": "settled",
    "retry": "retried",
    "confirm": "waits_for_price",
    "checkpoint": "checkpoint",
    "queue_sla": "queued_for_long",
    "difference": "points_corrected",
}
"""The first part of a fact's key → what happened."""


class TaskStory:
    """Logs what a worker has written. Progress within a stage is logged at DEBUG."""

    def __init__(self) -> None:
        self._stages: OrderedDict[str, tuple[str | None, int]] = OrderedDict()

    def claimed(self, claim: TaskClaim, *, is_ours: bool) -> None:
        """A run has claimed the task's id, or found it taken."""
        log.info(
            "task_started" if is_ours else "task_id_taken",
            task_id=claim.task_id,
            tenant_id=claim.tenant_id,
            scene=claim.scene.value,
            template_id=claim.template_id,
            priority=claim.priority.value,
        )

    def written(self, write: TaskWrite) -> None:
        """These facts are in the task store."""
        for fact in write.facts:
            (log.debug if self._is_progress(write.task_id, fact) else log.info)(
                f"task_{_what(fact)}",
                task_id=write.task_id,
                status=fact.status.value,
                **_given(
                    stage=fact.stage,
                    progress=fact.progress,
                    attempt=fact.attempt,
                    points=fact.credits_delta,
                    code=_code(write, fact),
                ),
            )
            if fact.is_end:
                self._stages.pop(write.task_id, None)

    def _is_progress(self, task_id: str, fact: Fact) -> bool:
        if fact.sequence is None or fact.is_end:
            return False
        before, now = self._stages.get(task_id), (fact.stage, fact.attempt)
        self._stages[task_id] = now
        self._stages.move_to_end(task_id)
        if len(self._stages) > MAX_TASKS:
            self._stages.popitem(last=False)
        return before == now


def _what(fact: Fact) -> str:
    if fact.is_end:
        return fact.status.value
    if fact.sequence is not None and fact.event is EventType.RUNNING:
        return "delivered" if fact.stage == "delivery" else "runs"
    return _WORDS.get(fact.key.partition(":")[0], "changed")


def _code(write: TaskWrite, fact: Fact) -> str | None:
    """Why: the fact's own error, or for a retry the error of the job that ended."""
    if fact.error is not None:
        return fact.error.code
    is_retry = fact.key.startswith("retry:")
    return write.state.error.code if is_retry and write.state.error is not None else None


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
