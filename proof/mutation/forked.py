"""A call in a process of its own, with limits: a mutant harms only that process."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None, use_errno=True)
MEMORY_BYTES: Final = 4 * 1024**3


class RanOn(Exception):
    """The call did not end within its limits."""


class Broke(Exception):
    """The call raised, or its process died; the last line says why."""


def adopt_orphans() -> None:
    """Adopt grandchildren whose parent ends, e.g. a PostgreSQL that a test has started (Linux)."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def forked(call: Callable[[], Any], *, cpu_seconds: int, wall_seconds: float, log: Path) -> Any:
    """The call's answer, which JSON can carry. Raises RanOn or Broke; leaves no process behind."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_child(call, cpu_seconds, writing, log)
    os.close(writing)
    try:
        answer = _read_all(reading, time.monotonic() + wall_seconds)
    finally:
        os.close(reading)
        _end_all_children()
    if answer is None:
        raise RanOn(f"not ended after {wall_seconds:g} s")
    if not answer:
        raise RanOn(f"not ended after {cpu_seconds} s of processor time, or its process died")
    value, problem = json.loads(answer)
    if problem is not None:
        raise Broke(problem)
    return value


def _be_the_child(call: Callable[[], Any], cpu_seconds: int, writing: int, log: Path) -> None:
    """Never returns."""
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        value, problem = None, None
        try:
            value = call()
        except BaseException as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps([value, problem]).encode())
    finally:
        os._exit(0)


def _read_all(reading: int, until: float) -> bytes | None:
    """What the child writes before it closes the pipe; None where that is not in time."""
    got = b""
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        some = os.read(reading, 65_536)
        if not some:
            return got
        got += some


def _end_all_children() -> None:
    """Kill and reap every child, and those that we adopt meanwhile, until none is left."""
    while True:
        children = [child for task in Path("/proc/self/task").iterdir() for child in _children_of(task)]
        if not children:
            return
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def _children_of(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:  # that thread has ended
        return []
