"""Mutants of workflows and activities: which survive the simulation and the tests; exit code 1 if one does.

python -m proof.mutation                                  all of them; goes on where it was interrupted
python -m proof.mutation --only workflows/stop.py         some modules; may be repeated
python -m proof.mutation --read --sample 60 --seed 3      some mutants of the modules whose survivors were all read
python -m proof.mutation --list --only workflows/stop.py  what would be judged
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import Final

from proof.mutation import report
from proof.mutation.forked import adopt_orphans, forked
from proof.mutation.harmless import Harmless
from proof.mutation.judging import Effort, Judge, Verdict, load_what_others_wrote
from proof.mutation.mutations import CONTRACTS, FOLDERS, ROOT, Mutation, modules, mutations_of
from proof.mutation.reach import EVERYWHERE, Block, Reach, Seed, fingerprint, kept, seeds_that_reach
from proof.mutation.tests_played import tests_that_reach
from proof.mutation.verdicts import Verdicts

FOLDER: Final = ROOT / ".run" / "mutation"
EXIT_SURVIVORS = 1
EXIT_CANNOT = 2
_judge: Judge


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CANNOT))
    everywhere = [mutation for module in modules([]) for mutation in mutations_of(module)]
    harmless = Harmless.read()
    stale = harmless.stale(everywhere)
    if stale:
        print("Named as harmless, and no mutation any more:", *stale, sep="\n  ", file=sys.stderr)
        return EXIT_CANNOT
    if options.read:
        everywhere = [mutation for mutation in everywhere if mutation.module in harmless.modules_read]
    wanted = _wanted(everywhere, options)
    if options.list:
        print(*(f"{each.module}:{each.line} {each.function}\n    + {each.becomes}" for each in wanted), sep="\n")
        return 0
    began = time.monotonic()
    known = [mutation for mutation in wanted if harmless.reason(mutation)]
    judged = _judged([mutation for mutation in wanted if not harmless.reason(mutation)], options)
    print(report.table(judged, known))
    print(report.survivors(judged))
    alive = sum(verdict.fate.is_alive for _, verdict in judged)
    print(f"{len(wanted)} mutants, {alive} survived; {time.monotonic() - began:.0f} s")
    return EXIT_SURVIVORS if alive else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m proof.mutation", description=__doc__, formatter_class=form)
    parser.add_argument("--only", action="append", default=[], help="modules whose path begins so; may be repeated")
    parser.add_argument("--read", action="store_true", help="modules whose survivors were all read (harmless.toml)")
    parser.add_argument("--sample", type=int, help="so many of them, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="which sample (0)")
    parser.add_argument("--seeds", type=int, default=1_200, help="schedules to choose from (1200)")
    parser.add_argument("--seeds-each", type=int, default=150, help="schedules for one mutant at most (150)")
    parser.add_argument("--test-seconds", type=float, default=60.0, help="of tests for one mutant at most (60)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once (one for each processor)")
    parser.add_argument("--tests", action="append", default=[], help="test files whose path begins so; may be repeated")
    parser.add_argument("--quick", action="store_true", help="by the simulation alone: what survives may die of a test")
    parser.add_argument("--list", action="store_true", help="list the mutants, judge none")
    return parser.parse_args(arguments)


def _wanted(everywhere: list[Mutation], options: argparse.Namespace) -> list[Mutation]:
    chosen = set(modules(options.only))
    wanted = [mutation for mutation in everywhere if mutation.module in chosen]
    if options.sample is None or options.sample >= len(wanted):
        return wanted
    drawn = random.Random(options.seed).sample(range(len(wanted)), options.sample)  # noqa: S311 - to be drawn again
    return [wanted[at] for at in sorted(drawn)]


def _judged(wanted: list[Mutation], options: argparse.Namespace) -> list[report.Judged]:
    """Each with its verdict, in order; what was judged before is not judged again."""
    everything = fingerprint(
        *FOLDERS, CONTRACTS, "store", "proof/checks", "proof/simulation", "proof/simulators", "tests"
    )
    effort = Effort(seeds=options.seeds_each, test_seconds=0.0 if options.quick else options.test_seconds)
    verdicts = Verdicts(FOLDER / "verdicts.jsonl", f"{everything} {effort} {options.tests}")
    waiting = [mutation for mutation in wanted if verdicts.of(mutation) is None]
    if waiting:
        FOLDER.mkdir(parents=True, exist_ok=True)
        load_what_others_wrote()
        reach = Reach() if options.quick else tests_that_reach(FOLDER, options.tests)
        reach.seeds = _seeds(options.seeds)
        global _judge
        _judge = Judge(reach, effort, verdicts.killers(), FOLDER)
        if not options.quick:
            _judge.check()
        with multiprocessing.get_context("fork").Pool(options.processes, _begin) as processes:
            results = processes.imap_unordered(_verdict, waiting)
            for number, (mutation, verdict) in enumerate(results, start=1):
                verdicts.add(mutation, verdict)
                _tell(number, len(waiting), mutation, verdict)
    judged = []
    for mutation in wanted:
        kept_verdict = verdicts.of(mutation)
        assert kept_verdict is not None, mutation.key
        judged.append((mutation, kept_verdict))
    return judged


def _begin() -> None:
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def _verdict(mutation: Mutation) -> tuple[Mutation, Verdict]:
    return mutation, _judge.verdict(mutation)


def _tell(number: int, count: int, mutation: Mutation, verdict: Verdict) -> None:
    change = f"{mutation.module}:{mutation.line} {mutation.becomes[:80]}"
    print(f"{number}/{count} {verdict.fate.value:<10} {change}  <- {verdict.by[:100]}", flush=True)


def _seeds(count: int) -> dict[Block, list[Seed]]:
    """Which of so many schedules reach each block; computed again where the code has changed."""

    def played() -> dict[Block, list[Seed]]:
        print(f"finding out what {count} schedules reach ...", flush=True)
        found: dict[Block, list[Seed]] = forked(
            lambda: seeds_that_reach(count), cpu_seconds=1_800, wall_seconds=3_600, log=FOLDER / "reach-seeds.log"
        )
        return found

    found = kept(
        FOLDER / f"reach-seeds-{count}.json",
        fingerprint(*FOLDERS, CONTRACTS, "proof/checks", "proof/simulation"),
        played,
    )
    seeds = {block: [Seed(*parts) for parts in some] for block, some in found.items()}
    failed = count - len(seeds.get(EVERYWHERE, []))
    if failed > 0:
        print(f"{failed} schedules fail without any mutant, and judge none.", flush=True)
    return seeds


if __name__ == "__main__":
    sys.exit(main())
