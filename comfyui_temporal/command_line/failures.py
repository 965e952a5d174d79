"""How a command ends: exit codes for scripts, and failures as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.tasks import TaskStatus


class ExitCode(IntEnum):
    """Exit codes are a stable interface. 130 is an interrupt from the keyboard."""

    COMPLETED = 0
    FAILED = 1
    BAD_INPUT = 2
    CANCELLED = 3
    CANNOT_REACH = 4
    TASK_EXISTS = 5
    UNKNOWN_TASK = 6
    TOO_LATE = 7
    INTERRUPTED = 130


def exit_code_of(status: TaskStatus) -> ExitCode:
    """The exit code for a task's final status."""
    match status:
        case TaskStatus.COMPLETED:
            return ExitCode.COMPLETED
        case TaskStatus.CANCELLED:
            return ExitCode.CANCELLED
        case _:
            return ExitCode.FAILED


class CommandFailure(Exception):
    """A command cannot do its work: `code` is stable, `sentence` says what was tried and what to do."""

    def __init__(
        self,
        sentence: str,
        *,
        exit_code: ExitCode = ExitCode.FAILED,
        code: str = FailureCode.INTERNAL.value,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.exit_code = exit_code
        self.code = code
        self.fields = dict(fields or {})
        """Name of a field → its problem."""


class BadInput(CommandFailure):
    """The input is rejected before anything starts; `fields` says why, field by field."""

    def __init__(self, sentence: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence, exit_code=ExitCode.BAD_INPUT, code=FailureCode.INPUT_INVALID.value, fields=fields)


class CannotReach(CommandFailure):
    """Temporal, or the worker behind it, does not answer."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, exit_code=ExitCode.CANNOT_REACH, code="temporal_unavailable")
