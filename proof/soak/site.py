"""The stack as the soak sees it from outside: its doors, its parts as processes, its task table.

Whatever goes through here is repeated while the stack is out of order: that is what a soak is about.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import asyncpg
import httpx
import psutil
from temporalio.client import Client
from temporalio.service import RPCError

from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.plugin import TasksPlugin
from local_stack.child import is_running
from local_stack.folder import ProcessRecord, RunFolder
from local_stack.parts import answers
from proof.simulators.admin_client import Admin, AdminRefused

T = TypeVar("T")
OUTSIDE_ERRORS: Final = (
    httpx.HTTPError,
    httpx.HTTPError,
    OSError,
    TimeoutError,
    RPCError,
    AdminRefused,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # What the driver makes of a server's farewell that comes between two of its own messages.
    asyncpg.InternalClientError,
)
PAUSE_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 120.0
"""No part of the stack stays away for longer, by whatever fault."""
QUERY_SECONDS: Final = 20.0
PAGES: Final = {"worker": "/readyz", "gateway": "/healthz", "comfyui": "/healthz", "credits": "/healthz"}
PARTS: Final = ("worker", "gateway", "comfyui", "credits", "temporal", "postgres")


class Unmended(Exception):
    """The stack did not come back in order; the text says what was waited for."""


async def insist(act: Callable[[], Awaitable[T]], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
    """Repeat until it succeeds. Raises Unmended."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await act()
        except OUTSIDE_ERRORS as error:
            if time.monotonic() > deadline:
                raise Unmended(f"{what}: {type(error).__name__} for {seconds:g} s: {error}") from error
        await asyncio.sleep(PAUSE_SECONDS)


class TaskTable:
    """Reads the task store's tables by one connection that is opened anew when it was lost."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[Any] | None = None
        self._turn = asyncio.Lock()

    async def rows(self, query: str, *values: Any) -> list[Any]:
        """Raises Unmended."""
        return await insist(lambda: self._rows(query, *values), "PostgreSQL")

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()

    async def _rows(self, query: str, *values: Any) -> list[Any]:
        async with self._turn:
            try:
                if self._connection is None:
                    self._connection = await asyncpg.connect(self._dsn, timeout=2, command_timeout=QUERY_SECONDS)
                return list(await self._connection.fetch(query, *values))
            except OUTSIDE_ERRORS:
                if self._connection is not None:
                    self._connection.terminate()
                self._connection = None
                raise


class Site:
    """One running stack."""

    def __init__(self, folder: RunFolder, stack: StackDescription, client: Client, gateway: httpx.AsyncClient) -> None:
        self.folder = folder
        self.stack = stack
        self.client = client
        self.gateway = gateway
        self.admin = Admin(stack.comfyui_url, stack.credits_url, stack.admin_token)
        self.table = TaskTable(stack.database_dsn)
        self.open_tasks: dict[str, int] = {}
        """Task id → its number, while it is open."""
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def bearer(self, tenant_id: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.stack.tokens[tenant_id]}"}

    @asynccontextmanager
    async def alone_with(self, part: str) -> AsyncIterator[None]:
        """One process fault a part at a time."""
        async with self._turns[part]:
            yield

    def process(self, part: str) -> psutil.Process:
        """The part's process as it runs now. Raises ProcessLookupError where it has just died."""
        record = self._record(part)
        if record is None or not is_running(record):
            raise ProcessLookupError(f"{part} does not run")
        return psutil.Process(record.pid)

    async def until_back(self, part: str, *, gone: int | None = None) -> None:
        """Wait until the part is ready, under another process id than `gone`. Raises Unmended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (await self._is_ready(part) and self._runs_anew(part, gone)):
            if time.monotonic() > deadline:
                raise Unmended(f"{part} was not back within {PATIENCE_SECONDS:g} s")
            await asyncio.sleep(0.1)

    def _record(self, part: str) -> ProcessRecord | None:
        record = self.folder.record()
        return None if record is None else record.processes.get(part)

    def _runs_anew(self, part: str, gone: int | None) -> bool:
        record = self._record(part)
        return record is not None and record.pid != gone and is_running(record)

    async def _is_ready(self, part: str) -> bool:
        if part in PAGES:
            return await answers(self.folder.ports()[part], PAGES[part])()
        try:
            if part == "temporal":
                return await self.client.service_client.check_health()
            connection = await asyncpg.connect(self.stack.database_dsn, timeout=1)
            await connection.close()
        except OUTSIDE_ERRORS:
            return False
        return True


@asynccontextmanager
async def opened_site(folder: RunFolder, stack: StackDescription) -> AsyncIterator[Site]:
    """Connect to a stack that is up."""
    client = await Client.connect(stack.temporal_address, namespace=stack.namespace, plugins=[TasksPlugin()])
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=10, limits=limits) as gateway:
        site = Site(folder, stack, client, gateway)
        try:
            yield site
        finally:
            await site.admin.close()
            await site.table.close()
