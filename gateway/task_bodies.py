"""Bodies of the tasks API (contract §6): orders in, tasks and outcomes out."""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, StringConstraints, field_validator

from activities.file_lists import as_list, checksum_of
from comfyui_temporal.contracts.fields import CallerId, CallerModel, CallerText, CleanJson, OwnModel
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.size_budget import MAX_INLINE_LIST_BYTES
from comfyui_temporal.contracts.task_store import TrainingLogRow
from comfyui_temporal.contracts.tasks import (
    Control,
    CreditsSummary,
    DatasetSource,
    ExtraName,
    ImageTask,
    TaskInput,
    TaskStatus,
    TrainingTask,
    bounded_extras,
)
from gateway.inline_files import InlineFile, as_address, checked_address, content_of, inline_id, is_inline

TASKS: Final = "/api/v1/tasks"
IdempotencyKey = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")]
"""`X-Idempotency-Key`: printable ASCII without blanks."""
Cursor = str
"""Checked where it is read: whatever is wrong with it is `cursor_invalid`."""

_IMAGE_EXAMPLE: Final[dict[str, JsonValue]] = {
    "template_id": "text-to-image",
    "prompt": "a lighthouse at dusk, long exposure",
    "resolution": "4k",
    "priority": "accelerated",
    "extras": {"hires_fix": True, "seed": 7},
    "max_credits": 60,
}
_TRAINING_EXAMPLE: Final[dict[str, JsonValue]] = {
    "template_id": "lora-train",
    "dataset": {"dataset_id": "faces", "source_uri": "s3://datasets/tenant-demo/faces/"},
    "hyperparameters": {"epochs": 10, "batch_size": 4, "learning_rate": 0.0001},
    "max_credits": 400,
}


KEYED: Final = "key-"
"""Ids that begin so are made here. They can be computed by anybody who guesses the key, so no caller may give one."""


def task_id_by_key(tenant_id: str, key: str) -> str:
    """The task id for an idempotency key: the same for every repeat, another for every tenant."""
    return KEYED + hashlib.sha256(f"{tenant_id}\n{key}".encode()).hexdigest()[:40]


def new_task_id(scene: Scene, tenant_id: str, key: str | None) -> str:
    """The id of a task that was ordered without one."""
    return task_id_by_key(tenant_id, key) if key else f"{SCENES[scene].noun}-{secrets.token_hex(8)}"


class Order(Protocol):
    """The body that starts a task of any scene."""

    @property
    def task_id(self) -> str | None: ...

    def task(self, *, tenant_id: str, user_id: str, key: str | None) -> TaskInput: ...

    def inline_files(self, tenant_id: str, task_id: str) -> list[InlineFile]: ...


class OrderedControl(Control):
    """A control image: its address, `upload:UPLOAD_ID`, or a small file itself: `data:image/png;base64,…`."""

    image_url: Annotated[CallerText, Field(min_length=1), AfterValidator(checked_address)]


def _without_files(extras: dict[str, CleanJson]) -> dict[str, CleanJson]:
    """The same extras, checked: a file among them counts as the address that it becomes. Raises ValueError."""
    named: dict[str, CleanJson] = {}
    for name, value in extras.items():
        try:
            named[name] = as_address(value, "", "")
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    bounded_extras(named)
    return extras


class ImageOrder(ImageTask):
    """Body of `POST /api/v1/tasks/images`: `ImageGenerationWorkflow`'s input.

    `task_id` may be left out: then a new one is made. `tenant_id` and `user_id` may be left out too; if given they must
    be the token's. In the place of a file's address a small file may be given itself, as `data:image/png;base64,…`.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_IMAGE_EXAMPLE]})

    task_id: CallerId | None = None  # type: ignore[assignment]
    tenant_id: CallerId | None = None  # type: ignore[assignment]
    user_id: CallerId | None = None  # type: ignore[assignment]
    controls: Annotated[list[OrderedControl], Field(max_length=16)] = []  # type: ignore[assignment]
    extras: Annotated[dict[ExtraName, CleanJson], Field(max_length=64), AfterValidator(_without_files)] = {}

    def task(self, *, tenant_id: str, user_id: str, key: str | None) -> ImageTask:
        """The ordered task, for the token's tenant and user. Files in it are named as uploads."""
        task_id = self.task_id or new_task_id(self.scene, tenant_id, key)
        given = _given(self, task_id=task_id, tenant_id=tenant_id, user_id=user_id)
        if "controls" in given:
            given["controls"] = [
                control.model_dump(exclude_unset=True)
                | {"image_url": as_address(control.image_url, tenant_id, task_id)}
                for control in self.controls
            ]
        if "extras" in given:
            given["extras"] = {name: as_address(value, tenant_id, task_id) for name, value in self.extras.items()}
        return ImageTask(**given)

    def inline_files(self, tenant_id: str, task_id: str) -> list[InlineFile]:
        """The files in the order."""
        given = {f"controls.{number}.image_url": each.image_url for number, each in enumerate(self.controls)}
        given |= {f"extras.{name}": value for name, value in self.extras.items() if isinstance(value, str)}
        files = {field: content_of(value) for field, value in given.items() if is_inline(value)}
        return [InlineFile(field, inline_id(tenant_id, task_id, file), file) for field, file in files.items()]


class TrainingOrder(TrainingTask):
    """Body of `POST /api/v1/tasks/trainings`: `TrainingWorkflow`'s input; ids as in `ImageOrder`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_TRAINING_EXAMPLE]})

    task_id: CallerId | None = None  # type: ignore[assignment]
    tenant_id: CallerId | None = None  # type: ignore[assignment]
    user_id: CallerId | None = None  # type: ignore[assignment]
    dataset: DatasetSource  # type: ignore[assignment]

    @field_validator("dataset")
    @classmethod
    def _one_source_of_files(cls, dataset: DatasetSource) -> DatasetSource:
        if dataset.names_files_twice:
            raise ValueError("files and manifest exclude each other: give one of them")
        return dataset

    def task(self, *, tenant_id: str, user_id: str, key: str | None) -> TrainingTask:
        """The ordered task, for the token's tenant and user. A long list of files is named by its checksum."""
        task_id = self.task_id or new_task_id(self.scene, tenant_id, key)
        dataset = self.dataset.model_dump(exclude_unset=True)
        if self.long_list is not None:
            dataset |= {"files": None, "files_sha256": checksum_of(as_list(self.long_list))}
        given = _given(self, task_id=task_id, tenant_id=tenant_id, user_id=user_id)
        return TrainingTask(**given | {"dataset": dataset})

    def inline_files(self, _tenant_id: str, _task_id: str) -> list[InlineFile]:
        """None: its files are in its dataset."""
        return []

    @property
    def long_list(self) -> list[str] | None:
        """The list of files, if it is too long for the run's input."""
        files = self.dataset.files
        return files if files is not None and len(as_list(files)) > MAX_INLINE_LIST_BYTES else None


def _given(order: TaskInput, **ids: str) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.model_fields_set} | ids


class TaskFilters(CallerModel):
    """The query of the list."""

    status: TaskStatus | None = None
    scene: Scene | None = None
    text: Annotated[CallerText, Field(min_length=1, max_length=200)] | None = None
    """Those whose id or prompt holds this text, in any case. A prompt that is encrypted or not kept is not searched."""
    cursor: Cursor | None = None
    """The `cursor` of the page before."""
    limit: Annotated[int, Field(ge=1, le=200)] = 50


class EventsQuery(CallerModel):
    """The query of a task's history."""

    after: Cursor | None = None
    """An event's `cursor` or `seq`: the history after it."""
    limit: Annotated[int, Field(ge=1, le=1_000)] = 1_000
    cursor: Cursor | None = None
    """For the live stream: as `after`, and preferred to it."""
    token: str | None = None
    """For the live stream: the token, for clients that send no headers."""


class LogQuery(CallerModel):
    """The query of a training log."""

    after: Annotated[int, Field(ge=0, le=2**53)] = 0
    """A line's `position`: the log after it."""
    limit: Annotated[int, Field(ge=1, le=1_000)] = 1_000


class TrainingLog(OwnModel):
    """Lines in order of arrival. `after` is the position to continue from."""

    lines: list[TrainingLogRow]
    after: int


class RollbackOrder(CallerModel):
    """Body of `POST …/rollback`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "ordered twice by mistake"}]})

    reason: Annotated[CallerText, Field(max_length=500)] = ""


class RollbackOutcome(OwnModel):
    """`cancelled`: the open task ends cancelled. `given_back`: hold and job of an ended run were given back.

    `giving_back`: in progress, ask again. `nothing_held`: the task had ended and given back everything itself.
    """

    outcome: Literal["cancelled", "given_back", "giving_back", "nothing_held"]
    credits: CreditsSummary
