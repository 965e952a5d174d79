"""How a command ends: exit codes for scripts, and failures that are one sentence a person can act on."""

from __future__ import annotations

from enum import IntEnum

from comfyui_temporal.contracts.errors import FailureCode


class ExitCode(IntEnum):
    """Exit codes are an interface: they keep their meaning. 130 is an interrupt from the keyboard."""

    COMPLETED = 0
    FAILED = 1
    BAD_INPUT = 2
    CANCELLED = 3
    CANNOT_REACH = 4
    TASK_EXISTS = 5
    UNKNOWN_TASK = 6
    TOO_LATE = 7
    INTERRUPTED = 130


class CommandFailure(Exception):
    """A command cannot do what was asked: `code` is stable, `sentence` says what was tried and what to do."""

    exit_code: ExitCode = ExitCode.FAILED
    code: str = FailureCode.INTERNAL.value

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class BadInput(CommandFailure):
    """The input is refused before anything is started; `fields` says why, field by field."""

    exit_code = ExitCode.BAD_INPUT
    code = FailureCode.INPUT_INVALID.value

    def __init__(self, sentence: str, fields: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.fields = fields or {}


class CannotReach(CommandFailure):
    """Temporal, or the worker behind it, does not answer."""

    exit_code = ExitCode.CANNOT_REACH
    code = "temporal_unavailable"


class TaskExists(CommandFailure):
    """Another input runs, or ran, under this task id: nothing of it was touched."""

    exit_code = ExitCode.TASK_EXISTS
    code = FailureCode.TASK_EXISTS.value


class UnknownTask(CommandFailure):
    """Temporal holds no run of this task."""

    exit_code = ExitCode.UNKNOWN_TASK
    code = "task_unknown"
