"""The verdicts on a run of mutants, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from proof.mutation.judging import Fate, Verdict
from proof.mutation.mutations import Mutation

Judged = tuple[Mutation, Verdict]
_COLUMNS: Final = ("module", "mutants", "simulation", "tests", "harmless", "survived")


def table(judged: Sequence[Judged], harmless: Sequence[Mutation]) -> str:
    """One row a module: how many the simulation and the tests killed, and how many survived."""
    fates: dict[str, Counter[str]] = {}
    for mutation, verdict in judged:
        column = "survived" if verdict.fate.is_alive else verdict.fate.value
        fates.setdefault(mutation.module, Counter())[column] += 1
    for mutation in harmless:
        fates.setdefault(mutation.module, Counter())["harmless"] += 1
    rows = [(module, *_numbers(counts)) for module, counts in sorted(fates.items())]
    rows.append(("all", *_numbers(sum(fates.values(), Counter()))))
    lines = [" | ".join(map(str, row)) for row in (_COLUMNS, ("---", *("---:",) * 5), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _numbers(counts: Counter[str]) -> list[int]:
    return [counts.total(), *(counts[column] for column in _COLUMNS[2:])]


def survivors(judged: Sequence[Judged]) -> str:
    """Each with its place and its change."""
    return "\n".join(_survivor(mutation, verdict) for mutation, verdict in judged if verdict.fate.is_alive)


def _survivor(mutation: Mutation, verdict: Verdict) -> str:
    where = f"{mutation.module}:{mutation.line} {mutation.function}"
    unreached = "  (no seed and no test comes here)" if verdict.fate is Fate.UNREACHED else ""
    return f"{where}{unreached}\n    - {mutation.was}\n    + {mutation.becomes}"
