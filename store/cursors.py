"""Opaque positions to continue reading from. Never a global counter: transactions commit out of order (pitfall 28)."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Final

from pydantic import TypeAdapter, ValidationError

from comfyui_temporal.contracts.fields import CallerId, Instant

_MAX_LENGTH = 512
_PLACE: Final[TypeAdapter[tuple[datetime, str]]] = TypeAdapter(tuple[Instant, CallerId])


class CursorInvalid(ValueError):
    """The text is not a cursor of this store."""


def _packed(*parts: str) -> str:
    return base64.urlsafe_b64encode("\n".join(parts).encode()).decode().rstrip("=")


def _unpacked(cursor: str, kind: str, count: int) -> list[str]:
    try:
        if len(cursor) > _MAX_LENGTH:
            raise ValueError
        padded = cursor + "=" * (-len(cursor) % 4)
        found, *parts = base64.b64decode(padded, altchars=b"-_", validate=True).decode().split("\n")
        if found != kind or len(parts) != count:
            raise ValueError
    except (ValueError, binascii.Error):
        raise CursorInvalid("This cursor is not from this service: leave it out to read from the start.") from None
    return parts


def event_cursor(task_id: str, seq: int) -> str:
    """The position after event `seq` of a task."""
    return _packed("e", task_id, str(seq))


def seq_of_cursor(cursor: str, task_id: str) -> int:
    """The `seq` after which to continue in this task's events. Raises CursorInvalid."""
    owner, seq = _unpacked(cursor, "e", 2)
    if owner != task_id or not (seq.isascii() and seq.isdigit() and len(seq) < 19):
        raise CursorInvalid("This cursor belongs to another task: leave it out to read from the start.")
    return int(seq)


def list_cursor(created_at: datetime, task_id: str) -> str:
    """The position after a task in the list, newest first."""
    return _packed("l", created_at.isoformat(), task_id)


def place_of_cursor(cursor: str) -> tuple[datetime, str]:
    """The creation time and id after which to continue in the list. Raises CursorInvalid."""
    created_at, task_id = _unpacked(cursor, "l", 2)
    try:
        return _PLACE.validate_python((created_at, task_id))
    except ValidationError:
        raise CursorInvalid("This cursor is not from this service: leave it out.") from None
