"""The scenes: everything that differs between image generation and model training, in one table.

Code that depends on a task's kind reads its scene's row here; no code checks for a class or compares scenes by name.
Beyond that only the steps differ. Each scene has its own flow file for them (`workflows/image_generation.py`,
`workflows/training.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel

from comfyui_temporal.contracts.comfyui import (
    JobAccepted,
    JobCallback,
    JobRequest,
    JobState,
    JobStatus,
    TaskPriority,
    TrainingAccepted,
    TrainingCallback,
    TrainingDraft,
    TrainingState,
)
from comfyui_temporal.contracts.continuation import ImageRun, JobUpdate, TrainingRun
from comfyui_temporal.contracts.permissions import Scene, Scope, TokenClaims
from comfyui_temporal.contracts.tasks import (
    IMAGE_WORKFLOW,
    TRAINING_WORKFLOW,
    ImageResult,
    ImageTask,
    TrainingResult,
    TrainingTask,
)

AnyTask = ImageTask | TrainingTask
AnyRun = ImageRun | TrainingRun
AnyResult = ImageResult | TrainingResult
Accepted = JobAccepted | TrainingAccepted
State = JobState | TrainingState
Callback = JobCallback | TrainingCallback


@dataclass(frozen=True)
class StepRows:
    """The rows of a scene's step table whose number or name differs, as the Temporal UI shows them."""

    price_check: str
    """Before anything is submitted or copied: does the balance cover the price?"""
    submit: str
    estimate: str
    settle: int
    record: int


@dataclass(frozen=True)
class SceneSpec:
    """One scene. Durations name their unit. Names of activities and fields are those of the wire and of histories."""

    scene: Scene
    noun: str
    """Used in ids that we make (`image-…`), and in the names of its settings (`image_cap_minutes`)."""
    scope: Scope
    """The scope that a token needs to start such a task, and for its credits calls (contract §7)."""

    workflow: str
    task: type[AnyTask]
    run: type[AnyRun]
    """The workflow's argument: the task, and the continuation for a continued run."""
    result: type[AnyResult]
    variant: Callable[[Any], str]
    """Returns the value for `resolution` in a task's row and for the price table's second column."""
    summary: Callable[[Any], str]
    """Returns the line that the Temporal UI shows for a task's run."""
    collection: str
    """Where such tasks are started: `POST /api/v1/tasks/{collection}`."""

    submit: str
    """The activity that makes a job; `get` polls one and `cancel` cancels one."""
    get: str
    cancel: str
    steps: StepRows
    request: type[BaseModel]
    """Body of the submit, as history holds it."""
    accepted: type[Accepted]
    """Reply to the submit."""
    callback: type[Callback]
    update: Callable[[Any], JobUpdate]
    """Converts a callback or a poll's answer to the field names that all scenes share."""
    job_id_field: str
    """The name of the job's id in ComfyUI's messages and in the result."""

    eta_minutes: Mapping[str, float]
    """By priority, before ComfyUI answers (contract §1)."""
    poll_after_seconds: float
    poll_at_most_seconds: float
    cap_minutes: float
    uncovered_limit: timedelta
    """How long a task may continue without a hold, if the balance is too low to renew it."""
    confirms_price: bool = False
    """Whether it waits for a price confirmation if `max_credits` does not cover the price."""
    first_stage: str | None = None
    """The stage of each of its jobs until it reports: the start sets it, which saves a run an upsert."""
    copies_dataset: bool = False
    """Whether it copies its dataset before the submit. The copy is deleted when the task ends."""
    makes_models: bool = False
    """Whether its result is a model that later tasks may use (`loras`)."""


SCENES: Final[Mapping[Scene, SceneSpec]] = {
    Scene.IMAGE_GENERATE: SceneSpec(
        scene=Scene.IMAGE_GENERATE,
        noun="image",
        scope=Scope.IMAGE_GENERATE,
        workflow=IMAGE_WORKFLOW,
        task=ImageTask,
        run=ImageRun,
        result=ImageResult,
        variant=lambda task: str(task.resolution.value),
        summary=lambda task: f"{task.template_id}, {task.resolution}, {task.priority}, for {task.tenant_id}",
        collection="images",
        submit="submit_job",
        get="get_job",
        cancel="cancel_job",
        steps=StepRows(price_check="1 price check", submit="1 submit", estimate="2 agree", settle=5, record=6),
        request=JobRequest,
        accepted=JobAccepted,
        callback=JobCallback,
        update=JobUpdate.of_job,
        job_id_field="job_id",
        eta_minutes={TaskPriority.STANDARD: 8.0, TaskPriority.ACCELERATED: 3.0},
        poll_after_seconds=30,
        poll_at_most_seconds=120,
        cap_minutes=24 * 60,
        uncovered_limit=timedelta(seconds=60),
        first_stage=JobStatus.QUEUED.value,
    ),
    Scene.MODEL_TRAIN: SceneSpec(
        scene=Scene.MODEL_TRAIN,
        noun="training",
        scope=Scope.MODEL_TRAIN,
        workflow=TRAINING_WORKFLOW,
        task=TrainingTask,
        run=TrainingRun,
        result=TrainingResult,
        variant=lambda task: str(task.base_model),
        summary=lambda task: (
            f"{task.template_id} on {task.base_model}, dataset {task.dataset.dataset_id}, {task.priority}, "
            f"for {task.tenant_id}"
        ),
        collection="trainings",
        submit="create_training",
        get="get_training",
        cancel="cancel_training",
        steps=StepRows(price_check="0 price check", submit="1 create", estimate="3 estimate", settle=6, record=5),
        request=TrainingDraft,
        accepted=TrainingAccepted,
        callback=TrainingCallback,
        update=JobUpdate.of_training,
        job_id_field="training_id",
        eta_minutes={TaskPriority.STANDARD: 45.0, TaskPriority.ACCELERATED: 20.0},
        poll_after_seconds=300,
        poll_at_most_seconds=1_800,
        cap_minutes=30 * 24 * 60,
        uncovered_limit=timedelta(hours=1),
        confirms_price=True,
        copies_dataset=True,
        makes_models=True,
    ),
}

SCENE_OF_WORKFLOW: Final[Mapping[str, SceneSpec]] = {spec.workflow: spec for spec in SCENES.values()}


def scene_of_message(body: Mapping[str, Any]) -> SceneSpec | None:
    """The scene of a message or result, by the id field in it; None without one.

    Searched from the last row: the first scene's `job_id` may also appear in another scene's message.
    """
    return next((spec for spec in reversed(list(SCENES.values())) if spec.job_id_field in body), None)


def scene_of_callback(callback: Callback) -> SceneSpec:
    """The scene of a validated callback."""
    return next(spec for spec in SCENES.values() if isinstance(callback, spec.callback))


def allows_scene(claims: TokenClaims, scene: Scene) -> bool:
    """Whether a token may call `/api/v1/credits/*` for a task of this scene. A rollback's scope allows every scene."""
    return SCENES[scene].scope.value in claims.scopes or Scope.CREDITS_ROLLBACK.value in claims.scopes
