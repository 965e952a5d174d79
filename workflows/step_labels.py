"""The labels of activities and timers in the Temporal UI. Each begins with a row of its task's step table.

The two tables number their rows differently (docs/architecture.md): an image task settles in row 5 and records in row
6, a training records in row 5 and settles in row 6. A label is user metadata: changing one breaks no replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from comfyui_temporal.contracts.permissions import Scene

ACCEPT: Final = "0 accept"
HOLD: Final = "3 hold"
POLL: Final = "4 poll"
WAIT: Final = "4 wait: callback, poll, deadline"
RETRY: Final = "4 retry: next attempt"


@dataclass(frozen=True)
class StepLabels:
    """The labels that differ between the step tables. `settle` and `record` are the numbers of these rows."""

    submit: str
    estimate: str
    settle: int
    record_row: int

    @property
    def commit(self) -> str:
        return f"{self.settle} commit"

    @property
    def charge(self) -> str:
        return f"{self.settle} charge"

    @property
    def ledger(self) -> str:
        return f"{self.settle} ledger"

    @property
    def cancel_job(self) -> str:
        return f"{self.settle} cancel job"

    @property
    def cancel_hold(self) -> str:
        return f"{self.settle} cancel hold"

    @property
    def read_row(self) -> str:
        return f"{self.settle} read the task's row"

    @property
    def delete_snapshot(self) -> str:
        return f"{self.settle} delete snapshot"

    @property
    def record(self) -> str:
        return f"{self.record_row} record"


STEP_LABELS: Final = {
    Scene.IMAGE_GENERATE: StepLabels(submit="1 submit", estimate="2 agree", settle=5, record_row=6),
    Scene.MODEL_TRAIN: StepLabels(submit="1 create", estimate="3 estimate", settle=6, record_row=5),
}
