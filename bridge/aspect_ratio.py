"""Width and height for an aspect ratio: as many pixels as the resolution has, in steps that the model can do."""

from __future__ import annotations

import math
import re
from typing import Final

_FORM: Final = re.compile(r"([1-9]\d?):([1-9]\d?)")


def is_ratio(text: str) -> bool:
    """Whether it is two numbers of one or two digits, e.g. `16:9`."""
    return _FORM.fullmatch(text) is not None


def sized(ratio: str, *, width: int, height: int, multiple: int) -> tuple[int, int]:
    """(width, height) in pixels: about `width * height` of them, both multiples of `multiple`, in this ratio."""
    across, down = (int(part) for part in ratio.split(":"))
    pixels = width * height
    wide = math.sqrt(pixels * across / down)
    return _nearest(wide, multiple), _nearest(pixels / wide, multiple)


def _nearest(pixels: float, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)
