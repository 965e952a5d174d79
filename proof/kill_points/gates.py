"""How a call is kept at its point: a file for each task says which call waits and where; the worker reads it.

Files survive every kill. The runner removes them before the worker is started again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from comfyui_temporal.contracts.task_store import Fact, TaskWrite

BEFORE_SEND: Final = "before send"
AFTER_EFFECT: Final = "after effect"
AFTER_REPLY: Final = "after reply"
BEFORE_REPORT: Final = "before report"
Phase = Literal["before send", "after effect", "after reply", "before report"]
"""`before send`: the service has not seen the request. `after effect`: it has acted. `after reply`: its answer has
arrived. `before report`: the activity is done, but Temporal does not know."""
JOB_UPDATE: Final = "job update"
"""The name of a job's message where facts are matched, because its own key names the job."""


class Gate(BaseModel):
    """One call of one task. `about` is matched with the call's key without the task's id, or with its facts' keys."""

    call: str
    phase: Phase
    about: str = ""
    only_visible: bool = False
    """The local try is made to fail, so that the visible one reaches the gate."""
    loses: bool = False
    """The call's outcome is lost once; the call is not kept waiting."""

    def takes(self, call: str, arguments: Sequence[Any]) -> bool:
        return call == self.call and any(re.search(self.about, name) for name in _names_of(arguments))


def _names_of(arguments: Sequence[Any]) -> list[str]:
    [argument] = arguments[:1] or [None]
    if isinstance(argument, TaskWrite):
        return [_named(fact) for fact in argument.facts]
    key = getattr(argument, "key", None)
    return [key.partition(":")[2] if isinstance(key, str) else ""]


def _named(fact: Fact) -> str:
    return JOB_UPDATE if fact.sequence is not None else fact.key


class Gates:
    """The folder of gates, as both sides see it."""

    def __init__(self, folder: Path) -> None:
        self._standing = folder / "gates"
        self._reached = folder / "reached"
        for made in (self._standing, self._reached):
            made.mkdir(parents=True, exist_ok=True)

    def close(self, task_id: str, gate: Gate) -> None:
        written = self._standing / f".{task_id}"
        written.write_text(gate.model_dump_json())
        written.replace(self._standing / task_id)

    def open(self, task_id: str) -> None:
        (self._standing / task_id).unlink(missing_ok=True)

    def open_all(self) -> None:
        for path in self._standing.iterdir():
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        self.open_all()
        for path in self._reached.iterdir():
            path.unlink(missing_ok=True)

    def standing(self, task_id: str) -> Gate | None:
        with contextlib.suppress(FileNotFoundError, ValidationError):
            return Gate.model_validate_json((self._standing / task_id).read_text())
        return None

    def is_closed(self, task_id: str) -> bool:
        return (self._standing / task_id).exists()

    def reach(self, task_id: str) -> None:
        (self._reached / task_id).touch()

    def is_reached(self, task_id: str) -> bool:
        return (self._reached / task_id).exists()
