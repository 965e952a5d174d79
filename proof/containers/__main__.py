"""`python -m proof.containers`: builds the image, runs docker-compose.yml, and judges both from outside.

Exit code 0: all checks passed, or no engine can run here, which the last line says; 1: a check failed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comfyui_temporal.process_end import end_process
from proof.containers.debian_engine import debian_engine
from proof.containers.engine import CannotRun, CommandFailed, Engine, found_engine
from proof.containers.image_checks import check_confinement, check_image, check_refusals
from proof.containers.project import Project
from proof.containers.report import Report, say
from proof.containers.stack_checks import (
    Outside,
    check_bridge,
    check_end,
    check_first_start,
    check_start_times,
    check_tasks,
)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        with _folder(options.folder) as folder, _engine(folder / "engine", options.debian) as engine:
            say(
                f"with {engine.name}"
                + (" and stand-ins for the images that a registry has" if engine.stand_ins else "")
            )
            return _judged(engine, folder)
    except CannotRun as reason:
        say(str(reason))
        say("containers: NOT RUN")
        return 0


def _judged(engine: Engine, folder: Path) -> int:
    report = Report()
    work = folder / "project"
    shutil.rmtree(work, ignore_errors=True)
    project = Project(engine, work)
    project.write()
    project.fetch()
    began = time.monotonic()

    def built() -> str:
        project.build(folder)
        return f"{', '.join(sorted(project.our_images()))}"

    if not report.check("the images are built", built):
        return report.close()
    try:
        _run_checks(project, report)
    finally:
        if report.failed:
            log = folder / "containers.log"
            log.write_text(project.logs())
            say(f"the containers' logs: {log}")
        try:
            project.down()
        except CommandFailed as failed:
            say(str(failed))
    say(f"{time.monotonic() - began:.0f} s")
    return report.close()


def _run_checks(project: Project, report: Report) -> None:
    check_image(project, report)
    if not check_first_start(project, report):
        return
    check_confinement(project, report)
    outside = Outside(project)
    check_tasks(project, report, outside)
    check_start_times(project, report)
    check_refusals(project, report)
    check_bridge(project, report, outside)
    check_end(project, report)


@contextmanager
def _engine(folder: Path, only_debian: bool) -> Iterator[Engine]:
    """Raises CannotRun."""
    engine = None if only_debian else found_engine()
    if engine is not None:
        yield engine
        return
    with debian_engine(folder) as made:
        yield made


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """A folder of one's own is kept, with the packages and base images in it."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="comfyui-temporal-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m proof.containers")
    parser.add_argument("--folder", type=Path, help="keeps an engine made here, for the next time; default: none")
    parser.add_argument("--debian", action="store_true", help="make an engine even if one is at hand")
    return parser.parse_args(arguments)


def _end(*_: object) -> None:
    """What runs is taken down on the way out."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    end_process(main())
