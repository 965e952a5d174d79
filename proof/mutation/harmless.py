"""The known survivors, each with its reason (`harmless.toml`).

They are matched by module, function and the changed line, not by a line number. An entry that no longer matches a
mutation is stale, which is an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proof.mutation.mutations import Mutation, folded

FILE: Final = Path(__file__).with_name("harmless.toml")


@dataclass(frozen=True)
class Entry:
    """Changes of one function that do no harm, for one reason."""

    module: str
    function: str
    becomes: tuple[str, ...]
    reason: str


class Harmless:
    """What `harmless.toml` names."""

    def __init__(self, entries: Iterable[Entry], read: Iterable[str] = ()) -> None:
        self.entries = list(entries)
        self.modules_read = frozenset(read)
        """Modules whose survivors were all reviewed: any other survivor is new."""
        self._reasons = {
            (entry.module, entry.function, folded(line)): entry.reason
            for entry in self.entries
            for line in entry.becomes
        }

    @classmethod
    def read(cls, file: Path = FILE) -> Harmless:
        """Raises ValueError where an entry lacks something."""
        entries, kept = [], tomllib.loads(file.read_text())
        for raw in kept["harmless"]:
            if set(raw) != {"module", "function", "becomes", "reason"} or not raw["reason"].strip():
                raise ValueError(f"{file.name}: an entry has module, function, becomes and reason, not {sorted(raw)}")
            entries.append(Entry(raw["module"], raw["function"], tuple(raw["becomes"]), raw["reason"]))
        return cls(entries, kept["read"])

    def reason(self, mutation: Mutation) -> str | None:
        return self._reasons.get((mutation.module, mutation.function, mutation.becomes))

    def stale(self, mutations: Iterable[Mutation]) -> list[str]:
        """The entries that match none of these, which are all there are."""
        present = {(mutation.module, mutation.function, mutation.becomes) for mutation in mutations}
        gone = self.modules_read - {module for module, _, _ in present}
        return [" | ".join(known) for known in self._reasons if known not in present] + sorted(gone)
