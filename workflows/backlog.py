"""Facts and exception records that wait for the task store, in order, bounded by count and by bytes.

The store may be away for days while a training goes on. This is dropped first when there is too much:

    facts        the oldest progress within a stage; then the oldest fact of any kind, replaced by one fact that says
                 how many are missing. The newest fact, the settlement and the end are kept
    exceptions   the first of each code is kept; further ones are counted in one record
"""

from __future__ import annotations

from typing import Final

from comfyui_temporal.contracts.continuation import RecordState
from comfyui_temporal.contracts.fields import shortened
from comfyui_temporal.contracts.size_budget import (
    MAX_EXCEPTIONS,
    MAX_EXCEPTIONS_BYTES,
    MAX_UNWRITTEN,
    MAX_UNWRITTEN_BYTES,
    json_bytes,
)
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskException
from workflows.measured import Measured

LEFT_OUT: Final = "left_out:"
SHORT_MESSAGE_BYTES: Final = 256
_ALWAYS_KEPT: Final = frozenset({"settled", "end"})


class Backlog:
    """The flow appends, the one writer takes. Facts that are being written are not touched."""

    def __init__(self, state: RecordState) -> None:
        self._facts = Measured(state.unwritten)
        self._exceptions = Measured(state.exceptions)
        self._facts_in_flight = 0
        self._exceptions_in_flight = 0

    @property
    def is_empty(self) -> bool:
        return not self._facts.items and not self._exceptions.items

    # The writer

    def take(self) -> tuple[list[Fact], list[TaskException]]:
        """Everything that waits. It is in flight until `written` is called."""
        facts, exceptions = list(self._facts.items), list(self._exceptions.items)
        self._facts_in_flight, self._exceptions_in_flight = len(facts), len(exceptions)
        return facts, exceptions

    def written(self) -> None:
        """What was taken is written, or will never be written."""
        self._facts.remove_first(self._facts_in_flight)
        self._exceptions.remove_first(self._exceptions_in_flight)
        self._facts_in_flight = self._exceptions_in_flight = 0

    # The flow

    def add(self, fact: Fact) -> None:
        """Append a fact; progress replaces the progress just before it."""
        waiting = self._facts.items
        if len(waiting) > self._facts_in_flight and _is_progress(fact) and _same_stage(waiting[-1], fact):
            self._facts.replace(len(waiting) - 1, _with_change_of(waiting[-1], fact))
            return
        if len(waiting) >= MAX_UNWRITTEN:
            self._leave_out_progress(len(waiting))
        self._facts.append(fact)
        while self._facts.total_bytes > MAX_UNWRITTEN_BYTES:
            if not self._leave_out_progress(len(waiting) - 1) and not self._leave_out_any():
                break

    def _leave_out_progress(self, end: int) -> bool:
        """Leave out the oldest progress whose stage a later fact still shows."""
        waiting = self._facts.items
        last_of = {(fact.job_id, fact.stage): i for i, fact in enumerate(waiting) if _is_progress(fact)}
        within = (i for i in range(self._facts_in_flight, end) if _is_progress(waiting[i]))
        oldest = next((i for i in within if last_of[waiting[i].job_id, waiting[i].stage] > i), None)
        if oldest is None:
            return False
        left_out = waiting[oldest]
        later = next(i for i in range(oldest + 1, len(waiting)) if _same_stage(left_out, waiting[i]))
        self._facts.replace(later, _with_change_of(left_out, waiting[later]))
        self._facts.remove(oldest)
        return True

    def _leave_out_any(self) -> bool:
        waiting = self._facts.items
        places = range(self._facts_in_flight, len(waiting) - 1)
        marker = next((i for i in places if waiting[i].key.startswith(LEFT_OUT)), None)
        oldest = next((i for i in places if i != marker and waiting[i].key not in _ALWAYS_KEPT), None)
        if oldest is None:
            return False
        if marker is None:
            self._facts.replace(oldest, _in_place_of(waiting[oldest], 1))
        else:
            self._facts.replace(marker, _in_place_of(waiting[marker], _count_of(waiting[marker]) + 1))
            self._facts.remove(oldest)
        return True

    def add_exception(self, record: TaskException) -> None:
        """Append a record. Past the limit: the first of its code, shortened, and then only their number."""
        waiting = self._exceptions.items
        size = self._exceptions.total_bytes + json_bytes(record)
        alike = [i for i in range(self._exceptions_in_flight, len(waiting)) if waiting[i].code == record.code]
        if len(waiting) < MAX_EXCEPTIONS and size <= MAX_EXCEPTIONS_BYTES:
            self._exceptions.append(record)
        elif not alike:
            message = shortened(record.message, SHORT_MESSAGE_BYTES)
            self._exceptions.append(record.model_copy(update={"message": message}))
        else:
            self._count(record, alike)

    def _count(self, record: TaskException, alike: list[int]) -> None:
        waiting = self._exceptions.items
        place = next((i for i in alike if waiting[i].key.startswith(LEFT_OUT)), None)
        counted = None if place is None else waiting[place]
        left_out = 1 + (int(counted.details["left_out"]) if counted is not None else 0)
        counting = TaskException(
            key=counted.key if counted is not None else f"{LEFT_OUT}{record.code}:{record.ts.isoformat()}",
            code=record.code,
            message=f"{left_out} more records of this kind were left out while the task store was away.",
            details={"left_out": left_out},
            ts=record.ts,
        )
        if place is None:
            self._exceptions.append(counting)
        else:
            self._exceptions.replace(place, counting)


def _is_progress(fact: Fact) -> bool:
    return fact.event is EventType.RUNNING and fact.sequence is not None and fact.message is None


def _same_stage(earlier: Fact, later: Fact) -> bool:
    return _is_progress(earlier) and (earlier.job_id, earlier.stage) == (later.job_id, later.stage)


def _with_change_of(earlier: Fact, later: Fact) -> Fact:
    """`later` in place of `earlier`: a change stays one, as the store leaves out other progress than the newest."""
    return later.model_copy(update={"is_change": True}) if earlier.is_change and not later.is_change else later


def _count_of(marker: Fact) -> int:
    return int(marker.key.rpartition(":")[2])


def _in_place_of(fact: Fact, left_out: int) -> Fact:
    """A fact that says how many are missing here. Its key holds their number."""
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
