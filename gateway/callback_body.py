"""Verified bytes → a callback (contract §2, §3): limits, and which of the two kinds it is."""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError

from comfyui_temporal.contracts.comfyui import JobCallback, TrainingCallback
from comfyui_temporal.contracts.outside_json import UnreadableJson, read_json

MAX_BYTES: Final = 64 * 1024
MAX_BYTES_WITH_LOG: Final = 256 * 1024

Callback = JobCallback | TrainingCallback


class BodyTooLarge(Exception):
    """More bytes than this kind of callback may have."""


class ForeignTask(Exception):
    """The body names another task than the path, or none."""


class UnreadableCallback(Exception):
    """Signed, but no callback that can be read; the text names fields, never values."""


def read_callback(raw: bytes, task_id: str) -> Callback:
    """The callback in `raw`. Raises BodyTooLarge, ForeignTask, UnreadableCallback."""
    try:
        body = read_json(raw, max_bytes=MAX_BYTES_WITH_LOG)
    except UnreadableJson as error:
        raise UnreadableCallback(str(error)) from None
    if not isinstance(body, dict):
        raise UnreadableCallback("the body is no JSON object")
    is_training = "training_id" in body
    if len(raw) > MAX_BYTES and not (is_training and body.get("log")):
        raise BodyTooLarge
    if body.get("task_id") != task_id:
        raise ForeignTask
    try:
        return _training(body) if is_training else JobCallback.model_validate(body)
    except ValidationError as error:
        raise UnreadableCallback(_fields_of(error)) from None


def _training(body: dict[str, Any]) -> TrainingCallback:
    """A training's callback; a log that cannot be read costs the log, not the message around it."""
    try:
        return TrainingCallback.model_validate(body)
    except ValidationError as error:
        if any(item["loc"][0] != "log" for item in error.errors(include_url=False)):
            raise
        return TrainingCallback.model_validate({**body, "log": []})


def _fields_of(error: ValidationError) -> str:
    items = error.errors(include_url=False, include_input=False, include_context=False)[:8]
    return "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['type']}" for item in items)
