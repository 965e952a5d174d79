"""Bytes from outside → JSON, with limits, before any model sees them (pitfalls 5, 25)."""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from comfyui_temporal.contracts.fields import MAX_DEPTH, repaired

MAX_DIGITS: Final = 20
TOO_LARGE: Final = 10**MAX_DIGITS
"""Value of a longer number: out of every range, so that its field is reported."""


class UnreadableJson(ValueError):
    """The bytes are not acceptable JSON: too large, too deep, not finite, or not UTF-8."""


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableJson(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise UnreadableJson("a number is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        return -TOO_LARGE if text.startswith("-") else TOO_LARGE
    return int(text)


def _repaired(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise UnreadableJson(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return repaired(value)
    if isinstance(value, dict):
        return {repaired(key): _repaired(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_repaired(item, depth + 1) for item in value]
    return value


def _is_plain(raw: bytes) -> bool:
    """Whether it has little nesting and no escapes that may need repair, so that it need not be walked through."""
    return raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH and b"\\u" not in raw and b"\xed" not in raw


def read_json(raw: bytes, *, max_bytes: int) -> Any:
    """The JSON value in `raw`, with NULs and lone surrogates replaced in its texts.

    The last value of a repeated key counts. Raises only UnreadableJson.
    """
    if len(raw) > max_bytes:
        raise UnreadableJson(f"larger than {max_bytes} bytes")
    try:
        value = json.loads(raw, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole)
        return value if _is_plain(raw) else _repaired(value)
    except UnreadableJson:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableJson(f"not JSON: {type(error).__name__}") from None
