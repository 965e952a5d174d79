"""Temporal and PostgreSQL as the local stack runs them, on files; workers and other processes beside them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
from temporalio.client import Client

from comfyui_temporal.plugin import TasksPlugin
from local_stack.child import Child, Part
from local_stack.folder import RunFolder
from local_stack.parts import SETTINGS_PREFIX, LocalParts, answers
from local_stack.ports import any_free_port, choose_ports

BIG_CACHE = "15000"
"""Cached workflows: more than are ever open (docs/architecture.md, "Defaults")."""


class Servers:
    """What runs, and how much processor time each part has taken."""

    def __init__(self, folder: RunFolder, parts: LocalParts, client: Client) -> None:
        self._folder = folder
        self._part_of_worker = next(part for part in parts.processes() if part.name == "worker")
        self.temporal_address = parts.temporal.address
        self.database_dsn = parts.database_dsn
        self.client = client
        self.children: dict[str, Child] = {}
        self.stack = AsyncExitStack()

    async def run(self, part: Part) -> None:
        """Start a process and wait until it is ready. Raises StackFailure."""
        child = Child(part, folder=self._folder.path, log=self._folder.log(part.name), said=print)
        self.children[part.name] = child
        self.stack.push_async_callback(child.stop)
        await child.start()
        await child.ready()

    async def run_worker(self, name: str, arguments: list[str], settings: Mapping[str, str]) -> None:
        """A worker, ours or another's, with a health page. `arguments`: python's; `settings`: without prefix."""
        port = any_free_port(set())
        own = {"HEALTH_PORT": str(port), "MAX_CACHED_WORKFLOWS": BIG_CACHE, "LOG_LEVEL": "WARNING", **settings}
        environment = {
            **self._part_of_worker.environment,
            **{SETTINGS_PREFIX + setting: value for setting, value in own.items()},
        }
        page = answers(port, "/readyz")
        part = dataclasses.replace(
            self._part_of_worker,
            name=name,
            command=[sys.executable, *arguments],
            environment=environment,
            is_ready=page,
            needs=(),
        )
        await self.run(part)

    def processor_seconds(self) -> dict[str, float]:
        """Part → user and system time of its process and the processes below it."""
        taken = {}
        for name, child in self.children.items():
            record = child.record
            if record is not None:
                process = psutil.Process(record.pid)
                family = [process, *process.children(recursive=True)]
                taken[name] = sum(seconds_of(member) for member in family)
        return {**taken, "driver": seconds_of(psutil.Process())}


def seconds_of(process: psutil.Process) -> float:
    """User and system time of this process alone, so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


@asynccontextmanager
async def file_backed_servers(folder: Path) -> AsyncIterator[Servers]:
    """Both servers with empty files in `folder`, ended with the context."""
    run_folder = RunFolder(folder)
    parts = LocalParts(run_folder, choose_ports({}), speed=1.0)
    await parts.prepare()
    starting = [part for part in parts.processes() if part.name in ("temporal", "postgres")]
    async with AsyncExitStack() as stack:
        children = {}
        for part in starting:
            child = Child(part, folder=run_folder.path, log=run_folder.log(part.name), said=print)
            children[part.name] = child
            stack.push_async_callback(child.stop)
            await child.start()
        for child in children.values():
            await child.ready()
        await parts.make_tables()
        await _sync_as_temporal_does(parts.database_dsn)
        client = await Client.connect(parts.temporal.address, plugins=[TasksPlugin()])
        servers = Servers(run_folder, parts, client)
        servers.children = children
        await stack.enter_async_context(servers.stack)
        yield servers


async def _sync_as_temporal_does(dsn: str) -> None:
    """All are measured with the same promise: a killed server loses nothing, a power cut may cost the last moment."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("ALTER SYSTEM SET synchronous_commit = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()
