"""What waits for the task store: facts and exception records, in order, bounded by count and by bytes.

The store may be away for days while a training is renewed and told of. What goes first when there is too much:

    facts        progress within a stage, the oldest; then any fact, the oldest, in whose place one says how many are
                 left out; the newest, the settlement and the end stay
    exceptions   the first of each code stays; further ones are counted in a record of their own
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel

from contracts.carried import RecordState
from contracts.fields import shortened
from contracts.size_budget import (
    MAX_EXCEPTIONS,
    MAX_EXCEPTIONS_BYTES,
    MAX_UNWRITTEN,
    MAX_UNWRITTEN_BYTES,
    json_bytes,
)
from contracts.task_store import Fact, TaskException
from contracts.tasks import EventType

LEFT_OUT: Final = "left_out:"
SHORT_MESSAGE_BYTES: Final = 256
_ALWAYS_KEPT: Final = frozenset({"settled", "end"})


class Backlog:
    """Appended to by the flow, taken from by the one writer; what is being written is not touched."""

    def __init__(self, carried: RecordState) -> None:
        self._carried = carried
        self._facts_in_flight = 0
        self._exceptions_in_flight = 0

    @property
    def is_empty(self) -> bool:
        return not self._carried.unwritten and not self._carried.exceptions

    # The writer

    def take(self) -> tuple[list[Fact], list[TaskException]]:
        """All that waits, from now on in flight until it is `written`."""
        facts, exceptions = list(self._carried.unwritten), list(self._carried.exceptions)
        self._facts_in_flight, self._exceptions_in_flight = len(facts), len(exceptions)
        return facts, exceptions

    def written(self) -> None:
        """What was taken is written, or will never be."""
        del self._carried.unwritten[: self._facts_in_flight]
        del self._carried.exceptions[: self._exceptions_in_flight]
        self._facts_in_flight = self._exceptions_in_flight = 0

    # The flow

    def add(self, fact: Fact) -> None:
        """Append a fact; progress takes the place of the progress before it."""
        waiting = self._carried.unwritten
        if len(waiting) > self._facts_in_flight and _is_progress(fact) and _same_stage(waiting[-1], fact):
            waiting[-1] = fact
            return
        if len(waiting) >= MAX_UNWRITTEN:
            droppable = next((i for i in range(self._facts_in_flight, len(waiting)) if _is_progress(waiting[i])), None)
            if droppable is not None:
                del waiting[droppable]
        waiting.append(fact)
        while _bytes_of(waiting) > MAX_UNWRITTEN_BYTES and self._leave_out_a_fact():
            pass

    def _leave_out_a_fact(self) -> bool:
        """Whether there was one to leave out."""
        waiting = self._carried.unwritten
        places = range(self._facts_in_flight, len(waiting) - 1)
        progress = next((i for i in places if _is_progress(waiting[i])), None)
        if progress is not None:
            del waiting[progress]
            return True
        marker = next((i for i in places if waiting[i].key.startswith(LEFT_OUT)), None)
        oldest = next((i for i in places if i != marker and waiting[i].key not in _ALWAYS_KEPT), None)
        if oldest is None:
            return False
        if marker is None:
            waiting[oldest] = _in_place_of(waiting[oldest], 1)
        else:
            waiting[marker] = _in_place_of(waiting[marker], _count_of(waiting[marker]) + 1)
            del waiting[oldest]
        return True

    def add_exception(self, record: TaskException) -> None:
        """Append a record; past the limit the first of its code, in short, and then their number."""
        waiting = self._carried.exceptions
        is_full = len(waiting) >= MAX_EXCEPTIONS or _bytes_of([*waiting, record]) > MAX_EXCEPTIONS_BYTES
        alike = [i for i in range(self._exceptions_in_flight, len(waiting)) if waiting[i].code == record.code]
        if not is_full:
            waiting.append(record)
        elif not alike:
            message = shortened(record.message, SHORT_MESSAGE_BYTES)
            waiting.append(record.model_copy(update={"message": message}))
        else:
            self._count(record, alike)

    def _count(self, record: TaskException, alike: list[int]) -> None:
        waiting = self._carried.exceptions
        counted = next((i for i in alike if waiting[i].key.startswith(LEFT_OUT)), None)
        left_out = 1 + (int(waiting[counted].details["left_out"]) if counted is not None else 0)
        key = waiting[counted].key if counted is not None else f"{LEFT_OUT}{record.code}:{record.ts.isoformat()}"
        counting = TaskException(
            key=key,
            code=record.code,
            message=f"{left_out} more records of this kind were left out while the task store was away.",
            details={"left_out": left_out},
            ts=record.ts,
        )
        if counted is None:
            waiting.append(counting)
        else:
            waiting[counted] = counting


def _bytes_of(models: Iterable[BaseModel]) -> int:
    return sum(json_bytes(model) for model in models)


def _is_progress(fact: Fact) -> bool:
    return fact.event is EventType.RUNNING and fact.sequence is not None and fact.message is None


def _same_stage(earlier: Fact, later: Fact) -> bool:
    return _is_progress(earlier) and (earlier.job_id, earlier.stage) == (later.job_id, later.stage)


def _count_of(marker: Fact) -> int:
    return int(marker.key.rpartition(":")[2])


def _in_place_of(fact: Fact, left_out: int) -> Fact:
    """A fact that says how many are missing here. Its key holds their number: it names what was left out."""
    first = fact.key if not fact.key.startswith(LEFT_OUT) else fact.key.removeprefix(LEFT_OUT).rpartition(":")[0]
    return Fact(
        key=f"{LEFT_OUT}{first[:200]}:{left_out}",
        event=EventType.RUNNING,
        ts=fact.ts,
        attempt=fact.attempt,
        status=fact.status,
        stage=fact.stage,
        progress=fact.progress,
        message=f"{left_out} events were left out while the task store was away.",
    )
