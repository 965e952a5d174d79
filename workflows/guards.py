"""What keeps a run from getting stuck on arguments that nobody should have sent (pitfalls 1 and 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from temporalio import workflow
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from contracts.errors import FailureCode
from contracts.fields import CallerModel
from contracts.tasks import workflow_id_of

Self = TypeVar("Self")
Task = TypeVar("Task")


def input_invalid(why: str) -> ApplicationError:
    return ApplicationError(f"The input is not valid: {why}.", type=FailureCode.INPUT_INVALID, non_retryable=True)


def one_task(init: Callable[[Self, Task], None]) -> Callable[[Self, Task], None]:
    """Guard `@workflow.init`: exactly one argument of the right type, under the workflow id that belongs to it.

    A plain TypeError would fail the workflow task for ever; an ApplicationError raised here fails the run, with
    nothing called. What a continued run carries is refused from anybody but a run that continued itself.
    """

    @functools.wraps(init)
    def guarded(self: Self, *arguments: Any) -> None:
        if len(arguments) != 1:
            raise input_invalid(f"exactly one argument is taken, {len(arguments)} were given")
        task = arguments[0]
        if not isinstance(task, CallerModel):
            raise input_invalid("the argument is not a JSON object")
        if workflow.info().workflow_id != workflow_id_of(getattr(task, "task_id", "")):
            raise input_invalid("task_id: the workflow id must be 'task-' followed by it")
        if getattr(task, "carried", None) is not None and workflow.info().continued_run_id is None:
            raise input_invalid("carried: Extra inputs are not permitted")
        init(self, cast(Task, task))

    return guarded


def any_payload(handler: Callable[[Self, bytes | None], None]) -> Callable[[Self, RawValue], None]:
    """Guard a signal handler: whatever arrives, it gets the bytes of one JSON payload or None, and never raises."""

    @functools.wraps(handler)
    def guarded(self: Self, *arguments: Any) -> None:
        raw = arguments[0] if len(arguments) == 1 else None
        is_json = isinstance(raw, RawValue) and raw.payload.metadata.get("encoding") == b"json/plain"
        handler(self, raw.payload.data if is_json and isinstance(raw, RawValue) else None)

    # The SDK reads the argument's type from here: RawValue reaches the handler undecoded.
    guarded.__annotations__ = {"payload": RawValue, "return": None}
    return guarded
