"""The labels of activities and timers in the Temporal UI. Each begins with a row of its task's step table; those of
timers go on with `wait`.

The two tables number their rows differently (docs/architecture.md): an image task settles in row 5 and records in row
6, a training records in row 5 and settles in row 6. A label is user metadata: changing one breaks no replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from comfyui_temporal.contracts.scenes import SCENES, StepRows

ACCEPT: Final = "0 accept"
HOLD: Final = "3 hold"
POLL: Final = "4 poll"
HEARD: Final = "4 ticks heard"
WAIT: Final = "4 wait: callback, poll, deadline"
RETRY: Final = "4 wait: next attempt"


def wait_in(step: str, what: str) -> str:
    """The label of a timer: `1 submit` → `1 wait: submit (…)`. All that is not called `wait` is a call or a write."""
    row, _, name = step.partition(" ")
    return f"{row} wait: {name} ({what})"


@dataclass(frozen=True)
class StepLabels:
    """The labels that differ between the step tables."""

    rows: StepRows

    @property
    def price_check(self) -> str:
        return self.rows.price_check

    @property
    def submit(self) -> str:
        return self.rows.submit

    @property
    def estimate(self) -> str:
        return self.rows.estimate

    @property
    def commit(self) -> str:
        return f"{self.rows.settle} commit"

    @property
    def charge(self) -> str:
        return f"{self.rows.settle} charge"

    @property
    def ledger(self) -> str:
        return f"{self.rows.settle} ledger"

    @property
    def cancel_job(self) -> str:
        return f"{self.rows.settle} cancel job"

    @property
    def cancel_hold(self) -> str:
        return f"{self.rows.settle} cancel hold"

    @property
    def read_row(self) -> str:
        return f"{self.rows.settle} read the task's row"

    @property
    def delete_snapshot(self) -> str:
        return f"{self.rows.settle} delete snapshot"

    @property
    def record(self) -> str:
        return f"{self.rows.record} record"


STEP_LABELS: Final = {scene: StepLabels(spec.steps) for scene, spec in SCENES.items()}
