"""Everything that a call can fail with. Each error has a stable `code` and a sentence that says what to do.

TaskError
├── InvalidInput             a value is wrong, or the task refuses it; `fields` names each field
├── CreditsRefused           a start that waits: the task has ended without credits; a new try needs a new task id
├── TaskExists               another input holds this task id
├── UnknownTask              there is no such task, or it is another tenant's
├── TaskOver                 the task ended before the call reached it
├── AccessDenied             credentials are missing, expired, or lack the scope
├── Unavailable              nothing answers now; the same call may succeed later
│   ├── TemporalUnavailable
│   │   └── NamespaceMissing
│   ├── GatewayUnavailable
│   └── WorkerUnavailable
├── Undecryptable            this client lacks the key that Temporal's data is encrypted with
└── UnexpectedReply          an answer that this version does not know
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.start_answer import CREDITS_REFUSED, ID_REFUSED, INPUT_REFUSED

Model = TypeVar("Model", bound=BaseModel)


class TaskError(Exception):
    """A call did not do what it should. `sentence` is to be displayed, `code` is for programs."""

    default_code: ClassVar[str] = FailureCode.INTERNAL.value

    def __init__(self, sentence: str, *, code: str | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code or self.default_code


class InvalidInput(TaskError):
    """A value is wrong; nothing was started or changed. `fields`: name of a field → what is allowed."""

    default_code = FailureCode.INPUT_INVALID.value

    def __init__(self, sentence: str, *, code: str | None = None, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence, code=code)
        self.fields = dict(fields or {})


class CreditsRefused(TaskError):
    """Credits were refused before anything was held: the task has ended `failed`, and a new try needs a new task id.

    `code`: `insufficient_balance`, `quota_exceeded`, `not_authorized` or `price_mismatch`.
    """

    default_code = FailureCode.INSUFFICIENT_BALANCE.value


class TaskExists(TaskError):
    """A task with another input has this task id. Nothing was started, and that task was not changed.

    `code`: `task_exists`, or `task_conflict` of a start that waits: something else used the task's idempotency keys.
    """

    default_code = FailureCode.TASK_EXISTS.value

    def __init__(self, task_id: str, *, code: str | None = None) -> None:
        self.task_id = task_id
        sentence = f"The task_id {task_id!r} cannot be used with this input; nothing was started or changed."
        super().__init__(sentence, code=code)


class UnknownTask(TaskError):
    """There is no such task, or it belongs to another tenant."""

    default_code = "task_unknown"


class TaskOver(TaskError):
    """The task has ended: nothing can be changed any more."""

    default_code = "task_over"


class AccessDenied(TaskError):
    """The credentials are missing or expired, or do not allow this call."""

    default_code = FailureCode.NOT_AUTHORIZED.value


class Unavailable(TaskError):
    """No answer now. The call may have had its effect; a repeat is safe."""


class TemporalUnavailable(Unavailable):
    """Temporal does not answer."""

    default_code = "temporal_unavailable"


class NamespaceMissing(TemporalUnavailable):
    """Temporal answers, but does not have this namespace."""


class GatewayUnavailable(Unavailable):
    """The gateway does not answer, or a service behind it does not."""

    default_code = "gateway_unavailable"


class WorkerUnavailable(Unavailable):
    """The task is open, but no worker answers for it."""

    default_code = "worker_unavailable"


class Undecryptable(TaskError):
    """This client lacks the key that a run's data is encrypted with, or its key is another one."""


class UnexpectedReply(TaskError):
    """An answer that this version does not know."""


def start_refused(task_id: str, code: str, sentence: str) -> TaskError | None:
    """The error of a start that waits whose task failed with `code` before anything was held; None: no refusal."""
    if code in CREDITS_REFUSED:
        return CreditsRefused(sentence, code=code)
    if code in INPUT_REFUSED:
        return InvalidInput(sentence, code=code)
    return TaskExists(task_id, code=code) if code in ID_REFUSED else None


def checked(model: type[Model], **values: Any) -> Model:
    """The values as a model. Raises InvalidInput, whose `fields` say what is allowed and repeat no value."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fields = {".".join(map(str, issue["loc"])): issue["msg"] for issue in error.errors(include_url=False)}
        named = "; ".join(f"{name}: {message}" for name, message in fields.items())
        raise InvalidInput(f"Nothing was done: {named}.", fields=fields) from None
