"""One line for each check, and one at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Final

SHOWN_CHARACTERS: Final = 1500


class Report:
    """Checks go on after one that failed: each says its own."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0

    def check(self, name: str, look: Callable[[], str]) -> bool:
        """`look` returns what was seen, or raises. Returns whether it passed."""
        began = time.monotonic()
        try:
            said, word = look(), "ok"
            self.passed += 1
        except Exception as error:  # whatever it is, the other checks still run
            said, word = f"{type(error).__name__}: {error}"[-SHOWN_CHARACTERS:], "FAILED"
            self.failed += 1
        say(f"{word:6} {name} ({time.monotonic() - began:.1f} s): {said}")
        return word == "ok"

    def close(self) -> int:
        """Prints the sum. Returns the exit code."""
        say(f"containers: {self.passed} passed, {self.failed} failed")
        return 1 if self.failed else 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def must(holds: object, otherwise: str) -> None:
    """Raises AssertionError with the sentence."""
    if not holds:
        raise AssertionError(otherwise)


def in_time(seconds: float, limit_seconds: float) -> str:
    """Raises AssertionError for more than the limit, unless other work has the processors now."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if seconds <= limit_seconds:
        return f"at most {limit_seconds:g} s"
    must(load > 1.5 * processors, f"{seconds:.1f} s, more than {limit_seconds:g} s")
    return f"NOT JUDGED: more than {limit_seconds:g} s, at a load of {load:.0f} on {processors} processors"
