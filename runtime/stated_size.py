"""The size that a request states before its body is read. What arrives is counted all the same."""

from __future__ import annotations

from typing import Final

MAX_DIGITS: Final = 18


def stated_size(content_length: str | None) -> int | None:
    """What a `Content-Length` says; None where it is missing or no number of up to 18 digits."""
    is_number = content_length is not None and content_length.isascii() and content_length.isdigit()
    return int(content_length) if is_number and content_length and len(content_length) <= MAX_DIGITS else None


def is_stated_above(content_length: str | None, max_bytes: int) -> bool:
    """Whether a `Content-Length` states more than `max_bytes`. What is missing or no number states nothing."""
    if content_length is None or not (content_length.isascii() and content_length.isdigit()):
        return False
    return len(content_length) > MAX_DIGITS or int(content_length) > max_bytes
