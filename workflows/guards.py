"""Guards against arguments that would leave a run stuck (pitfalls 1 and 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from temporalio import workflow
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import CallerModel
from comfyui_temporal.contracts.handed_on import Doubtful, RunArgument
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.size_budget import SMALL_SIGNAL_BYTES
from comfyui_temporal.contracts.tasks import workflow_id_of

Self = TypeVar("Self")
Task = TypeVar("Task")
Argument = TypeVar("Argument", bound=RunArgument)
Ordered = TypeVar("Ordered", bound=CallerModel)


class NotReadHere(Exception):
    """Another version wrote what this code cannot read. It fails the workflow task, not the run."""


def input_invalid(reason: str) -> ApplicationError:
    return ApplicationError(f"The input is not valid: {reason}.", type=FailureCode.INPUT_INVALID, non_retryable=True)


def validated(argument: Any, model: type[Argument], *, parent_is_ours: bool = True) -> Argument:
    """The run's argument, checked in the run itself: what is refused depends on its sender.

    Raises ApplicationError `input_invalid` for a caller's doubtful argument. An argument that another worker of ours
    accepted or wrote is read as far as this worker knows it; otherwise NotReadHere fails the workflow task, so that a
    worker that can read it takes over. `parent_is_ours`: whether only our own workflows start this one as a child.
    """
    if isinstance(argument, Doubtful):
        if _is_from_caller(parent_is_ours=parent_is_ours):
            raise input_invalid(argument.reason)
        reason, argument = argument.reason, argument.as_read
        if argument is None:
            raise NotReadHere(
                "Another version wrote the state that this run continues from; its workers must take over."
            )
        if _was_reset():
            argument.doubt(reason)
    if not isinstance(argument, model):
        raise input_invalid("the argument is not a JSON object")
    return argument


def _is_from_caller(*, parent_is_ours: bool) -> bool:
    """Whether no worker of ours can have accepted the argument: no earlier run, no parent, no workflow task so far."""
    is_our_child = workflow.info().parent is not None and parent_is_ours
    return not (_is_continued() or _was_reset() or is_our_child or workflow.unsafe.is_replaying())


def _is_continued() -> bool:
    """Whether the run continues one that was accepted: in a cron schedule a run also follows one that was refused."""
    if workflow.info().continued_run_id is None:
        return False
    before = workflow.get_last_failure()
    if not isinstance(before, ApplicationError) or before.type != FailureCode.INPUT_INVALID:
        return True
    return bool(before.details)  # an accepted task that failed has a result


def _was_reset() -> bool:
    """Whether the run is a task's first one, reset: nothing of what it was before the reset need be replayed."""
    info = workflow.info()
    return info.continued_run_id is None and info.run_id != info.first_execution_run_id


def validated_input(init: Callable[[Self, Task], None]) -> Callable[[Self, Task], None]:
    """Guard `@workflow.init`: exactly one argument of the right type, under the workflow id that belongs to it.

    A plain TypeError would fail the workflow task on every try; an ApplicationError raised here fails the run before it
    calls anything. `carried` is accepted only from a run that continued as new.
    """

    @functools.wraps(init)
    def guarded(self: Self, *arguments: Any) -> None:
        if len(arguments) != 1:
            raise input_invalid(f"exactly one argument is taken, {len(arguments)} were given")
        task = validated(arguments[0], RunArgument, parent_is_ours=False)  # a task's parent is a caller's workflow
        if workflow.info().workflow_id != workflow_id_of(getattr(task, "task_id", "")):
            raise input_invalid("task_id: the workflow id must be 'task-' followed by it")
        if getattr(task, "carried", None) is not None and not _is_continued():
            raise input_invalid("carried: Extra inputs are not permitted")
        init(self, cast(Task, task))

    return guarded


def any_payload(handler: Callable[[Self, bytes | None], None]) -> Callable[[Self, RawValue], None]:
    """Guard a signal handler: it gets the bytes of one JSON payload, or None for anything else, and never raises."""

    @functools.wraps(handler)
    def guarded(self: Self, *arguments: Any) -> None:
        raw = arguments[0] if len(arguments) == 1 else None
        is_json = isinstance(raw, RawValue) and raw.payload.metadata.get("encoding") == b"json/plain"
        handler(self, raw.payload.data if is_json and isinstance(raw, RawValue) else None)

    # The SDK reads the argument's type from here: RawValue reaches the handler undecoded.
    guarded.__annotations__ = {"payload": RawValue, "return": None}
    return guarded


def order_in(payload: bytes | None, model: type[Ordered]) -> Ordered | None:
    """What a caller's signal orders; None if it cannot be read. Never raises (pitfall 2)."""
    if payload is None:
        return None
    try:
        return model.model_validate(read_json(payload, max_bytes=SMALL_SIGNAL_BYTES))
    except (UnreadableJson, ValidationError):
        return None
