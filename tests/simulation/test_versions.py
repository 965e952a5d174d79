"""What the simulation's older worker forgets is what the first release did not have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from proof.simulation.versions import DECIDED_BEFORE, NEW_SINCE_0_1_0
from tests.versions.record import NEWEST, VERSIONS


def new_places(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """The places that only `now` has; of a list's objects the first stands for all."""
    if isinstance(before, list) and isinstance(now, list) and before and now:
        yield from new_places(before[0], now[0], place)
    elif isinstance(before, dict) and isinstance(now, dict):
        for name, value in now.items():
            here = f"{place}.{name}".lstrip(".")
            if name in before:
                yield from new_places(before[name], value, here)
            else:
                yield here


@pytest.mark.parametrize("run", ["image-run", "training-run"])
def test_an_older_worker_forgets_every_new_place(run: str) -> None:
    before, now = (json.loads((VERSIONS / release / f"{run}.json").read_text()) for release in ("0.1.0", NEWEST))
    found = {place for place in new_places(before["carried"], now["carried"]) if not place.startswith("jobs.request.")}
    assert found == NEW_SINCE_0_1_0 | DECIDED_BEFORE
