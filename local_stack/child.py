"""One process of the stack: it ends with its supervisor, and is restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from local_stack.folder import ProcessRecord, StackFailure
from local_stack.privileges import before_exec

FIRST_PAUSE_SECONDS: Final = 0.2
LONGEST_PAUSE_SECONDS: Final = 15.0
STEADY_SECONDS: Final = 30.0
"""A part that ran this long has recovered: its next death counts as its first."""
LOOK_SECONDS: Final = 0.05
LOG_TAIL_LINES: Final = 15
LOG_TAIL_BYTES: Final = 16 * 1024
MAX_LOG_BYTES: Final = 10 * 1024 * 1024
SAME_INSTANT_SECONDS: Final = 1.0
CLEAR_UP_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Part:
    """What to run, what must be ready before it, and when it counts as ready."""

    name: str
    command: Sequence[str]
    is_ready: Callable[[], Awaitable[bool]]
    """One check, repeated until it returns true."""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    finish: Callable[[], Awaitable[None]] | None = None
    """Work between ready and usable, such as creating tables. Done when the stack starts, not at a restart."""
    port: int | None = None
    """Where it listens itself: another process that answers there does not make it ready."""
    ready_within_seconds: float = 60.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_within_seconds: float = 10.0
    orphan_signal: signal.Signals = signal.SIGKILL
    """Ends it immediately; also sent when its supervisor was killed."""
    unprivileged: bool = False
    """Never runs as root."""


class Child:
    """A part's process and its log. `report` gets messages for the user."""

    def __init__(self, part: Part, *, folder: Path, log: Path, report: Callable[[str], None]) -> None:
        self.part = part
        self._restarts = 0
        self._folder = folder
        self._log = log
        self._report = report
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0.0
        self._is_ending = False

    @property
    def record(self) -> ProcessRecord | None:
        """Its current process; None if none runs."""
        if self._process is None or self._process.returncode is not None:
            return None
        return ProcessRecord(pid=self._process.pid, started=self._started, restarts=self._restarts)

    async def start(self) -> None:
        """Run the part's command. Raises StackFailure if that fails."""
        part = self.part
        with self._opened_log() as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *part.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    env=dict(part.environment),
                    # Ctrl-C in the terminal must reach the supervisor only, which ends the parts in order.
                    start_new_session=True,
                    preexec_fn=before_exec(orphan_signal=part.orphan_signal, unprivileged=part.unprivileged),
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise StackFailure(f"{part.name} could not be started: {error}. Run `make setup`.") from None
        with contextlib.suppress(psutil.NoSuchProcess):
            self._started = psutil.Process(self._process.pid).create_time()

    async def ready(self) -> None:
        """Wait until the part is ready. Raises StackFailure with the end of its log if it does not get ready."""
        within = self.part.ready_within_seconds
        deadline = time.monotonic() + within
        while not (await self.part.is_ready() and self._listens()):
            code = None if self._process is None else self._process.returncode
            if code is not None:
                raise StackFailure(f"{self.part.name} {_ended(code)} while it started. {self.tail()}")
            if time.monotonic() > deadline:
                raise StackFailure(f"{self.part.name} was not ready within {within:.0f} s. {self.tail()}")
            await asyncio.sleep(LOOK_SECONDS)
        if self.part.finish is not None:
            await self.part.finish()

    def _listens(self) -> bool:
        if self.part.port is None:
            return True
        if self._process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self._process.pid).net_connections("tcp")
            return any(each.status == psutil.CONN_LISTEN and each.laddr.port == self.part.port for each in found)
        return False

    async def watch(self, changed: Callable[[], None]) -> None:
        """Restart the part whenever it dies, after longer and longer pauses, until the stack ends."""
        pause = FIRST_PAUSE_SECONDS
        while self._process is not None:
            since = time.monotonic()
            code = await self._process.wait()
            if self._is_ending:
                return
            if time.monotonic() - since > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            reason = self.tail() if code > 0 else f"Its log is {self._log}."
            self._report(f"{self.part.name} {_ended(code)} and is restarted in {pause:.1f} s. {reason}")
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            try:
                await self.start()
            except StackFailure as failure:
                self._report(str(failure))
                continue
            self._restarts += 1
            changed()

    async def stop(self, *, at_once: bool = False) -> None:
        """End the process, by force if it takes too long or with `at_once`."""
        self._is_ending = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(self.part.orphan_signal if at_once else self.part.stop_signal)
        try:
            await asyncio.wait_for(process.wait(), self.part.stop_within_seconds)
        except TimeoutError:
            self._report(f"{self.part.name} did not end within {self.part.stop_within_seconds:.0f} s and was killed.")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def tail(self) -> str:
        """The last lines of the part's log, for the end of a message."""
        with contextlib.suppress(OSError), self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - LOG_TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            if lines:
                shown = "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:])
                return f"The end of {self._log}:\n{shown}"
        return f"It wrote nothing to {self._log}."

    @contextlib.contextmanager
    def _opened_log(self) -> Iterator[int]:
        if self._log.exists() and self._log.stat().st_size > MAX_LOG_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def is_running(record: ProcessRecord) -> bool:
    return _process_of(record) is not None


def kill_leftover(record: ProcessRecord) -> bool:
    """End a process that a killed supervisor left. Returns whether there was one. Never ends another of that id."""
    process = _process_of(record)
    if process is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            process.wait(CLEAR_UP_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(CLEAR_UP_SECONDS)
    return True


def _process_of(record: ProcessRecord) -> psutil.Process | None:
    try:
        process = psutil.Process(record.pid)
        is_it = abs(process.create_time() - record.started) < SAME_INSTANT_SECONDS
        return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
