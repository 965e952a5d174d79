"""What the rules share: one schedule's world, and the error that names a violated invariant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comfyui_temporal.contracts.comfyui import JobState, TrainingState
from comfyui_temporal.contracts.errors import HOLD_OUT_OF_SIGHT
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulation.comfyui_model import ComfyUIModel, Work
from proof.simulation.parties import Parties
from proof.simulation.scenario import Scenario
from proof.simulation.witness import Witness

State = JobState | TrainingState


class InvariantViolated(Exception):
    """An invariant does not hold; the text says which."""


def must(holds: bool, sentence: str, *values: Any) -> None:
    if not holds:
        raise InvariantViolated(f"{sentence} {', '.join(map(str, values))}".strip())


@dataclass
class World:
    """The input, the policy, the services' own state, and what the run received of it."""

    scenario: Scenario
    parties: Parties
    witness: Witness
    status: TaskStatus | None = None
    """How the task ended."""
    is_reset: bool = False
    """Whether the task's run was reset: from then on one body may come twice, and only the services know all."""
    reset_at: float = 0.0
    """When it was reset the last time."""
    cancels_seen: list[float] = field(default_factory=list)
    """When the run received a cancel."""

    @property
    def jobs(self) -> ComfyUIModel[Any]:
        return self.parties.jobs if self.scenario.is_image else self.parties.trainings

    @property
    def works(self) -> dict[str, Work[Any]]:
        return self.jobs.works

    @property
    def is_completed(self) -> bool:
        return self.status is TaskStatus.COMPLETED

    def recorded_codes(self) -> set[str]:
        """The codes of the exception records, without that of an unseen hold, which excuses nothing else."""
        records = self.parties.store.exceptions.values()
        return {exception.code for exception in records if exception.key != HOLD_OUT_OF_SIGHT}
