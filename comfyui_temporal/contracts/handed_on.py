"""Data that our own runs and workers pass on, read by a worker of another version (pitfall 41).

A caller's input is read strictly; a run's own state is not. An unknown field is kept in place and written again with
the rest, so that an older worker preserves what a newer one added. A document that cannot be read at all, for example
with an unknown enum value, fails the workflow task, which then waits for a worker that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr

from comfyui_temporal.contracts.fields import WRITTEN_BY_US, CallerModel, OwnModel

Model = TypeVar("Model", bound=BaseModel)
_LEAVES: Final = frozenset({str, int, float, bool, type(None), datetime})


class KeptModel(OwnModel):
    """Keeps unknown fields when it is read, because it is passed on."""


class RunArgument(CallerModel):
    """Argument of one of our workflows: from a caller, or from a run of ours."""

    _doubt: str | None = PrivateAttr(default=None)

    @property
    def in_doubt(self) -> str | None:
        """Why a caller's argument like this is refused, where only the store knows whether this one was accepted."""
        return self._doubt

    def doubt(self, reason: str) -> None:
        self._doubt = reason


class Order(RunArgument):
    """Argument that only our own parts give: unknown fields come from a newer worker and are kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


@dataclass(frozen=True)
class Doubtful:
    """An argument that is not allowed from a caller: its origin decides what happens.

    `reason` says in sentences what is wrong. `as_read` is its content with unknown fields kept; None if it cannot be
    read.
    """

    reason: str
    as_read: RunArgument | None = None


def read_tolerantly(model: type[Model], document: bytes) -> Model:
    """Read a JSON document and keep unknown fields at every depth. Raises ValidationError."""
    return model.model_validate_json(document, extra="allow", context=WRITTEN_BY_US)


def has_unknown_fields(value: BaseModel) -> bool:
    """Whether `value` contains a field that no model of ours names, at any depth."""
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
    """The fields of this one object that its model does not name; none if the model allows any field."""
    return {} if model.model_config.get("extra") == "allow" else model.__pydantic_extra__ or {}


def as_json(model: BaseModel, *, exclude_none: bool = False) -> dict[str, Any]:
    """The object as JSON values, including its unknown fields."""
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
