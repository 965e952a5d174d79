"""What our runs and workers pass to each other, with every field filled: what one release must read of another."""

from __future__ import annotations

import types
from enum import Enum
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AwareDatetime, BaseModel

from comfyui_temporal.contracts.calls import JobCall, Post, SnapshotOrder
from comfyui_temporal.contracts.comfyui import JobRequest, TrainingDraft
from comfyui_temporal.contracts.continuation import ImageRun, TrainingRun
from comfyui_temporal.contracts.credits import (
    CancelHoldRequest,
    ChargeRequest,
    CommitRequest,
    EstimateRequest,
    PreDeductRequest,
)
from comfyui_temporal.contracts.give_back import GiveBackRun, Orphans
from comfyui_temporal.contracts.loras import Lora
from comfyui_temporal.contracts.reconcile import ClosedRun, OpenTasksLook, OpenTasksSeen, ReconcileOrder
from comfyui_temporal.contracts.task_store import (
    ClaimOutcome,
    Correction,
    LookOrder,
    RowSeen,
    TaskClaim,
    TaskWrite,
    UnsettledTask,
)

DOCUMENTS: Final[dict[str, type[BaseModel]]] = {
    "image-run": ImageRun,
    "training-run": TrainingRun,
    "give-back-run": GiveBackRun,
    "reconcile-order": ReconcileOrder,
    "submit-job": Post[JobRequest],
    "create-training": Post[TrainingDraft],
    "estimate": Post[EstimateRequest],
    "pre-deduct": Post[PreDeductRequest],
    "commit": Post[CommitRequest],
    "cancel-hold": Post[CancelHoldRequest],
    "charge": Post[ChargeRequest],
    "job-call": JobCall,
    "snapshot-order": SnapshotOrder,
    "task-claim": TaskClaim,
    "claim-outcome": ClaimOutcome,
    "task-write": TaskWrite,
    "look-order": LookOrder,
    "row-seen": RowSeen,
    "unsettled-task": UnsettledTask,
    "correction": Correction,
    "left-behind": Orphans,
    "open-tasks-look": OpenTasksLook,
    "open-tasks-seen": OpenTasksSeen,
    "closed-run": ClosedRun,
}
"""File name → model: arguments of our workflows and activities, and the results that hold state."""

_ADDRESS: Final = "https://example.org/"
_BY_NAME: Final[dict[str, Any]] = {
    "not_before": "2031-01-01T00:00:00Z",
    "not_after": "2031-01-02T00:00:00Z",
    "callback_url": _ADDRESS,
    "image_url": _ADDRESS,
    "model_url": _ADDRESS,
    "result_urls": [_ADDRESS],
    "sha256": "0" * 64,
    "files_sha256": "0" * 64,
    "strength": 1.5,
    "images": 7,
}
"""What no type shows: the order of two times, addresses, limits of a number."""
_FORMS: Final[dict[Any, list[list[str]]]] = {
    Lora: [["model_id", "strength"], ["model_url", "sha256", "strength"]],
}
"""Objects that have some of their fields or the others, never both."""
_LEAVES: Final[dict[Any, Any]] = {
    bool: True,
    int: 77,
    float: 7.5,
    str: "a-word",
    AwareDatetime: "2031-01-01T12:00:00Z",
    Any: {"of": ["any", 1]},
}


def fullest(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON with every field set, at every depth; a list of several kinds holds one of each."""
    document = model.model_validate(_object(model)).model_dump(mode="json")
    assert isinstance(document, dict)
    return document


def _object(model: type[BaseModel]) -> dict[str, Any]:
    return {name: _BY_NAME[name] if name in _BY_NAME else _value(_kind_of(model, name)) for name in model.model_fields}


def _kind_of(model: type[BaseModel], name: str) -> Any:
    """The field's type; one that names a later class is looked up."""
    kind = model.model_fields[name].annotation
    return get_type_hints(model)[name] if "ForwardRef" in repr(kind) else kind


def _value(kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _value(parts[0])
    if origin in (Union, types.UnionType):
        return _value(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return parts[-1]
    if origin is list:
        return [value for kind_of_one in _kinds_of(parts[0]) for value in _forms_of(kind_of_one)]
    if origin is dict:
        return {_value(parts[0]): _value(parts[1])}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _object(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind)[-1].value
    return _LEAVES.get(kind, "a-word")


def _forms_of(kind: Any) -> list[Any]:
    forms = _FORMS.get(kind)
    whole = _value(kind)
    return [whole] if forms is None else [{name: whole[name] for name in form} for form in forms]


def _kinds_of(kind: Any) -> list[Any]:
    """The kinds that a list may hold, or of which its objects hold one."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [part for part in parts if part is not type(None)]
    return [kind]
