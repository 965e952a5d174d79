"""Lists that a worker reads in a tenant's name, for routes of a gateway that may not read them itself.

The gateway has no token for ComfyUI and no right to datasets (docs/security.md), so a worker is asked by a short run.
One answer serves a tenant for `FRESH_SECONDS`, and all requests that arrive while it is read.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Generic, TypeVar

import structlog
from pydantic import BaseModel
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import TimeoutError as RunTimedOut

from gateway.problems import Problem, ProblemCode
from gateway.temporal_calls import CALL_SECONDS, temporal_problems

FRESH_SECONDS: Final = 30.0
RUN_SECONDS: Final = 5.0
MAX_TENANTS: Final = 1_000

Listed = TypeVar("Listed", bound=BaseModel)
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ListedBy(Generic[Listed]):
    """Which run reads a list, and what is said where it cannot."""

    workflow: str
    id_prefix: str
    result: type[Listed]
    summary: str
    what: str
    """For sentences: "the templates"."""
    unavailable: ProblemCode
    no_answer: str


class TenantLists(Generic[Listed]):
    """The lists of the tenants that asked last, each as old as `FRESH_SECONDS` at most."""

    def __init__(
        self, temporal: Client, by: ListedBy[Listed], *, task_queue: str, fresh_seconds: float = FRESH_SECONDS
    ) -> None:
        self._temporal = temporal
        self._by = by
        self._task_queue = task_queue
        self._fresh_seconds = fresh_seconds
        self._read: OrderedDict[str, tuple[float, asyncio.Task[Listed]]] = OrderedDict()

    async def of(self, tenant_id: str, question: BaseModel) -> Listed:
        """Raises Problem."""
        now = time.monotonic()
        until, reading = self._read.get(tenant_id, (0.0, None))
        if reading is None or now >= until or _has_failed(reading):
            reading = asyncio.create_task(self._list(tenant_id, question))
            reading.add_done_callback(_has_failed)
            self._read[tenant_id] = now + self._fresh_seconds, reading
            self._read.move_to_end(tenant_id)
            while len(self._read) > MAX_TENANTS:
                self._read.popitem(last=False)
        # Somebody who leaves does not end what others wait for.
        return await asyncio.shield(reading)

    async def _list(self, tenant_id: str, question: BaseModel) -> Listed:
        try:
            with temporal_problems():
                # One run for a tenant, whichever of the gateways begins it.
                running = self._temporal.execute_workflow(
                    self._by.workflow,
                    question,
                    id=f"{self._by.id_prefix}{tenant_id}",
                    task_queue=self._task_queue,
                    result_type=self._by.result,
                    id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                    execution_timeout=timedelta(seconds=RUN_SECONDS),
                    static_summary=self._by.summary,
                )
                listed: Listed = await asyncio.wait_for(running, RUN_SECONDS + CALL_SECONDS)
                return listed
        except WorkflowFailureError as failure:
            raise self._problem_of(failure) from None

    def _problem_of(self, failure: WorkflowFailureError) -> Problem:
        # The failure's own sentence names addresses: it is for operators.
        detail = str(failure.cause.__cause__ or failure.cause)[:200]
        log.warning("list_not_read", workflow=self._by.workflow, detail=detail)
        if isinstance(failure.cause, RunTimedOut):
            sentence = f"No worker read {self._by.what} in time: none runs, or it is busy. Try again."
            return Problem(ProblemCode.WORKER_UNAVAILABLE, sentence)
        return Problem(self._by.unavailable, self._by.no_answer)


def _has_failed(reading: asyncio.Task[Listed]) -> bool:
    return reading.done() and (reading.cancelled() or reading.exception() is not None)
