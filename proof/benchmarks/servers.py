"""Temporal and PostgreSQL as the local stack runs them, on files; workers and other processes of a benchmark."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
from temporalio.client import Client

from comfyui_temporal.plugin import TasksPlugin
from local_stack.parts import SETTINGS_PREFIX, answers
from local_stack.ports import any_free_port
from proof.site.parts import OwnStack

BIG_CACHE = "15000"
"""Cached workflows: more than are ever open (docs/architecture.md, "Defaults")."""


class Servers:
    """What runs, and a client of it."""

    def __init__(self, stack: OwnStack, database_dsn: str, client: Client) -> None:
        self._stack = stack
        self.database_dsn = database_dsn
        self.client = client
        self.processor_seconds = stack.processor_seconds

    async def run_worker(self, name: str, arguments: list[str], settings: Mapping[str, str]) -> None:
        """A worker, ours or another's, with a health page. `arguments`: python's; `settings`: without prefix.

        Raises StackFailure.
        """
        port = any_free_port()
        own = {"HEALTH_PORT": str(port), "MAX_CACHED_WORKFLOWS": BIG_CACHE, "LOG_LEVEL": "WARNING"}
        own |= {"DATABASE_DSN": self.database_dsn, **settings}  # other engines make tables of their own
        environment = {SETTINGS_PREFIX + setting: value for setting, value in own.items()}
        worker = self._stack.part("worker")
        self._stack.add(
            dataclasses.replace(
                worker,
                name=name,
                command=[sys.executable, *arguments],
                environment={**worker.environment, **environment},
                is_ready=answers(port, "/readyz"),
                port=port,
                needs=(),
            )
        )
        await self._stack.start(name)


@asynccontextmanager
async def file_backed_servers(folder: Path) -> AsyncIterator[Servers]:
    """Both servers with empty files in `folder`, ended with the context. Raises StackFailure."""
    stack = OwnStack(folder, said=print)
    async with stack.running() as described:
        await _sync_as_temporal_does(stack.owner_dsn)
        client = await Client.connect(described.temporal_address, plugins=[TasksPlugin()])
        yield Servers(stack, stack.owner_dsn, client)


async def _sync_as_temporal_does(dsn: str) -> None:
    """All have the same durability: a killed server loses nothing, a power cut may lose the last moment."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("ALTER SYSTEM SET synchronous_commit = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()
