"""The supervisor as a separate process: how a command starts, finds and ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from comfyui_temporal.contracts.stack import StackDescription
from local_stack.child import kill_leftover
from local_stack.folder import PROJECT, AlreadyLocked, RunFolder, StackFailure
from local_stack.supervisor import EXIT_TAKEN, READY_LINE

START_SECONDS: Final = 120.0
"""How long to wait for another command's stack. The parts have their own deadlines."""
END_SECONDS: Final = 45.0
LOOK_SECONDS: Final = 0.1

Report = Callable[[str], None]


class Background:
    """A stack that this command started. With a lifeline it ends when this process ends, for any reason."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        self._let_go()
        return self._process.wait()

    def end(self) -> None:
        """Ask it to end and wait until it has."""
        # One signal only: a second one would end it by force.
        if self._process.stdin is not None:
            self._let_go()
        else:
            self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _let_go(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


_started: Final[list[Background]] = []
"""Keeps a reference: otherwise Python warns about a process that is left running on purpose."""


def running_stack(folder: RunFolder, *, within_seconds: float = 0.0) -> StackDescription | None:
    """The stack that is up in this folder; waits for one that is just starting. None if none is up."""
    deadline = time.monotonic() + within_seconds
    while folder.is_locked():
        description = folder.description()
        if description is not None:
            return description
        if time.monotonic() >= deadline:
            break
        time.sleep(LOOK_SECONDS)
    return None


def start_stack(
    folder: RunFolder, speed: float, report: Report, comfyui: Sequence[str] = (), *, has_lifeline: bool
) -> Background | None:
    """Start a stack and return once it is ready. None if another command's stack is up or came first.

    Raises StackFailure if it does not get ready. `report` gets its output; the last lines say why.
    """
    if running_stack(folder, within_seconds=START_SECONDS) is not None:
        return None
    command = [sys.executable, "-m", "local_stack", "supervise", "--folder", str(folder.path), "--speed", str(speed)]
    command += [f"--comfyui={server}" for server in comfyui]
    with folder.log("stack").open("a") as errors:
        process = subprocess.Popen(
            [*command, "--lifeline"] if has_lifeline else command,
            stdin=subprocess.PIPE if has_lifeline else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=PROJECT,
            start_new_session=True,
        )
    background = Background(process)
    _started.append(background)
    try:
        with process.stdout or contextlib.nullcontext(()) as lines:
            is_ready = _until_ready(lines, report)
    except BaseException:
        background.end()
        raise
    if is_ready:
        return background
    if background.ended() == EXIT_TAKEN:
        if running_stack(folder, within_seconds=START_SECONDS) is not None:
            return None
        raise StackFailure(f"Another stack uses {folder.path} and does not get ready: see {folder.log('stack')}.")
    raise StackFailure(f"The stack did not start; all of its logs are in {folder.log('stack').parent}.")


def _until_ready(lines: Iterable[str], report: Report) -> bool:
    for line in lines:
        if line.rstrip("\n") == READY_LINE:
            return True
        report(line.rstrip("\n"))
    return False


def end_stack(folder: RunFolder) -> bool:
    """End the stack of this folder, and processes that a killed one left. Returns whether there was anything to end."""
    deadline = time.monotonic() + END_SECONDS
    was_up = False
    while True:
        try:
            with folder.locked():
                return _end_leftovers(folder) or was_up
        except AlreadyLocked as holder:
            if holder.pid is not None:
                _signal(holder.pid, _signal_for(was_up, deadline))
            was_up = True
        time.sleep(LOOK_SECONDS)


def _signal_for(was_signalled: bool, deadline: float) -> signal.Signals | None:
    if time.monotonic() > deadline:
        return signal.SIGKILL
    return None if was_signalled else signal.SIGTERM


def _signal(pid: int, number: signal.Signals | None) -> None:
    """The lock names its holder, so this id is the supervisor's while the lock is held."""
    if number is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _end_leftovers(folder: RunFolder) -> bool:
    record = folder.record()
    ended = [kill_leftover(process) for process in (record.processes.values() if record is not None else ())]
    folder.forget_record()
    folder.forget_description()
    return any(ended)
