"""What calls return. The models are the same by Temporal and over HTTP; a field that one side cannot know is None."""

from __future__ import annotations

from datetime import datetime

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.scenes import AnyResult
from comfyui_temporal.contracts.start_answer import Reached
from comfyui_temporal.contracts.tasks import Confirmation, CreditsSummary, TaskDelay, TaskStatus, TrainingProgress


class StartedTask(OwnModel):
    """A started task. `is_new` is false if the same input had been started before: then it is the same task."""

    task_id: str
    workflow_id: str
    run_id: str | None = None
    """By Temporal only."""
    is_new: bool
    reached: Reached | None = None
    """Of a start that waits: what it reached; None where it reached nothing in time."""
    credits: CreditsSummary | None = None
    """With `reached` only."""
    confirmation: Confirmation | None = None
    """The price to confirm, where `reached` is `confirmation`."""


class TaskUpdate(TrainingProgress):
    """A task after a change. `confirmation` is set while a training waits for its price to be confirmed."""

    cursor: str | None = None
    """Over HTTP only: `follow(task_id, cursor=…)` continues after this update."""
    standstill: str | None = None
    """By Temporal only: why the task makes no progress (no worker answers, or the run is paused)."""


class TaskSummary(OwnModel):
    """One task of a list."""

    task_id: str
    scene: str | None = None
    status: str | None = None
    stage: str | None = None
    is_paused: bool = False
    """By Temporal only: an operator paused its run, which does not continue until it is unpaused."""
    tenant_id: str | None = None
    user_id: str | None = None
    template_id: str | None = None
    priority: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    workflow_id: str
    run_id: str | None = None
    """By Temporal only."""
    ui_url: str | None = None
    """The run's page in the Temporal UI, if its address is known."""


class TaskOutcome(OwnModel):
    """How a task ended. If it did not complete, `code` and `sentence` say why."""

    task_id: str
    workflow_id: str
    status: TaskStatus
    code: str | None = None
    """An error code of contract §1, or `terminated`."""
    sentence: str | None = None
    result: AnyResult | None = None
    ui_url: str | None = None

    @property
    def credits(self) -> CreditsSummary | None:
        return self.result.credits if self.result else None

    @property
    def result_urls(self) -> list[str]:
        """An image's addresses; empty for a training, and for a task that did not complete."""
        urls: list[str] = getattr(self.result, "result_urls", [])
        return urls


class TaskDetails(OwnModel):
    """One task: `progress` while it is open, `outcome` once it has ended.

    By Temporal `progress` and `credits` of an open task need a worker; without one they are None.
    """

    task: TaskSummary
    progress: TrainingProgress | None = None
    credits: CreditsSummary | None = None
    outcome: TaskOutcome | None = None
    delays: list[TaskDelay] = []
    """Why it makes no progress now; empty if nothing delays it."""
