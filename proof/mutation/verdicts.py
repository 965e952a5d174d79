"""Verdicts of earlier runs, so that an interrupted run continues where it was."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from proof.mutation.judging import Fate, Verdict
from proof.mutation.mutations import Mutation, source_of

KILLERS_AT_MOST = 12


class Verdicts:
    """A file of one verdict a line.

    A kill is valid as long as the mutated module is unchanged. A survival is valid as long as everything is
    unchanged: newer tests may detect the mutant.
    """

    def __init__(self, file: Path, everything: str) -> None:
        """`everything`: a hash over all that judges."""
        self._file = file
        self._everything = everything
        self._sources: dict[str, str] = {}
        self._known = {line["key"]: line for line in self._lines()}

    def of(self, mutation: Mutation) -> Verdict | None:
        line = self._known.get(mutation.key)
        if line is None or line["source"] != self._source(mutation.module):
            return None
        fate = Fate(line["fate"])
        if fate.is_alive and line["everything"] != self._everything:
            return None
        return Verdict(fate, line["by"])

    def add(self, mutation: Mutation, verdict: Verdict) -> None:
        line = {
            "key": mutation.key,
            "module": mutation.module,
            "source": self._source(mutation.module),
            "everything": self._everything,
            "fate": verdict.fate.value,
            "by": verdict.by,
        }
        self._known[mutation.key] = line
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def killers(self) -> dict[str, list[str]]:
        """Module → the tests that killed most of its mutants."""
        counts: dict[str, Counter[str]] = {}
        for line in self._known.values():
            if line["fate"] == Fate.KILLED_BY_TESTS:
                counts.setdefault(line["module"], Counter())[line["by"]] += 1
        return {module: [test for test, _ in some.most_common(KILLERS_AT_MOST)] for module, some in counts.items()}

    def _source(self, module: str) -> str:
        if module not in self._sources:
            self._sources[module] = hashlib.sha256(source_of(module)).hexdigest()[:16]
        return self._sources[module]

    def _lines(self) -> Iterator[dict[str, str]]:
        if not self._file.exists():
            return
        for line in self._file.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the last line, of a run that was killed while it wrote
                continue
