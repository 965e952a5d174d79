"""Tasks of both kinds under random faults on a whole local stack; exit code 1 if something that must be 0 is not.

python -m proof.soak --tasks 10000             half an hour on two processors; Ctrl-C interrupts
python -m proof.soak --profile field           with the platform's own credits service (contract §4, field)
python -m proof.soak --resume                  go on with the plan in the folder
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path

from comfyui_temporal.process_end import end_process
from local_stack.background import start_stack
from local_stack.folder import DEFAULT_FOLDER, RunFolder, StackFailure
from local_stack.parts import PROFILE_SETTING, SETTINGS_PREFIX
from proof.simulators.credits_profile import PROFILES
from proof.site.waiting import NotRepaired
from proof.soak.journal import FILE, Journal
from proof.soak.plan import Plan
from proof.soak.run import soak

SETTINGS = {
    # Only warnings: the log lines of ten thousand tasks help no reader.
    "LOG_LEVEL": "WARNING",
    # At the soak's speed a terminated run is found in the time that an image takes.
    "RECONCILE_EVERY_SECONDS": "15",
    "RECONCILE_PAUSE_SECONDS": "10",
}
EXIT_UNTRUE = 1
EXIT_CANNOT = 2
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        journal = _journal(options)
        plan = journal.plan
        assert plan is not None
        for name, value in SETTINGS.items():
            os.environ.setdefault(f"{SETTINGS_PREFIX}{name}", value)
        os.environ[PROFILE_SETTING] = plan.profile
        folder = RunFolder(options.folder / "stack")
        stack = start_stack(folder, plan.speed, lambda line: print(f"  {line}", flush=True), has_lifeline=True)
        if stack is None:
            raise StackFailure(f"A stack is up in {folder.path} already: end it first.")
        try:
            is_good = asyncio.run(soak(folder, plan, journal))
        finally:
            stack.end()
    except (StackFailure, NotRepaired, Taken) as failure:
        print(failure, file=sys.stderr)
        return EXIT_CANNOT
    except ExceptionGroup as group:
        unrepaired, others = group.split(NotRepaired)
        if others is not None or unrepaired is None:
            raise
        print(f"{unrepaired.exceptions}\nThe stack's logs: {folder.log('stack').parent}", file=sys.stderr)
        return EXIT_CANNOT
    except KeyboardInterrupt:
        print("\nInterrupted; `--resume` goes on (`make soak RESUME=1`).")
        return EXIT_INTERRUPTED
    return 0 if is_good else EXIT_UNTRUE


class Taken(Exception):
    """The soak may not use this folder; the text says why."""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m proof.soak", description=__doc__, formatter_class=form)
    defaults = Plan(tasks=1)
    parser.add_argument("--tasks", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of tasks and faults (%(default)s)")
    parser.add_argument("--open", type=int, default=defaults.most_open, help="tasks open at once (%(default)s)")
    parser.add_argument("--gap", type=float, default=defaults.mean_gap_seconds, help="mean seconds between faults")
    parser.add_argument("--speed", type=float, default=defaults.speed, help="of the simulated work (%(default)g)")
    parser.add_argument("--profile", choices=list(PROFILES), default=defaults.profile, help="of the credits service")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER / "soak", help="where its state is kept")
    parser.add_argument("--resume", action="store_true", help="go on with the plan in the folder")
    return parser.parse_args(arguments)


def _journal(options: argparse.Namespace) -> Journal:
    """The journal to go on with, or a new one in an emptied folder. Raises Taken."""
    folder: Path = options.folder.absolute()
    if options.resume:
        journal = Journal(folder)
        if journal.plan is None:
            raise Taken(f"There is nothing to resume in {folder}.")
        return journal
    if folder.exists():
        if any(folder.iterdir()) and not (folder / FILE).exists():
            raise Taken(f"{folder} holds something else: choose another with --folder.")
        if RunFolder(folder / "stack").is_locked():
            raise Taken(f"A soak runs in {folder}.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, mode=0o700)
    journal = Journal(folder)
    journal.begin(
        Plan(
            tasks=options.tasks,
            seed=options.seed,
            most_open=options.open,
            mean_gap_seconds=options.gap,
            speed=options.speed,
            profile=options.profile,
        )
    )
    return journal


if __name__ == "__main__":
    end_process(main())
