"""Temporal and PostgreSQL as the local stack runs them, on files; workers and other processes of a benchmark."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
from temporalio.client import Client

from comfyui_temporal.plugin import TasksPlugin
from local_stack.folder import RunFolder
from local_stack.parts import SETTINGS_PREFIX, LocalParts, answers
from local_stack.ports import any_free_port, choose_ports
from proof.site.parts import SERVERS, OwnParts

BIG_CACHE = "15000"
"""Cached workflows: more than are ever open (docs/architecture.md, "Defaults")."""


class Servers:
    """What runs, and how much processor time each part has taken."""

    def __init__(self, parts: OwnParts, local: LocalParts, client: Client) -> None:
        self._parts = parts
        self._worker = next(part for part in local.processes() if part.name == "worker")
        self.temporal_address = local.temporal.address
        self.database_dsn = local.database_dsn
        self.client = client

    async def run_worker(self, name: str, arguments: list[str], settings: Mapping[str, str]) -> None:
        """A worker, ours or another's, with a health page. `arguments`: python's; `settings`: without prefix.

        Raises StackFailure.
        """
        port = any_free_port(set())
        own = {"HEALTH_PORT": str(port), "MAX_CACHED_WORKFLOWS": BIG_CACHE, "LOG_LEVEL": "WARNING", **settings}
        environment = {SETTINGS_PREFIX + setting: value for setting, value in own.items()}
        self._parts.add(
            dataclasses.replace(
                self._worker,
                name=name,
                command=[sys.executable, *arguments],
                environment={**self._worker.environment, **environment},
                is_ready=answers(port, "/readyz"),
                needs=(),
            )
        )
        await self._parts.start(name)

    def processor_seconds(self) -> dict[str, float]:
        """Part → user and system time of its process and the processes below it."""
        taken = {}
        for name, record in self._parts.records().items():
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
    """Both servers with empty files in `folder`, ended with the context. Raises StackFailure."""
    run_folder = RunFolder(folder)
    local = LocalParts(run_folder, choose_ports({}), speed=1.0)
    parts = OwnParts(run_folder, [part for part in local.processes() if part.name in SERVERS], said=print)
    try:
        await parts.start_servers(local)
        await _sync_as_temporal_does(local.database_dsn)
        client = await Client.connect(local.temporal.address, plugins=[TasksPlugin()])
        yield Servers(parts, local, client)
    finally:
        await parts.stop_all()


async def _sync_as_temporal_does(dsn: str) -> None:
    """All have the same durability: a killed server loses nothing, a power cut may lose the last moment."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("ALTER SYSTEM SET synchronous_commit = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()
