"""Measure everything on this machine: a table with ratios, and the same as JSON.

python -m proof.benchmarks                     about three quarters of an hour on two quiet processors
python -m proof.benchmarks --quick             about 10 minutes: smaller numbers, same measurements
python -m proof.benchmarks --only waits        compare, load, open, workers, callbacks, history, waits, starts, memory
"""

from __future__ import annotations

import argparse
import asyncio
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from comfyui_temporal.process_end import end_process
from local_stack.folder import DEFAULT_FOLDER
from proof.benchmarks import history_cost, memory, throughput, waiting_starts, whole_stack
from proof.benchmarks.results import Results
from runtime.logs import configure_logs


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    tasks: int
    rounds: int
    loads: tuple[int, ...]
    opened: tuple[int, ...]
    workers: tuple[int, ...]
    callbacks: tuple[int, ...]
    probes: int
    kills: int
    memory_tasks: int
    streams: int


FULL: Final = Size(480, 3, (20, 60, 120, 200), (0, 1_000, 10_000), (1, 2, 4), (5, 20, 50), 40, 5, 1_000, 10_000)
QUICK: Final = Size(240, 1, (20, 120), (0, 200), (1, 2), (5, 50), 10, 2, 200, 500)

MEASUREMENTS: Final[dict[str, tuple[str, Callable[[Size], Coroutine[Any, Any, Any]]]]] = {
    "compare": ("comparison", lambda size: throughput.compare(size.tasks, size.rounds)),
    "load": ("by_load", lambda size: throughput.by_load(size.loads)),
    "open": ("by_open_tasks", lambda size: throughput.by_open_tasks(size.tasks, size.opened)),
    "workers": ("by_workers", lambda size: throughput.by_workers(size.tasks, size.workers)),
    "callbacks": ("by_callbacks", lambda size: throughput.by_callbacks(size.tasks // 2, size.callbacks)),
    "history": ("history", lambda size: history_cost.measure()),
    "waits": ("waits", lambda size: whole_stack.measure(size.probes, size.kills)),
    "starts": ("starts", lambda size: waiting_starts.measure(size.probes)),
    "memory": ("memory", lambda size: memory.measure(size.memory_tasks, size.streams)),
}
"""Name → its field in the results, and what measures it."""


def run(names: list[str], *, quick: bool, file: Path) -> tuple[Results, list[str]]:
    """Measure, and keep what is known after each measurement; the names of those that failed."""
    results, failed = Results.begun(quick=quick), list[str]()
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{name} …", flush=True)
        place, measure = MEASUREMENTS[name]
        try:
            setattr(results, place, asyncio.run(measure(QUICK if quick else FULL)))
        except Exception:  # an hour's other measurements are worth keeping
            traceback.print_exc()
            failed.append(name)
        file.write_text(results.model_dump_json(indent=2) + "\n")
    return results, failed


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m proof.benchmarks", description=__doc__, formatter_class=form)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="more than once, too")
    parser.add_argument("--json", type=Path, default=DEFAULT_FOLDER / "bench.json", help="where the figures go")
    options = parser.parse_args()
    configure_logs(level="ERROR")
    file = options.json.absolute()
    results, failed = run(options.only or list(MEASUREMENTS), quick=options.quick, file=file)
    print(f"\n{results.table()}\n\nAs JSON: {file}")
    if failed:
        print(f"Not measured: {', '.join(failed)}; see above.")
    return 1 if failed else 0


if __name__ == "__main__":
    end_process(main())
