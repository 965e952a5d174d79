"""Starts the parts in parallel, watches them, and ends them in order; one process, the only one in its folder.

It ends for one of three reasons: a signal (Ctrl-C, SIGTERM, the terminal was closed); the command at the other end of
the lifeline is gone (a demo's stack ends with the demo, however that ends); a part does not get ready at the start.
A second signal ends everything by force.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from local_stack.child import Child, kill_leftover
from local_stack.description import REWRITE_SECONDS, describe
from local_stack.folder import AlreadyLocked, RunFolder, StackFailure, StackRecord
from local_stack.own_services import COMFYUI_URL, CREDITS_URL, own_url
from local_stack.parts import DEFAULT_PROFILE, PROFILE_SETTING, STAGES, TABLES, LocalParts
from local_stack.ports import PREFERRED, choose_ports

READY_LINE: Final = "ready"
"""The supervisor's last line when everything is up."""
EXIT_FAILED: Final = 1
EXIT_TAKEN: Final = 3
"""Another stack holds the folder."""


class Supervisor:
    """The life of one stack. `report` gets each line for the user."""

    def __init__(
        self, folder: RunFolder, speed: float, report: Callable[[str], None], comfyui: Sequence[str] = ()
    ) -> None:
        self._folder = folder
        self._speed = speed
        self._comfyui = comfyui
        self._report = report
        self._ports = folder.ports()
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._children: dict[str, Child] = {}

    async def run(self, *, lifeline: int | None = None) -> None:
        """Start, serve until a signal arrives, end. `lifeline`: a pipe; its end is a reason to stop too.

        Raises StackFailure if a part does not get ready; all parts that were started are ended.
        """
        self._handle_signals()
        if lifeline is not None:
            await self._watch_lifeline(lifeline)
        self._clear_up()
        try:
            await self._unless_stopped(self._live())
        finally:
            self._folder.forget_description()
            await self._end()
            self._folder.forget_record()

    async def _live(self) -> None:
        began = time.monotonic()
        parts = self._parts()
        await parts.prepare()
        await self._start(parts, began)
        self._write(parts)
        self._report(READY_LINE)
        async with asyncio.TaskGroup() as watching:
            for child in self._children.values():
                watching.create_task(child.watch(lambda: self._write(parts)))
            watching.create_task(self._rewrite(parts))

    def _parts(self) -> LocalParts:
        ports = choose_ports(self._folder.ports())
        self._folder.remember_ports(ports)
        for name, usual in PREFERRED.items():
            if ports[name] not in (usual, self._ports.get(name)):
                self._report(f"port {usual} is taken: {name.replace('_', ' ')} listens at {ports[name]}")
        return LocalParts(self._folder, ports, self._speed, self._comfyui)

    async def _start(self, parts: LocalParts, began: float) -> None:
        """All parts in parallel, each as soon as its needs are ready. Raises the first StackFailure."""
        for part in parts.processes():
            log = self._folder.log(part.name)
            self._children[part.name] = Child(part, folder=self._folder.path, log=log, report=self._report)
        ready = {name: asyncio.Event() for name in (*self._children, TABLES)}

        async def start(child: Child) -> None:
            for name in child.part.needs:
                await ready[name].wait()
            await child.start()
            self._record()
            await child.ready()
            self._report(f"{child.part.name:<9} {time.monotonic() - began:4.1f} s")
            ready[child.part.name].set()

        async def make_tables() -> None:
            await ready["postgres" if "postgres" in ready else "temporal"].wait()
            await parts.make_tables()
            ready[TABLES].set()

        try:
            async with asyncio.TaskGroup() as starting:
                for child in self._children.values():
                    starting.create_task(start(child))
                starting.create_task(make_tables())
        except ExceptionGroup as group:
            failures, others = group.split(StackFailure)
            if others is not None or failures is None:
                raise
            raise failures.exceptions[0] from None

    async def _end(self) -> None:
        """End every process, callers before the parts that they call; by force after a second signal."""
        ending = asyncio.create_task(self._end_in_order())
        hurried = asyncio.create_task(self._at_once.wait())
        await asyncio.wait({ending, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ending.done():
            ending.cancel()
            await asyncio.gather(*(child.stop(at_once=True) for child in self._children.values()))

    async def _end_in_order(self) -> None:
        for stage in STAGES:
            ending = [child for name, child in self._children.items() if name.partition("-")[0] in stage]
            await asyncio.gather(*(child.stop() for child in ending))

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` until it fails or a stop is requested."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working

    async def _rewrite(self, parts: LocalParts) -> None:
        while True:
            await asyncio.sleep(REWRITE_SECONDS)
            self._write(parts)

    def _record(self) -> None:
        processes = {name: child.record for name, child in self._children.items()}
        kept = {name: process for name, process in processes.items() if process is not None}
        profile = os.environ.get(PROFILE_SETTING) or DEFAULT_PROFILE
        own = {setting: url for setting in (CREDITS_URL, COMFYUI_URL) if (url := own_url(setting)) is not None}
        self._folder.write_record(
            StackRecord(
                speed=self._speed,
                credits_profile=profile,
                comfyui=list(self._comfyui),
                own_services=own,
                processes=kept,
            )
        )

    def _write(self, parts: LocalParts) -> None:
        self._record()
        record = self._folder.record()
        processes = record.processes if record is not None else {}
        self._folder.describe(describe(parts, self._folder.secrets(), processes))

    def _clear_up(self) -> None:
        """End the processes of an earlier supervisor that was killed. The folder's lock shows that it is gone."""
        self._folder.forget_description()
        record = self._folder.record()
        for name, process in (record.processes if record is not None else {}).items():
            if kill_leftover(process):
                self._report(f"ended a {name} that an earlier stack had left")

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()

    async def _watch_lifeline(self, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        pipe = os.fdopen(descriptor, "rb")
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        self._lifeline = asyncio.create_task(self._until_gone(reader))

    async def _until_gone(self, reader: asyncio.StreamReader) -> None:
        await reader.read()
        self._stop.set()


def supervise(folder: RunFolder, speed: float, comfyui: Sequence[str] = (), *, has_lifeline: bool) -> int:
    """Run a stack in this process and return its exit code. Lines for the user go to standard output and to a log."""

    def say(line: str) -> None:
        with folder.log("stack").open("a") as log:
            log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n")
        # The reader may be gone; the stack continues.
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), f"{line}\n".encode())

    try:
        with folder.locked():
            supervisor = Supervisor(folder, speed, say, comfyui)
            asyncio.run(supervisor.run(lifeline=sys.stdin.fileno() if has_lifeline else None))
    except AlreadyLocked:
        return EXIT_TAKEN
    except StackFailure as error:
        say(str(error))
        return EXIT_FAILED
    return 0
