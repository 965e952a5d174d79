"""The clients of one running stack."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import asyncpg
import httpx
from temporalio.client import Client, WorkflowHandle

from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from local_stack.folder import RunFolder
from proof.checks.evidence import Sources
from proof.simulators.admin_client import Admin
from proof.simulators.credits_profile import CONTRACT, CreditsProfile
from proof.site.waiting import OUTSIDE_ERRORS, insist
from runtime.http_transport import PatientClient
from store import TaskStore

Handle = WorkflowHandle[Any, Any]
QUERY_SECONDS: Final = 20.0


class Site:
    """One running stack, and everything that this process is connected to."""

    def __init__(
        self,
        folder: RunFolder,
        stack: StackDescription,
        client: Client,
        gateway: httpx.AsyncClient,
        profile: CreditsProfile = CONTRACT,
    ) -> None:
        self.folder = folder
        self.stack = stack
        self.client = client
        self.gateway = gateway
        self.profile = profile
        self.admin = Admin(stack.comfyui_url, stack.credits_url, stack.admin_token)
        self.store = TaskStore(stack.database_dsn)
        self.table = TaskTable(stack.database_dsn)

    @classmethod
    @asynccontextmanager
    async def connected(
        cls, folder: RunFolder, stack: StackDescription, profile: CreditsProfile = CONTRACT
    ) -> AsyncIterator[Self]:
        """Connect to a stack that is up."""
        client = await Client.connect(stack.temporal_address, namespace=stack.namespace, plugins=[TasksPlugin()])
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=50)
        timeout = httpx.Timeout(10, read=30)
        async with PatientClient(
            base_url=stack.gateway_url, timeout=timeout, limits=limits, trust_env=False
        ) as gateway:
            site = cls(folder, stack, client, gateway, profile)
            try:
                yield site
            finally:
                await site.admin.close()
                await site.store.close()
                await site.table.close()

    @property
    def sources(self) -> Sources:
        """The evidence on this stack's tasks."""
        return Sources(self.profile, self.admin, self.store, self.client, self.folder.path / "objects")

    def bearer(self, tenant_id: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.stack.tokens[tenant_id]}"}

    def handle(self, task_id: str) -> Handle:
        return self.client.get_workflow_handle(workflow_id_of(task_id))


class TaskTable:
    """Reads the task store's tables on one connection, which is opened again when it was lost."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[Any] | None = None
        self._turn = asyncio.Lock()

    async def rows(self, query: str, *values: Any) -> list[Any]:
        """Raises NotRepaired."""
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
