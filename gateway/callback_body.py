"""Verified bytes → a callback (contract §2, §3): size limits, and the scene that it belongs to."""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError

from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES, Callback, SceneSpec, scene_of_message

MAX_BYTES: Final = 64 * 1024
MAX_BYTES_WITH_LOG: Final = 256 * 1024
LOG_FIELD: Final = "log"


class BodyTooLarge(Exception):
    """The body has more bytes than this kind of callback may have."""


class ForeignTask(Exception):
    """The body names another task than the path, or none."""


class UnreadableCallback(Exception):
    """Signed, but not a readable callback. The text names fields, never values."""


def read_callback(raw: bytes, task_id: str) -> Callback:
    """The callback in `raw`. Raises BodyTooLarge, ForeignTask, UnreadableCallback."""
    try:
        body = read_json(raw, max_bytes=MAX_BYTES_WITH_LOG)
    except UnreadableJson as error:
        raise UnreadableCallback(str(error)) from None
    if not isinstance(body, dict):
        raise UnreadableCallback("the body is not a JSON object")
    spec = scene_of_message(body) or SCENES[Scene.IMAGE_GENERATE]
    if len(raw) > MAX_BYTES and not (_may_hold_log(spec) and body.get("log")):
        raise BodyTooLarge
    if body.get("task_id") != task_id:
        raise ForeignTask
    try:
        return _validated(spec, body)
    except ValidationError as error:
        raise UnreadableCallback(_fields_of(error)) from None


def _may_hold_log(spec: SceneSpec) -> bool:
    return LOG_FIELD in spec.callback.model_fields


def _validated(spec: SceneSpec, body: dict[str, Any]) -> Callback:
    """The callback. An unreadable log is left out; the rest of the message counts. Raises ValidationError."""
    try:
        return spec.callback.model_validate(body)
    except ValidationError as error:
        is_only_log = all(item["loc"][:1] == (LOG_FIELD,) for item in error.errors(include_url=False))
        if not is_only_log:
            raise
        return spec.callback.model_validate({**body, LOG_FIELD: []})


def _fields_of(error: ValidationError) -> str:
    items = error.errors(include_url=False, include_input=False, include_context=False)[:8]
    return "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['type']}" for item in items)
