"""The verdict on one mutant: by the simulation first, then by the tests that reach the change."""

from __future__ import annotations

import gc
import importlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import pytest

from proof.mutation.forked import Broke, RanOn, forked
from proof.mutation.in_memory import InMemory, forget
from proof.mutation.mutations import ROOT, Mutation
from proof.mutation.reach import EVERYWHERE, Reach, Seed, simulation

SIMULATION_CPU_SECONDS: Final = 15
"""Limit for all seeds of one mutant. They take a third of it; a mutant with a busy loop takes all of it."""
TEST_CPU_SECONDS: Final = 300
TEST_LIMIT_SECONDS: Final = 40
"""Limit for one test. None takes a quarter of it; a run that a mutant leaves stuck takes all of it."""
AGAIN_AT_MOST: Final = 3
"""How often a test may fail that does not fail when it is run alone."""


class Fate(StrEnum):
    """The fate of a mutant."""

    KILLED_BY_SIMULATION = "simulation"
    KILLED_BY_TESTS = "tests"
    SURVIVED = "survived"
    UNREACHED = "unreached"
    """Survived, and no seed and no test reaches what was changed."""

    @property
    def is_alive(self) -> bool:
        return self in (Fate.SURVIVED, Fate.UNREACHED)


@dataclass(frozen=True)
class Verdict:
    """A mutant's fate, and who killed it: a seed with what it saw, or a test."""

    fate: Fate
    by: str = ""


@dataclass(frozen=True)
class Effort:
    """How much is done for one mutant."""

    seeds: int
    """The most schedules that judge it, of those that reach it."""
    test_seconds: float
    """The tests that reach it, until they took this long without any mutant."""


class Judge:
    """Judges mutants one after another, each in processes of its own."""

    def __init__(self, reach: Reach, effort: Effort, killers: dict[str, list[str]], folder: Path) -> None:
        """`killers`: module → tests that killed mutants of it before; they are run first."""
        self._reach = reach
        self._effort = effort
        self._killers = killers
        self._folder = folder

    def check(self) -> None:
        """Raises RuntimeError if tests fail without any mutant: then they would seem to kill every mutant."""
        some = [min(tests, key=lambda test: self._reach.seconds[test]) for tests in self._reach.tests.values()]
        failed = self._first_failure(None, some[:1])
        if failed is not None:
            raise RuntimeError(f"fails without any mutant: {failed}; see {self._log('tests')}")

    def verdict(self, mutation: Mutation) -> Verdict:
        block = f"{mutation.module}:{mutation.block}"
        seeds, tests = self._reach.seeds.get(block, []), self._reach.tests.get(block, [])
        if not mutation.block:  # no statement of a function: every import reaches it
            seeds = self._reach.seeds.get(EVERYWHERE, [])
            tests = sorted({test for other, some in self._reach.tests.items() for test in some if _of(other, mutation)})
        if seeds:
            seen = self._simulated(mutation, spread(seeds, self._effort.seeds))
            if seen is not None:
                return Verdict(Fate.KILLED_BY_SIMULATION, seen)
        chosen = self._chosen(mutation.module, tests)
        if chosen:
            failed = self._tested(mutation, chosen)
            if failed is not None:
                return Verdict(Fate.KILLED_BY_TESTS, failed)
        return Verdict(Fate.SURVIVED if seeds or chosen else Fate.UNREACHED)

    # The simulation

    def _simulated(self, mutation: Mutation, seeds: Sequence[Seed]) -> str | None:
        """What a seed saw of the mutant, or None."""

        def played() -> str | None:
            _put_in(mutation)
            play = simulation()
            for seed in seeds:
                problem = play(seed)
                if problem is not None:
                    return f"{seed}: {problem[:200]}"
            return None

        try:
            seen: str | None = forked(
                played,
                cpu_seconds=SIMULATION_CPU_SECONDS,
                wall_seconds=4 * SIMULATION_CPU_SECONDS,
                log=self._log("simulation"),
            )
        except (RanOn, Broke) as error:
            return str(error)
        return seen

    # The tests

    def _chosen(self, module: str, tests: Sequence[str]) -> list[str]:
        """The killers first, then one case of each test function, then its others; the quick ones first."""
        cases, order = Counter[str](), dict[str, tuple[int, int, float]]()
        killers = self._killers.get(module, [])
        for test in sorted(tests, key=lambda test: self._reach.seconds[test]):
            function = test.partition("[")[0]
            order[test] = (0 if test in killers else 1, cases[function], self._reach.seconds[test])
            cases[function] += 1
        chosen, left = [], self._effort.test_seconds
        for test in sorted(order, key=order.__getitem__):
            chosen.append(test)
            left -= self._reach.seconds[test]
            if left <= 0:
                break
        return chosen

    def _tested(self, mutation: Mutation, tests: list[str]) -> str | None:
        """The test that fails with the mutant, also when it is run alone; or None."""
        rest = list(tests)
        for _ in range(AGAIN_AT_MOST):
            failed = self._first_failure(mutation, rest)
            if failed is None:
                return None
            if failed not in rest or self._first_failure(mutation, [failed]) is not None:
                return failed
            rest.remove(failed)
        return None

    def _first_failure(self, mutation: Mutation | None, tests: list[str]) -> str | None:
        def run() -> str | None:
            if mutation is not None:
                _put_in(mutation)
            return first_failure(tests)

        usual = sum(self._reach.seconds[test] for test in tests)
        try:
            failed: str | None = forked(
                run, cpu_seconds=TEST_CPU_SECONDS, wall_seconds=60 + 5 * usual, log=self._log("tests")
            )
        except (RanOn, Broke) as error:
            return str(error)
        return failed

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}-{os.getpid()}.log"


def load_what_others_wrote() -> None:
    """Import modules that every mutant's process needs and none changes: forks then have them already."""
    for name in ("proof.simulation.schedule", "tests.workflows.platform"):
        importlib.import_module(name)
    forget()
    gc.freeze()


def spread(seeds: Sequence[Seed], most: int) -> list[Seed]:
    """At most this many, from kinds and profiles in turn."""
    groups: dict[tuple[str, str], list[Seed]] = {}
    for seed in seeds:
        groups.setdefault((seed.kind, seed.profile), []).append(seed)
    longest = max(map(len, groups.values()), default=0)
    turns = [some[at] for at in range(longest) for some in groups.values() if at < len(some)]
    return turns[:most]


def first_failure(tests: list[str]) -> str | None:
    """Run these in this process; the first that fails, or None. Raises AssertionError where pytest cannot run them."""
    seen = _Watch(tests)
    # Modules that were loaded before the fork are not tests: their assertions need no rewriting.
    as_they_are = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them would take most of the start
    plugins = ["-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    options = ["-x", *plugins, f"--timeout={TEST_LIMIT_SECONDS}", "--rootdir", str(ROOT)]
    code = pytest.main([*options, *as_they_are, *tests], plugins=[seen])
    if seen.failed is not None:
        return seen.failed
    assert code == pytest.ExitCode.OK, f"pytest ended with {code!r}"
    return None


class _Watch:
    """pytest plugin: keeps the order that was given, and what failed first."""

    def __init__(self, tests: list[str]) -> None:
        self.failed: str | None = None
        self._place = {test: at for at, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._place.get(item.nodeid, len(self._place)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} cannot be imported"


def _of(block: str, mutation: Mutation) -> bool:
    return block.startswith(f"{mutation.module}:")


def _put_in(mutation: Mutation) -> None:
    InMemory({mutation.module: mutation.applied()}).install()
