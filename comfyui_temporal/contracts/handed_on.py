"""What our own runs and workers hand to each other, read by a worker of another version (pitfall 41).

Whoever gives a task is read strictly, a run's own state is not: a field that this code does not know is kept where it
stood, and written again with the rest, so that an older worker hands on what a newer one added. What cannot be read at
all, an unknown word of an enumeration say, fails the workflow task and waits for the worker that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict

from comfyui_temporal.contracts.fields import CallerModel, OwnModel

Model = TypeVar("Model", bound=BaseModel)
_LEAVES: Final = frozenset({str, int, float, bool, type(None), datetime})


class KeptModel(OwnModel):
    """What is read with the fields that this code does not know, for it is handed on."""


class RunArgument(CallerModel):
    """Argument of one of our workflows: given by a caller, or handed on by a run of ours."""


class Order(RunArgument):
    """Argument that our own parts alone give: unknown fields are a newer worker's, and kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


@dataclass(frozen=True)
class Doubtful:
    """An argument that is not all that a caller may give: who gave it decides.

    `reason` says in sentences what is wrong. `as_read` is what it says all the same, unknown fields kept; None where it
    cannot be read.
    """

    reason: str
    as_read: RunArgument | None = None


def read_tolerantly(model: type[Model], document: bytes) -> Model:
    """A JSON document, unknown fields kept at every depth. Raises ValidationError."""
    return model.model_validate_json(document, extra="allow")


def has_unknown_fields(value: BaseModel) -> bool:
    """Whether a field that no model of ours names stands in `value`, at any depth."""
    waiting: list[Any] = [value]
    while waiting:
        held = waiting.pop()
        if isinstance(held, BaseModel):
            if unknown_of(held):
                return True
            waiting += [inner for inner in held.__dict__.values() if inner.__class__ not in _LEAVES]
        elif isinstance(held, dict):
            waiting += held.values()
        elif isinstance(held, list):
            waiting += held
    return False


def unknown_of(model: BaseModel) -> Mapping[str, Any]:
    """The fields of this one object that its model does not name; none where the model takes any field."""
    return {} if model.model_config.get("extra") == "allow" else model.__pydantic_extra__ or {}


def as_json(model: BaseModel, *, exclude_none: bool = False) -> dict[str, Any]:
    """The object as JSON values, with the unknown fields that it was read with."""
    dumped = model.model_dump(mode="json", exclude_none=exclude_none)
    _put_back(model, dumped, exclude_none=exclude_none)
    return dumped


def _put_back(value: Any, dumped: Any, *, exclude_none: bool) -> None:
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        for name, held in value.__dict__.items():
            if name in dumped:
                _put_back(held, dumped[name], exclude_none=exclude_none)
        for name, unknown in unknown_of(value).items():
            if unknown is not None or not exclude_none:
                dumped.setdefault(name, unknown)
    elif isinstance(value, Mapping) and isinstance(dumped, dict):
        for name, held in value.items():
            _put_back(held, dumped.get(name), exclude_none=exclude_none)
    elif isinstance(value, Sequence) and isinstance(dumped, list):
        for held, shown in zip(value, dumped, strict=True):
            _put_back(held, shown, exclude_none=exclude_none)
