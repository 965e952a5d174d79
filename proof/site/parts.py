"""The stack's processes: those that this process starts itself, and those that the local stack watches over."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

import asyncpg
import psutil

from local_stack.child import Child, Part, is_running
from local_stack.folder import ProcessRecord, RunFolder
from local_stack.parts import STAGES, LocalParts, answers
from proof.site.site import Site
from proof.site.waiting import LIMIT_SECONDS, OUTSIDE_ERRORS, NotRepaired

PAGES: Final = {"worker": "/readyz", "gateway": "/healthz", "comfyui": "/healthz", "credits": "/healthz"}
SERVERS: Final = ("temporal", "postgres")
PARTS: Final = ("worker", "gateway", "comfyui", "credits", *SERVERS)


class OwnParts:
    """Children of this process: nothing else starts them again. `change` may alter a part before it is made."""

    def __init__(
        self,
        folder: RunFolder,
        parts: Iterable[Part],
        *,
        change: Callable[[Part], Part] = lambda part: part,
        said: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._folder = folder
        self._said = said
        self.children: dict[str, Child] = {}
        for part in parts:
            self.add(change(part))

    def add(self, part: Part) -> None:
        self.children[part.name] = Child(
            part, folder=self._folder.path, log=self._folder.log(part.name), report=self._said
        )

    async def start(self, *names: str) -> None:
        """Start in parallel; returns when all are ready. Raises StackFailure."""
        await asyncio.gather(*(self._start(self.children[name]) for name in names))

    async def _start(self, child: Child) -> None:
        await child.start()
        await child.ready()

    async def start_servers(self, parts: LocalParts) -> None:
        """Temporal and PostgreSQL, and its tables. Raises StackFailure."""
        await parts.prepare()
        await self.start(*SERVERS)
        await parts.make_tables()

    async def stop_all(self) -> None:
        """Stage by stage, as the local stack does; parts without a stage first."""
        staged = [name for stage in STAGES for name in stage]
        for stage in ([name for name in self.children if name not in staged], *STAGES):
            await asyncio.gather(*(self.children[name].stop() for name in stage if name in self.children))

    def records(self) -> dict[str, ProcessRecord]:
        """Those that run."""
        records = {name: child.record for name, child in self.children.items()}
        return {name: record for name, record in records.items() if record is not None}

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a part and, with SIGKILL, all processes below it; returns when they are gone."""
        record = self.children[name].record
        assert record is not None, f"{name} does not run: see {self._folder.log(name)}"
        process = psutil.Process(record.pid)
        below = process.children(recursive=True)
        process.send_signal(number)
        if number is signal.SIGKILL:
            for each in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        # asyncio waits for the process itself.
        await asyncio.to_thread(psutil.wait_procs, below, 30)
        while self.children[name].record is not None:  # noqa: ASYNC110 - its end has to be noticed here too
            await asyncio.sleep(0.01)


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
