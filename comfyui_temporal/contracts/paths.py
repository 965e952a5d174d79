"""Paths from outside, judged decoded (pitfall 57): whoever reads a path later may decode it once more."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

MAX_DECODINGS: Final = 3


def spellings(text: str) -> list[str]:
    """The text, and what each percent-decoding makes of it. Raises ValueError beyond three."""
    found = [text]
    while (decoded := unquote(found[-1])) != found[-1]:
        if len(found) > MAX_DECODINGS:
            raise ValueError(f"must not be percent-encoded more than {MAX_DECODINGS} times")
        found.append(decoded)
    return found


def leaves_folder(path: str) -> bool:
    """Whether a path is absolute or has '..' in one of its spellings. A backslash counts as a slash."""
    try:
        forms = [spelling.replace("\\", "/") for spelling in spellings(path)]
    except ValueError:
        return True
    return any(form.startswith("/") or ".." in form.split("/") for form in forms)


def is_plain(path: str) -> bool:
    """Whether a path stays below its folder in each of its spellings: relative, not empty, without '..', '.',
    backslashes or control characters."""
    if leaves_folder(path):
        return False
    return all(
        bool(form.strip("/"))
        and "\\" not in form
        and "." not in form.split("/")
        and all(character >= " " for character in form)
        for form in spellings(path)
    )
