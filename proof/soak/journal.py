"""The state folder: the plan, every fault, and the events of each finished stream; one JSON object a line.

Nothing else is needed to resume: tasks follow from the plan, and the task table shows which of them were started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from proof.soak.plan import Plan

FILE: Final = "soak.jsonl"


class FaultSeen(BaseModel):
    """One fault as it went. Times in seconds since 1970; `recovery_seconds` from its end to the next event."""

    n: int
    kind: str
    began: float
    over: float
    detail: str = ""
    recovery_seconds: float | None = None


class Journal:
    """Appends; a line that a killed process left half written is dropped when read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.plan: Plan | None = None
        self.faults: dict[int, FaultSeen] = {}
        self.received: dict[str, list[int]] = {}
        """Task → the `seq`s that its stream brought, in order; only of streams that reached their end."""
        self.seconds = 0.0
        """How long it has run, over all sessions."""
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                self._take(line)

    @property
    def exists(self) -> bool:
        return self.plan is not None

    def begin(self, plan: Plan) -> None:
        self.plan = plan
        self._path.write_text(json.dumps({"plan": plan.model_dump()}) + "\n")

    def add_fault(self, fault: FaultSeen) -> None:
        """Also once more when its recovery is known."""
        self.faults[fault.n] = fault
        self._append({"fault": fault.model_dump()})

    def add_received(self, received: Mapping[str, list[int]]) -> None:
        self.received.update(received)
        self._append({"received": dict(received)})

    def add_seconds(self, seconds: float) -> None:
        self.seconds += seconds
        self._append({"seconds": seconds})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if "plan" in entry:
            self.plan = Plan.model_validate(entry["plan"])
        elif "fault" in entry:
            fault = FaultSeen.model_validate(entry["fault"])
            self.faults[fault.n] = fault
        elif "received" in entry:
            self.received.update(entry["received"])
        elif "seconds" in entry:
            self.seconds += entry["seconds"]
