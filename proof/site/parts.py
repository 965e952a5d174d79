"""The stack's processes: those that this process starts itself, and those that the local stack watches over."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import asyncpg
import psutil

from comfyui_temporal.contracts.stack import StackDescription
from local_stack.child import Child, Part, is_running
from local_stack.description import describe
from local_stack.folder import ProcessRecord, RunFolder
from local_stack.parts import SETTINGS_PREFIX, STAGES, LocalParts, answers
from local_stack.ports import free_ports
from proof.site.site import Site
from proof.site.waiting import LIMIT_SECONDS, OUTSIDE_ERRORS, NotRepaired

PAGES: Final = {"worker": "/readyz", "gateway": "/healthz", "comfyui": "/healthz", "credits": "/healthz"}
SERVERS: Final = ("temporal", "postgres")
OURS: Final = ("worker", "gateway", "comfyui", "credits")
PARTS: Final = (*OURS, *SERVERS)


class OwnStack:
    """A whole stack in a folder of its own, on free ports, whose parts are children of this process.

    No other process starts them again. `settings` go to every part, without prefix. `change` may alter a part.
    """

    def __init__(
        self,
        folder: Path,
        *,
        speed: float = 1.0,
        settings: Mapping[str, str] = MappingProxyType({}),
        change: Callable[[Part], Part] = lambda part: part,
        said: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.folder = RunFolder(folder)
        self._said = said
        self._local = LocalParts(self.folder, free_ports(), speed)
        environment = {SETTINGS_PREFIX + name: value for name, value in settings.items()}
        self._children: dict[str, Child] = {}
        for part in self._local.processes():
            self.add(change(replace(part, environment={**part.environment, **environment})))

    @asynccontextmanager
    async def running(self, *names: str, servers: Sequence[str] = SERVERS) -> AsyncIterator[StackDescription]:
        """The servers and then these parts, until the context ends. With PostgreSQL come its tables.

        Raises StackFailure if a part does not get ready.
        """
        try:
            await self._local.prepare()
            await self.start(*servers)
            if "postgres" in servers:
                await self._local.make_tables()
            await self.start(*names)
            yield describe(self._local, self.folder.secrets(), self.records())
        finally:
            await self._stop_all()

    @property
    def owner_dsn(self) -> str:
        """Of the database user that owns the tables."""
        return self._local.owner_dsn

    def part(self, name: str) -> Part:
        return self._children[name].part

    def add(self, part: Part) -> None:
        self._children[part.name] = Child(
            part, folder=self.folder.path, log=self.folder.log(part.name), report=self._said
        )

    async def start(self, *names: str) -> None:
        """Start in parallel; returns when all are ready. Raises StackFailure."""
        await asyncio.gather(*(self._start(self._children[name]) for name in names))

    async def _start(self, child: Child) -> None:
        await child.start()
        await child.ready()

    async def _stop_all(self) -> None:
        """Stage by stage, as the local stack does; parts without a stage first."""
        staged = [name for stage in STAGES for name in stage]
        for stage in ([name for name in self._children if name not in staged], *STAGES):
            await asyncio.gather(*(self._children[name].stop() for name in stage if name in self._children))

    def records(self) -> dict[str, ProcessRecord]:
        """Those that run."""
        records = {name: child.record for name, child in self._children.items()}
        return {name: record for name, record in records.items() if record is not None}

    def process(self, name: str) -> psutil.Process:
        """A part that runs."""
        record = self._children[name].record
        assert record is not None, f"{name} does not run: see {self.folder.log(name)}"
        return psutil.Process(record.pid)

    def processor_seconds(self) -> dict[str, float]:
        """Part → user and system time of its process and the processes below it; `driver` is this process."""
        taken = {}
        for name in self.records():
            process = self.process(name)
            family = [process, *process.children(recursive=True)]
            taken[name] = sum(_seconds_of(member) for member in family)
        return {**taken, "driver": _seconds_of(psutil.Process())}

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a part and, with SIGKILL, all processes below it; returns when they are gone."""
        process = self.process(name)
        below = process.children(recursive=True)
        process.send_signal(number)
        if number is signal.SIGKILL:
            for each in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        # asyncio waits for the process itself.
        await asyncio.to_thread(psutil.wait_procs, below, 30)
        while self._children[name].record is not None:  # noqa: ASYNC110 - its end has to be noticed here too
            await asyncio.sleep(0.01)


def _seconds_of(process: psutil.Process) -> float:
    """User and system time of this process alone, so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


class SupervisedParts:
    """The parts of a local stack that another process supervises: it restarts a part that ends."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def alone_with(self, part: str) -> AsyncIterator[psutil.Process]:
        """The part's process; one fault a part at a time. Raises ProcessLookupError where it has just died."""
        async with self._turns[part]:
            record = self._record(part)
            if record is None or not is_running(record):
                raise ProcessLookupError(f"{part} does not run")
            yield psutil.Process(record.pid)

    async def restart(self, part: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a part, and wait until its successor is ready. Raises NotRepaired, ProcessLookupError."""
        async with self.alone_with(part) as process:
            process.send_signal(number)
            await self.until_ready(part, gone=process.pid)

    async def until_ready(self, part: str, *, gone: int | None = None) -> None:
        """Wait until the part is ready, under another process id than `gone`. Raises NotRepaired."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (await self._is_ready(part) and self._is_another(part, gone)):
            if time.monotonic() > deadline:
                raise NotRepaired(f"{part} was not back within {LIMIT_SECONDS:g} s")
            await asyncio.sleep(0.1)

    def _record(self, part: str) -> ProcessRecord | None:
        record = self._site.folder.record()
        return None if record is None else record.processes.get(part)

    def _is_another(self, part: str, gone: int | None) -> bool:
        record = self._record(part)
        return record is not None and record.pid != gone and is_running(record)

    async def _is_ready(self, part: str) -> bool:
        if part in PAGES:
            return await answers(self._site.folder.ports()[part], PAGES[part])()
        try:
            if part == "temporal":
                return await self._site.client.service_client.check_health()
            connection = await asyncpg.connect(self._site.stack.database_dsn, timeout=1)
            await connection.close()
        except OUTSIDE_ERRORS:
            return False
        return True
