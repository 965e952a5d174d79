"""Callback secrets (contract §2) by name: one for each ComfyUI server, so that one can be withdrawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_NAMED: Final = re.compile(r"([A-Za-z0-9._-]{1,64}):(.*)")


def by_name(secrets: Sequence[str]) -> dict[str, str]:
    """`whsec_…` by name, of `name:whsec_…` or of `whsec_…` alone, which is named by its place: 1, 2, …

    Raises ValueError for a name that is there twice.
    """
    found: dict[str, str] = {}
    for number, given in enumerate(secrets, start=1):
        match = _NAMED.fullmatch(given)
        name, secret = match.groups() if match else (str(number), given)
        if name in found:
            raise ValueError(f"Two callback secrets are named {name}: give each ComfyUI server a name of its own.")
        found[name] = secret
    return found
