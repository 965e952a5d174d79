"""Workers of other releases: a run's continuation as a newer or an older worker would have written it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Final

from temporalio.api.common.v1 import Payload

UNKNOWN: Final = "of_a_later_release"
"""A field that the present code does not know."""
NEW_SINCE_0_1_0: Final = {
    "carried": {"run_number", "retry_at"},
    "hold": {
        *("asked_again", "asked_count", "asking", "checkpoint_passed", "committed", "given_back", "granted"),
        *("granted_before", "is_left", "is_unknown", "settlement"),
    },
    "asked": {"leaving", "told", "told_back"},
    "jobs": {"is_key_taken"},
    "price": {"resumed_from"},
    "watch": {"unreadable", "unreadable_since"},
}
"""Part of what is carried → its fields that the first release does not have."""
_UNDER_WAY: Final = ("leaving", "asking", "retry_at")
"""What the first release never hands on: before it continues as new it waits until these are over."""


class Release(StrEnum):
    PRESENT = "present"
    NEWER = "newer"
    OLDER = "older"


def handed_on(payload: Payload, release: Release) -> Payload:
    """A continued run's argument as a worker of that release hands it on."""
    run = json.loads(payload.data)
    if release is Release.NEWER:
        _each_part(run["carried"], lambda _name, part: part.update({UNKNOWN: True}))
    elif release is Release.OLDER and not _is_under_way(run["carried"]):
        _each_part(run["carried"], _forget_new)
    return Payload(metadata=dict(payload.metadata), data=json.dumps(run).encode())


def keeps_unknown(payload: Payload) -> bool:
    """Whether the fields of a newer worker are handed on."""
    carried = json.loads(payload.data).get("carried") or {}
    return bool(carried.get(UNKNOWN) and carried["hold"].get(UNKNOWN))


def _parts(carried: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "carried", carried
    for name in ("hold", "price", "watch"):
        if name in carried:
            yield name, carried[name]
    for hold in carried.get("hold", {}).get("asked", []):
        yield "asked", hold
    for job in carried.get("jobs", []):
        yield "jobs", job


def _each_part(carried: dict[str, Any], change: Callable[[str, dict[str, Any]], None]) -> None:
    for name, part in list(_parts(carried)):
        change(name, part)


def _forget_new(name: str, part: dict[str, Any]) -> None:
    for field in NEW_SINCE_0_1_0[name]:
        part.pop(field, None)


def _is_under_way(carried: dict[str, Any]) -> bool:
    return any(part.get(field) is not None for _, part in _parts(carried) for field in _UNDER_WAY)
