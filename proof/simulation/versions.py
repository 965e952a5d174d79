"""Workers of other releases: a run's continuation as a newer or an older worker would have written it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Final

from temporalio.api.common.v1 import Payload

UNKNOWN: Final = "of_a_later_release"
"""A field that the present code does not know."""
NEW_SINCE_0_1_0: Final = frozenset(
    {
        *("models", "retry_at", "run_number", "dataset.snapshot.manifest", "jobs.is_key_taken"),
        *("price.askings", "price.resumed_from"),
        *(f"hold.asked.{name}" for name in ("leaving", "told", "told_back")),
        *(f"hold.{name}" for name in ("asked_again", "asked_count", "asking", "checkpoint_passed", "committed")),
        *(f"hold.{name}" for name in ("given_back", "granted", "granted_before", "is_left", "is_unknown")),
        "hold.settlement",
        *(f"record.{name}" for name in ("claimed_at", "input_sha256", "written_version", "unwritten.is_change")),
        *(f"record.state.{name}" for name in ("credits.pre_deduct_count", "credits.settlement", "dataset", "taken")),
        *(f"record.{name}.confirmation.is_running" for name in ("state", "unwritten")),
        *(f"{name}.output.sha256" for name in ("record.state", "record.unwritten", "watch.inbox", "watch.newest")),
        *(f"watch.{name}" for name in ("looked_at", "reported_at", "unreadable", "unreadable_since")),
    }
)
"""The places in what is carried that the first release does not have, but for requests: they are sent as they were."""
DECIDED_BEFORE: Final = frozenset(
    {
        *("hold.lives", "watch.begun"),
        *(f"clock.{name}" for name in ("counts_from_processing", "longest_span_minutes", "queued_seconds")),
        *(f"policy.{name}" for name in ("checks_balance_first", "counts_from_processing", "prices.lora", "short_way")),
    }
)
"""New too, and not forgotten: a run of the first release lacks them from its start, and none loses them on its way."""
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
        for place in NEW_SINCE_0_1_0:
            _forget(run["carried"], place.split("."))
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


def _forget(part: Any, place: list[str]) -> None:
    if isinstance(part, list):
        for each in part:
            _forget(each, place)
    elif isinstance(part, dict) and len(place) > 1:
        _forget(part.get(place[0]), place[1:])
    elif isinstance(part, dict):
        part.pop(place[0], None)


def _is_under_way(carried: dict[str, Any]) -> bool:
    return any(part.get(field) is not None for _, part in _parts(carried) for field in _UNDER_WAY)
