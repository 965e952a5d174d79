"""Which faults are set, and whether one hits an occasion.

An occasion is a request, a callback or the creation of a job. Decisions by probability come from a hash of seed, fault,
route, task and the number of that pair's requests so far: the order of concurrent requests does not change them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from proof.simulators.admin_wire import Fault, FaultKind, FaultOrder, Match, Schedule
from proof.simulators.state_file import StateFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS faults (
    fault_id INTEGER PRIMARY KEY AUTOINCREMENT,
    document TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Occasion:
    """What may go wrong here."""

    route: str
    method: str = "POST"
    task_id: str | None = None
    tenant_id: str | None = None
    callback_status: str | None = None


class Faults:
    """Faults in the order they were set; kept in the state file with their counts."""

    def __init__(self, state: StateFile) -> None:
        self._state = state
        state.lay_out(_SCHEMA)
        self._faults: dict[int, Fault] = {}
        for row in state.rows("SELECT document FROM faults ORDER BY fault_id"):
            fault = Fault.model_validate_json(row["document"])
            self._faults[fault.fault_id] = fault
        self._came: Counter[tuple[int, str, str | None]] = Counter()

    def all(self) -> list[Fault]:
        return list(self._faults.values())

    def set(self, order: FaultOrder) -> Fault:
        fault_id = self._state.run("INSERT INTO faults (document) VALUES ('')")
        fault = Fault(fault_id=fault_id, kind=order.kind, match=order.match, parameters=order.parameters)
        self._faults[fault_id] = fault
        self._save(fault)
        return fault

    def set_schedule(self, schedule: Schedule) -> list[Fault]:
        """One fault a kind; together they hit about `rate` of all occasions of the route."""
        probability = schedule.rate / len(schedule.kinds)
        match = Match(route=schedule.route, probability=probability, seed=schedule.seed, times=None)
        return [self.set(FaultOrder(kind=kind, match=match, parameters=schedule.parameters)) for kind in schedule.kinds]

    def remove(self, fault_id: int | None = None) -> None:
        """One fault, or all of them."""
        for gone in [fault_id] if fault_id is not None else list(self._faults):
            self._faults.pop(gone, None)
            self._state.run("DELETE FROM faults WHERE fault_id = ?", gone)

    def hit(self, occasion: Occasion, kinds: Collection[FaultKind]) -> list[Fault]:
        """The faults of these kinds that hit this occasion; their counts are taken."""
        return [fault for fault in self.all() if fault.kind in kinds and self._hits(fault, occasion)]

    def covers(self, kind: FaultKind, route: str) -> bool:
        """Whether a fault of this kind covers the route. Other conditions are ignored, and nothing is counted."""
        return any(fault.kind is kind and fault.match.route in (None, route) for fault in self.all())

    def _hits(self, fault: Fault, occasion: Occasion) -> bool:
        match = fault.match
        if not _matches(match, occasion) or (match.times is not None and fault.hits >= match.times):
            return False
        fault.seen += 1
        hits = match.nth in (None, fault.seen) and self._is_drawn(fault, occasion)
        fault.hits += hits
        self._save(fault)
        return hits

    def _is_drawn(self, fault: Fault, occasion: Occasion) -> bool:
        if fault.match.probability is None:
            return True
        name = (fault.fault_id, occasion.route, occasion.task_id)
        self._came[name] += 1
        draw = random.Random(f"{fault.match.seed}:{fault.kind}:{occasion.route}:{occasion.task_id}:{self._came[name]}")  # noqa: S311
        return draw.random() < fault.match.probability

    def _save(self, fault: Fault) -> None:
        self._state.run("UPDATE faults SET document = ? WHERE fault_id = ?", fault.model_dump_json(), fault.fault_id)


def _matches(match: Match, occasion: Occasion) -> bool:
    return all(
        wanted is None or wanted == found
        for wanted, found in (
            (match.route, occasion.route),
            (match.method, occasion.method),
            (match.task_id, occasion.task_id),
            (match.tenant_id, occasion.tenant_id),
            (match.callback_status, occasion.callback_status),
        )
    )
