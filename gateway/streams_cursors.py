"""A stream's position, as one opaque cursor (contract §6).

The position of a stream of one task is its last event's own cursor. A stream of several tasks has a `seq` in each. Its
cursor holds a short digest of each task's id with its `seq`, so that fifty tasks fit into a header. The order of the
tasks does not matter, and tasks may be added or left out when the stream is opened again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from store import CursorInvalid
from store.cursors import event_cursor, seq_of_cursor

_KIND: Final = b"s"
_DIGEST_BYTES: Final = 5
_SEQ_BYTES: Final = 5
_ENTRY_BYTES: Final = _DIGEST_BYTES + _SEQ_BYTES
_MAX_LENGTH: Final = 2_048


def cursor_of(positions: Mapping[str, int]) -> str:
    """The cursor of a stream that has sent each task up to its `seq`."""
    if len(positions) == 1:
        [(task_id, seq)] = positions.items()
        return event_cursor(task_id, seq)
    entries = b"".join(_digest(task_id) + seq.to_bytes(_SEQ_BYTES, "big") for task_id, seq in positions.items())
    return base64.urlsafe_b64encode(_KIND + entries).decode().rstrip("=")


def positions_of(cursor: str, task_ids: Sequence[str]) -> dict[str, int]:
    """The `seq` of each task after which to continue. A task that is not in the cursor begins at its start.

    Takes the cursor of a stream and that of a single event. Raises CursorInvalid.
    """
    known = _entries(cursor)
    if known is not None:
        return {task_id: known.get(_digest(task_id), 0) for task_id in task_ids}
    positions = dict.fromkeys(task_ids, 0)
    for task_id in task_ids:
        try:
            positions[task_id] = min(seq_of_cursor(cursor, task_id), 256**_SEQ_BYTES - 1)
        except CursorInvalid:
            continue
        return positions
    raise CursorInvalid("This cursor is not for any of these tasks: leave it out to read from the start.")


def _entries(cursor: str) -> dict[bytes, int] | None:
    """Digest → seq; None if it is not a cursor of several tasks."""
    if len(cursor) > _MAX_LENGTH:
        raise CursorInvalid("This cursor is not from this service: leave it out to read from the start.")
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return None
    if raw[:1] != _KIND or (len(raw) - 1) % _ENTRY_BYTES:
        return None
    places = range(1, len(raw), _ENTRY_BYTES)
    return {
        raw[place : place + _DIGEST_BYTES]: int.from_bytes(raw[place + _DIGEST_BYTES : place + _ENTRY_BYTES], "big")
        for place in places
    }


def _digest(task_id: str) -> bytes:
    return hashlib.blake2s(task_id.encode(), digest_size=_DIGEST_BYTES).digest()
