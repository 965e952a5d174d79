"""Which operation needs which scope (contract §7): one table for gateway, bridge, simulators and our own calls."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from comfyui_temporal.contracts.fields import CallerId, OutsideModel


class Scope(StrEnum):
    IMAGE_GENERATE = "comfyui.image.generate"
    MODEL_TRAIN = "comfyui.model.train"
    TASK_READ = "task.read"
    TASK_CANCEL = "task.cancel"
    CREDITS_ROLLBACK = "credits.rollback"


class Scene(StrEnum):
    IMAGE_GENERATE = "image.generate"
    MODEL_TRAIN = "model.train"


class Operation(StrEnum):
    """What a request does; the rows of contract §7."""

    START_IMAGE_TASK = "start_image_task"
    START_TRAINING_TASK = "start_training_task"
    CONFIRM_PRICE = "confirm_price"
    CREATE_JOB = "create_job"
    CREATE_TRAINING = "create_training"
    START_TRAINING = "start_training"
    READ_TASK = "read_task"
    READ_COMFYUI = "read_comfyui"
    CANCEL_TASK = "cancel_task"
    CANCEL_JOB = "cancel_job"
    ROLL_BACK = "roll_back"
    UPLOAD = "upload"
    """Begin an upload, or delete it."""
    CONTINUE_UPLOAD = "continue_upload"
    """Send more of it, or look at it."""


REQUIRED_SCOPES: Final[dict[Operation, Scope]] = {
    Operation.START_IMAGE_TASK: Scope.IMAGE_GENERATE,
    Operation.CREATE_JOB: Scope.IMAGE_GENERATE,
    Operation.START_TRAINING_TASK: Scope.MODEL_TRAIN,
    Operation.CONFIRM_PRICE: Scope.MODEL_TRAIN,
    Operation.CREATE_TRAINING: Scope.MODEL_TRAIN,
    Operation.START_TRAINING: Scope.MODEL_TRAIN,
    Operation.READ_TASK: Scope.TASK_READ,
    Operation.READ_COMFYUI: Scope.TASK_READ,
    Operation.CANCEL_TASK: Scope.TASK_CANCEL,
    Operation.CANCEL_JOB: Scope.TASK_CANCEL,
    Operation.ROLL_BACK: Scope.CREDITS_ROLLBACK,
    Operation.UPLOAD: Scope.IMAGE_GENERATE,
    Operation.CONTINUE_UPLOAD: Scope.IMAGE_GENERATE,
}


class TokenClaims(OutsideModel):
    """The claims of a JWT (contract §7). `scopes` are kept as text: unknown ones are ignored, not rejected."""

    tenant_id: CallerId
    user_id: CallerId
    scopes: list[str] = []

    def allows(self, operation: Operation) -> bool:
        return REQUIRED_SCOPES[operation].value in self.scopes
