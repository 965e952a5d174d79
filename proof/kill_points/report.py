"""The table: points by kinds; and for each cell that failed what was wrong and how to run it alone."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from operator import itemgetter
from typing import Final

from proof.kill_points.kinds import KINDS
from proof.kill_points.rounds import Cell
from proof.simulators.credits_profile import CONTRACT, CreditsProfile

SHOWN: Final = 6


def table(cells: Sequence[Cell]) -> str:
    """Markdown; `–` where a kind does not fit a point."""
    kinds = [name for name in KINDS if any(cell.kind.name == name for cell in cells)]
    by_place = {(cell.point.label, cell.kind.name): cell for cell in cells}
    labels = list(dict.fromkeys(cell.point.label for cell in cells))
    lines = [f"| point | {' | '.join(kinds)} |", f"| --- |{' --- |' * len(kinds)}"]
    for label in labels:
        shown = [_verdict(by_place.get((label, kind))) for kind in kinds]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _verdict(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return "**failed**" if cell.problems else "ok"


def failures(cells: Sequence[Cell], profile: CreditsProfile = CONTRACT) -> str:
    """Each failing cell, its problems and its command."""
    shown, named = [], "" if profile is CONTRACT else f" --profile {profile.name}"
    for cell in cells:
        if cell.problems:
            only = shlex.quote(cell.point.label)
            shown.append(f"{cell.point.label} × {cell.kind.name} ({cell.task_id})")
            shown += [f"    {problem}" for problem in cell.problems[:SHOWN]]
            shown.append(f"    alone: python -m proof.kill_points --only {only} --kinds {cell.kind.name}{named}")
    return "\n".join(shown)


def summary(cells: Sequence[Cell], seconds: float) -> str:
    failed = sum(bool(cell.problems) for cell in cells)
    recoveries = sorted(
        ((cell.recovery_seconds, cell) for cell in cells if cell.recovery_seconds is not None), key=itemgetter(0)
    )
    shown = f"{len(cells)} cells, {failed} failed, {seconds / 60:.1f} min"
    if not recoveries:
        return shown
    slowest, cell = recoveries[-1]
    median = statistics.median(seconds for seconds, _ in recoveries)
    return (
        f"{shown}; work went on after {median:.1f} s in the median, {slowest:.1f} s at worst "
        f"({cell.kind.name}, {cell.point.label}; {len(recoveries)} measured)"
    )
