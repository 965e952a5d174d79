"""Log lines of trainings → task store, without the workflow (decision 4).

One transaction in flight per task; lines that arrive meanwhile are the next batch. So a flood of one task's lines uses
one connection, and no transaction waits for the lock on that task's row.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog

from comfyui_temporal.contracts.task_store import TrainingLogWrite
from store import StoreFailure, StoreUnavailable, TaskStore, TaskUnknown

log = structlog.get_logger(__name__)

WRITE_SECONDS: Final = 2.5
"""How long a sender waits for its lines to be stored before it must send again."""
MAX_LINES_PENDING: Final = 20_000
"""Limit of one task. Beyond it senders must send again."""


class Logged(StrEnum):
    STORED = "stored"
    TASK_UNKNOWN = "task_unknown"
    UNAVAILABLE = "unavailable"


@dataclass
class Pending:
    write: TrainingLogWrite
    answer: asyncio.Future[Logged]


class TrainingLogWriter:
    """Stores log lines. The store skips known lines, and those of a training that the task's row does not name."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._pending: dict[str, list[Pending]] = {}
        self._writers: dict[str, asyncio.Task[None]] = {}

    async def take(self, write: TrainingLogWrite) -> Logged:
        """Store the lines. Answers within 2.5 s and never raises."""
        pending = self._pending.setdefault(write.task_id, [])
        if sum(len(other.write.lines) for other in pending) >= MAX_LINES_PENDING:
            return Logged.UNAVAILABLE
        answer: asyncio.Future[Logged] = asyncio.get_running_loop().create_future()
        pending.append(Pending(write, answer))
        if write.task_id not in self._writers:
            self._writers[write.task_id] = asyncio.create_task(self._write_all(write.task_id))
        await asyncio.wait({answer}, timeout=WRITE_SECONDS)
        return answer.result() if answer.done() else Logged.UNAVAILABLE

    async def close(self) -> None:
        """Wait for the transactions in flight; each ends by its own limit."""
        await asyncio.gather(*self._writers.values())

    async def _write_all(self, task_id: str) -> None:
        try:
            while batch := self._pending.pop(task_id, []):
                logged = await self._written(task_id, [pending.write for pending in batch])
                for pending in batch:
                    if not pending.answer.done():
                        pending.answer.set_result(logged)
        finally:
            del self._writers[task_id]

    async def _written(self, task_id: str, writes: list[TrainingLogWrite]) -> Logged:
        try:
            foreign = await self._store.write_log(task_id, writes)
        except TaskUnknown:
            return Logged.TASK_UNKNOWN
        except StoreUnavailable as error:
            log.warning("training_log_not_stored", task_id=task_id, reason=str(error))
            return Logged.UNAVAILABLE
        except StoreFailure as error:
            # PostgreSQL would refuse the same lines again.
            log.error("training_log_refused", task_id=task_id, reason=str(error))
            return Logged.STORED
        if foreign:
            log.warning("training_log_left_out", task_id=task_id, trainings=len(foreign))
        return Logged.STORED
