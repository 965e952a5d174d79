"""Documents as a worker of another version would write them."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel

from comfyui_temporal.contracts.handed_on import as_json

NEW_FIELD: Final = "a_field_of_tomorrow"
NEW_VALUE: Final = {"kept": ["as", 1, None]}
CHOSEN_BY_CALLERS: Final = "a-word"
NEW_ENUM_VALUE: Final = "a-word-of-tomorrow"
Path = tuple[str | int, ...]


def with_new_fields(model: BaseModel) -> dict[str, Any]:
    """The document with an unknown field in each object that is a model of ours, at every depth."""
    document = as_json(model)
    for path, _ in objects_of(model):
        at(document, path)[NEW_FIELD] = NEW_VALUE
    return document


def objects_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, BaseModel]]:
    """Every model in a value with its path; not those that take any field, whose fields are a caller's."""
    if isinstance(value, BaseModel):
        if value.model_config.get("extra") != "allow" or not path:
            yield path, value
        for name, held in value.__dict__.items():
            yield from objects_of(held, (*path, name))
    elif isinstance(value, list):
        for number, held in enumerate(value):
            yield from objects_of(held, (*path, number))


def enum_paths(model: BaseModel) -> Iterator[Path]:
    """The paths of our enum values."""
    for path, found in objects_of(model):
        for name, held in found.__dict__.items():
            if isinstance(held, Enum):
                yield (*path, name)


def new_fields_in(document: Any, path: Path = ()) -> set[Path]:
    """The paths of objects that have the unknown field, unchanged."""
    found: set[Path] = set()
    inner: Any = document.items() if isinstance(document, dict) else enumerate(document)
    for key, held in inner:
        if key == NEW_FIELD and held == NEW_VALUE:
            found.add(path)
        elif isinstance(held, dict | list):
            found |= new_fields_in(held, (*path, key))
    return found


def at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


def leaves(document: Any, path: Path = ()) -> dict[Path, Any]:
    """Every value of a document by its place."""
    if not isinstance(document, dict | list):
        return {path: document}
    inner: Any = document.items() if isinstance(document, dict) else enumerate(document)
    return {place: leaf for key, held in inner for place, leaf in leaves(held, (*path, key)).items()}


def as_released(document: Any, shape: Any) -> Any:
    """The document without the fields that a release's recorded one lacks: what that release would have written.

    `shape` names one key for fields that a caller chooses, and one kind of object for a list's.
    """
    if isinstance(document, dict) and isinstance(shape, dict):
        if list(shape) == [CHOSEN_BY_CALLERS]:
            return document
        return {name: as_released(held, shape[name]) for name, held in document.items() if name in shape}
    if isinstance(document, list) and isinstance(shape, list) and shape:
        return [as_released(held, shape[0]) for held in document]
    return document
