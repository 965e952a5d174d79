"""What differs on the wire between an image job and a training: the routes, and how their messages are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.comfyui import JobCallback, JobState, TrainingCallback, TrainingState
from comfyui_temporal.contracts.continuation import JobUpdate


@dataclass(frozen=True)
class JobRoutes:
    """The calls of one kind of job, and its messages in the words both flows share."""

    submit: Any
    get: Any
    cancel: Any
    submit_summary: str
    callback: type[JobCallback] | type[TrainingCallback]

    def news_of(self, body: dict[str, Any]) -> JobUpdate:
        """Raises pydantic.ValidationError where the body is no message of this kind."""
        return self.news_of_state(self.callback.model_validate(body))

    def news_of_state(self, state: JobState | TrainingState) -> JobUpdate:
        return JobUpdate.of_job(state) if isinstance(state, JobState) else JobUpdate.of_training(state)


IMAGE_ROUTES = JobRoutes(
    submit=ComfyUIActivities.submit_job,
    get=ComfyUIActivities.get_job,
    cancel=ComfyUIActivities.cancel_job,
    submit_summary="1 submit",
    callback=JobCallback,
)
TRAINING_ROUTES = JobRoutes(
    submit=ComfyUIActivities.create_training,
    get=ComfyUIActivities.get_training,
    cancel=ComfyUIActivities.cancel_training,
    submit_summary="1 create",
    callback=TrainingCallback,
)
