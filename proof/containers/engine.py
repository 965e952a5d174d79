"""A container engine, spoken to by its command `docker`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

OLDEST_COMPOSE: Final = (2, 24)
"""Files of settings that may be missing, and `!override`, exist since then."""
MINUTES: Final = 60.0
SHOWN_LINES: Final = 3


class CannotRun(Exception):
    """There is no engine here, and none can be made. The text says why."""


class CommandFailed(Exception):
    """A command of the engine failed. The text has its last words."""


@dataclass(frozen=True)
class Engine:
    """`stand_ins`: no registry is asked; the images that our files name are made on the spot."""

    name: str
    docker: str
    environment: Mapping[str, str] = field(default_factory=dict)
    stand_ins: bool = False
    name_server: str | None = None
    """An address that every container must use as its name server."""

    def run(
        self, *words: str, within_seconds: float = 2 * MINUTES, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Raises CommandFailed for an exit code other than 0, unless not `check`."""
        done = subprocess.run(  # noqa: S603
            [self.docker, *words],
            env={**os.environ, **self.environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=within_seconds,
        )
        if check and done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-SHOWN_LINES:]
            raise CommandFailed(f"exit code {done.returncode} of {' '.join(words)[:160]}: {' | '.join(last)}")
        return done

    def inspected(self, what: str, template: str) -> str:
        """One value of an image or container. Raises CommandFailed."""
        return self.run("inspect", "--format", template, what).stdout.strip()


def found_engine() -> Engine | None:
    """The engine that `docker` reaches, with a compose that understands our file."""
    docker = shutil.which("docker")
    if docker is None:
        return None
    engine = Engine("the engine at hand", docker)
    try:
        server = engine.run("info", "--format", "{{.ServerVersion}}", within_seconds=20, check=False)
        compose = engine.run("compose", "version", "--short", within_seconds=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = tuple(int(part) for part in re.findall(r"\d+", compose.stdout)[:2])
    if server.returncode or compose.returncode or not server.stdout.strip() or version < OLDEST_COMPOSE:
        return None
    return Engine(f"Docker {server.stdout.strip()}, compose {compose.stdout.strip()}", docker)
