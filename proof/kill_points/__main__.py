"""Inject faults into the real stack at every point of both flows; exit code 1 if a task did not end as it must.

python -m proof.kill_points                                    everything
python -m proof.kill_points --kinds worker-killed,terminated   some kinds of fault
python -m proof.kill_points --only "image: commit"             some points
python -m proof.kill_points --profile field                    with the field's credits service (contract §4)
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from comfyui_temporal.process_end import end_process
from local_stack.folder import StackFailure
from proof.kill_points.kinds import KINDS, Kind
from proof.kill_points.points import Point, all_points
from proof.kill_points.report import failures, summary, table
from proof.kill_points.rounds import Cell, Laps, run_round
from proof.kill_points.site import opened_site
from proof.kill_points.stack import KillableStack
from proof.simulators.credits_profile import CONTRACT, PROFILES

EXIT_FAILED = 1
EXIT_CANNOT = 2


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    points, kinds = chosen_points(options.only), [KINDS[name] for name in options.kinds]
    if not points:
        print(f"No point is called {', '.join(options.only)}.", file=sys.stderr)
        return EXIT_CANNOT
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-points-"))
    folder.chmod(0o755)
    try:
        stack = KillableStack(folder / "run", PROFILES[options.profile])
        cells = asyncio.run(run_rounds(stack, kinds, points, within_seconds=options.within, most=options.most))
    except StackFailure as failure:
        print(failure, file=sys.stderr)
        return EXIT_CANNOT
    print(table(cells))
    has_failed = any(cell.problems for cell in cells)
    if has_failed:
        print(f"\nLogs: {folder / 'run' / 'logs'}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{summary(cells, time.monotonic() - began)}")
    return EXIT_FAILED if has_failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m proof.kill_points", description=__doc__, formatter_class=form)
    parser.add_argument("--only", action="append", default=[], help="points whose name holds this; may be repeated")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--profile", choices=list(PROFILES), default=CONTRACT.name, help="of the credits service")
    parser.add_argument("--within", type=float, default=5.0, help="seconds within which work has to go on (5)")
    parser.add_argument("--most", type=int, default=50, help="tasks at once (50)")
    return parser.parse_args(arguments)


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return names


def chosen_points(only: Sequence[str]) -> list[Point]:
    """All, or those whose label is one of these; where none is, those whose label holds one."""
    points = all_points()
    if not only:
        return points
    exact = [point for point in points if point.label in only]
    return exact or [point for point in points if any(part in point.label for part in only)]


async def run_rounds(
    stack: KillableStack, kinds: Sequence[Kind], points: Sequence[Point], *, within_seconds: float, most: int
) -> list[Cell]:
    """Every cell, with its problems. Raises StackFailure."""
    cells: list[Cell] = []
    number = 0
    async with opened_site(stack) as site:
        for kind in kinds:
            fitting = [point for point in points if kind.fits(point)]
            for some in _evenly(fitting, most):
                number += 1
                laps = Laps()
                done = await run_round(site, kind, some, number, laps)
                _check_recovery(done, within_seconds)
                cells += done
                failed = sum(bool(cell.problems) for cell in done)
                print(f"{kind.name}: {len(done)} cells, {failed} failed: {laps}", flush=True)
                if failed:
                    print(failures(done, stack.profile), flush=True)
    return cells


def _evenly(points: Sequence[Point], most: int) -> list[Sequence[Point]]:
    """Parts of about the same length, none longer than `most`."""
    count = math.ceil(len(points) / most)
    return [points[n::count] for n in range(count)]


def _check_recovery(cells: Sequence[Cell], within_seconds: float) -> None:
    """Work goes on in time, except for calls in a longer pause and for runs that were ended."""
    for cell in cells:
        if cell.kind.ends_runs or not cell.is_first_try:
            cell.recovery_seconds = None
        if cell.recovery_seconds is not None and cell.recovery_seconds > within_seconds:
            cell.problems.append(f"work went on only after {cell.recovery_seconds:.1f} s")


if __name__ == "__main__":
    end_process(main())
