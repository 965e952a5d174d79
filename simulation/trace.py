"""What happened, as lines a person can read; costs next to nothing while nobody reads it."""

from __future__ import annotations

from typing import Any

from simulation.agenda import BEGINNING, Agenda


class Trace:
    """Lines of one schedule, each with the seconds since its beginning; kept only when wanted: give values, not text made of them."""

    def __init__(self, agenda: Agenda, *, is_wanted: bool) -> None:
        self._agenda = agenda
        self.is_wanted = is_wanted
        self.lines: list[str] = []

    def __call__(self, line: str, *values: Any) -> None:
        """A value that can be called is asked for its text only when the line is wanted."""
        if self.is_wanted:
            values = tuple(value() if callable(value) else value for value in values)
            self.lines.append(f"{self._agenda.now - BEGINNING:10.3f} {line % values if values else line}"[:400])
