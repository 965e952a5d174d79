"""Seeded simulation of both workflows: many seeds, or one with everything that happens in it.

python -m proof.simulation --seeds 10000                    seeds 0 to 9,999 of both kinds of task
python -m proof.simulation --kind image --seed 943          one seed, traced
python -m proof.simulation --kind image --seed 39 --mutant continues_on_signals
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial

from proof.simulation.mutants import MUTANTS
from proof.simulation.scenario import KINDS, PROFILES
from proof.simulation.schedule import RESETS, Outcome, play

AT_ONCE = 100
"""Seeds that a process plays before it reports them."""


def main() -> int:
    options = _options()
    logging.disable(logging.CRITICAL)
    if options.seed is not None:
        return _one(options.seed, options.kind or KINDS[0], options)
    seeds = range(options.first, options.first + options.seeds)
    kinds = [options.kind] if options.kind else KINDS
    return max(_many(seeds, kind, options) for kind in kinds)


def _options() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m proof.simulation", description=__doc__, formatter_class=form)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many (1000)")
    parser.add_argument("--first", type=int, default=0, help="from which on (0)")
    parser.add_argument("--kind", choices=KINDS, help="one kind of task; both by default")
    parser.add_argument("--profile", choices=PROFILES, default="contract", help="whose credits service (contract)")
    parser.add_argument("--resets", type=float, default=RESETS, help="how likely a run is reset (%(default)g)")
    parser.add_argument("--signals", action="store_true", help="every callback a signal: no tick takes the short way")
    parser.add_argument("--without-troubles", action="store_true", help="seeds as they were before those were drawn")
    parser.add_argument("--seed", type=int, help="play this one and print all that happens")
    parser.add_argument("--mutant", choices=MUTANTS, help="put this mistake back first; only with --seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once (one for each processor)")
    parser.add_argument("--stop-after", type=int, default=3, help="failed seeds (3)")
    return parser.parse_args()


def _one(seed: int, kind: str, options: argparse.Namespace) -> int:
    with MUTANTS[options.mutant].put_back() if options.mutant else nullcontext():
        played = partial(play, short_way=not options.signals, troubles=not options.without_troubles, is_traced=True)
        outcome = played(seed, kind, profile=options.profile, resets=options.resets)
    print("\n".join(outcome.trace))
    print(f"{kind} {seed}: {outcome.problem or outcome.end}")
    return 1 if outcome.problem else 0


def _many(seeds: range, kind: str, options: argparse.Namespace) -> int:
    began, ends, counts, failed = time.monotonic(), Counter[str](), Counter[str](), list[Outcome]()
    with ProcessPoolExecutor(options.processes, initializer=_quiet) as processes:
        for outcome in _played(processes, seeds, kind, options):
            ends[outcome.end] += 1
            counts.update(outcome.counts)
            if outcome.problem:
                failed.append(outcome)
                print(f"{kind} {outcome.seed}: {outcome.problem[:600]}", flush=True)
            if len(failed) >= options.stop_after:
                processes.shutdown(cancel_futures=True)
                break
    print(f"{kind}:")
    _print(ends, counts, failed, options, time.monotonic() - began)
    return 1 if failed else 0


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def _played(processes: ProcessPoolExecutor, seeds: range, kind: str, options: argparse.Namespace) -> Iterator[Outcome]:
    chunks = [seeds[at : at + AT_ONCE] for at in range(0, len(seeds), AT_ONCE)]
    way = {"short_way": not options.signals, "troubles": not options.without_troubles}
    play_one = partial(play, kind=kind, profile=options.profile, resets=options.resets, **way)
    play_some = partial(_play_all, play_one)
    for outcomes in processes.map(play_some, chunks):
        yield from outcomes


def _play_all(play_one: Callable[[int], Outcome], seeds: range) -> list[Outcome]:
    return [play_one(seed) for seed in seeds]


def _print(
    ends: Counter[str], counts: Counter[str], failed: list[Outcome], options: argparse.Namespace, seconds: float
) -> None:
    total = sum(ends.values())
    print(f"  {total} schedules in {seconds:.1f} s, {total / seconds:.0f} a second; {len(failed)} failed")
    print("  ends: " + ", ".join(f"{end} {count}" for end, count in ends.most_common()))
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for outcome in failed:
        way = {"short_way": not options.signals, "troubles": not options.without_troubles}
        print(f"  replay: {outcome.command(options.profile, options.resets, **way)}")


if __name__ == "__main__":
    sys.exit(main())
