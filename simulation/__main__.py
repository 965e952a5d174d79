"""`python -m simulation`: many seeds, or one with its trace."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable

from simulation.scenario import KINDS
from simulation.schedule import Outcome, play


def main() -> int:
    options = _options()
    logging.disable(logging.CRITICAL)
    if options.seed is not None:
        return _one(options.seed, options.kind or KINDS[0])
    seeds = range(options.first, options.first + options.seeds)
    kinds = [options.kind] if options.kind else KINDS
    return max(_many(seeds, kind, options.stop_after) for kind in kinds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop-after", type=int, default=3)
    return parser.parse_args()


def _one(seed: int, kind: str) -> int:
    outcome = play(seed, kind, is_traced=True)
    print("\n".join(outcome.trace))
    print(f"{kind} {seed}: {outcome.problem or outcome.end}")
    return 1 if outcome.problem else 0


def _many(seeds: Iterable[int], kind: str, stop_after: int) -> int:
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    began, ends, counts, failed = time.monotonic(), Counter[str](), Counter[str](), []
    for seed in seeds:
        outcome = play(seed, kind)
        ends[outcome.end] += 1
        counts.update(outcome.counts)
        if outcome.problem:
            failed.append(outcome)
            print(f"{kind} {seed}: {outcome.problem[:600]}")
            if len(failed) >= stop_after:
                break
    _print(kind, ends, counts, failed, time.monotonic() - began)
    return 1 if failed else 0


def _print(kind: str, ends: Counter[str], counts: Counter[str], failed: list[Outcome], seconds: float) -> None:
    total = sum(ends.values())
    print(f"{kind}: {total} schedules in {seconds:.1f} s, {total / seconds:.0f} a second; {len(failed)} failed")
    print("  ends: " + ", ".join(f"{end} {count}" for end, count in ends.most_common()))
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for outcome in failed:
        print(f"  replay: python -m simulation --kind {kind} --seed {outcome.seed}")


if __name__ == "__main__":
    sys.exit(main())
