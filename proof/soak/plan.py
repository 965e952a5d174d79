"""The options of a soak, and what follows from its seed: the nth task, the nth fault, the pauses between faults."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from comfyui_temporal.contracts.tasks import ImageTask, TrainingTask
from proof.simulators.credits_profile import CONTRACT

TENANTS: Final = ("tenant-demo", "tenant-other")
USERS_A_TENANT: Final = 20
"""Enough that the newest entries of a ledger without pages (contract §4 (field)) reach back to each open task."""
TRAININGS: Final = 0.08
"""Share of the tasks."""
STARTED_TWICE: Final = 0.03
_EXTRAS: Final[tuple[dict[str, Any], ...]] = ({}, {"seed": 7}, {"hires_fix": True}, {"upscaler": "4x", "seed": 11})
_IMAGE_TEMPLATES: Final = ("text-to-image", "image-to-image", "upscale")


class Plan(BaseModel):
    """The same plan makes the same tasks and the same faults; when they meet depends on the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: int = Field(ge=1)
    seed: int = 1
    most_open: int = Field(default=80, ge=1)
    """Tasks open at once."""
    mean_gap_seconds: float = Field(default=3.5, gt=0)
    """Between the starts of two faults."""
    speed: float = Field(default=100.0, gt=0)
    """Speed of the simulated work, as a multiple of real time."""
    profile: str = CONTRACT.name
    """Which credits service is simulated (contract §4)."""

    def task_id(self, n: int) -> str:
        return f"soak-{self.seed}-{n}"

    def tenant_id(self, n: int) -> str:
        return TENANTS[n % len(TENANTS)]

    def user_id(self, n: int) -> str:
        return users_of(self.tenant_id(n))[n // len(TENANTS) % USERS_A_TENANT]

    def task(self, n: int, datasets: Path) -> ImageTask | TrainingTask:
        """The nth task. `datasets`: the stack's folder of datasets, one folder a tenant below it."""
        dice = self.dice("task", n)
        tenant_id = self.tenant_id(n)
        named = {
            "task_id": self.task_id(n),
            "tenant_id": tenant_id,
            "user_id": self.user_id(n),
            "priority": dice.choice(["standard", "accelerated"]),
        }
        if dice.random() < TRAININGS:
            dataset = {"dataset_id": "soak", "source_uri": (datasets / tenant_id / "soak").as_uri() + "/"}
            epochs = dice.randint(1, 12)
            hyperparameters = {"epochs": epochs, "batch_size": 1, "learning_rate": 1e-4}
            given = {"dataset": dataset, "hyperparameters": hyperparameters, "max_credits": 1_000}
            return TrainingTask.model_validate({**named, "template_id": "lora-train", **given})
        looks = {"resolution": dice.choice(["sd", "hd", "4k"]), "extras": dice.choice(_EXTRAS)}
        template = dice.choice(_IMAGE_TEMPLATES)
        return ImageTask.model_validate({**named, "template_id": template, "prompt": f"picture {n}", **looks})

    def is_started_twice(self, n: int) -> bool:
        return self.dice("twice", n).random() < STARTED_TWICE

    def dice(self, what: str, n: int) -> random.Random:
        """A random generator for one thing: the same in every run, independent of other draws."""
        return random.Random(f"{self.seed}:{what}:{n}")  # noqa: S311


def users_of(tenant_id: str) -> list[str]:
    return [f"user-{n}-of-{tenant_id}" for n in range(USERS_A_TENANT)]
