"""The stack as this process sees it: its doors, its books, and the conditions that a round waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import asyncpg
import httpx
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from proof.kill_points.gates import Gates
from proof.kill_points.stack import KillableStack
from proof.simulators.admin_client import Admin, AdminRefused, ServiceAdmin
from proof.simulators.admin_wire import Fault, RunSeen
from store import StoreFailure, TaskStore

Handle = WorkflowHandle[Any, Any]
T = TypeVar("T")

TENANT: Final = "tenant-demo"
USER: Final = "user-demo"
OUTSIDE_ERRORS: Final = (
    httpx.HTTPError,
    OSError,
    TimeoutError,
    RPCError,
    AdminRefused,
    StoreFailure,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
)
LOOK_SECONDS: Final = 0.1
GLANCE_SECONDS: Final = 0.3
NEWEST_ROWS: Final = 150
CREDITS_ROUTES: Final = frozenset({"estimate", "pre_deduct", "commit", "cancel_hold", "charge", "balance", "ledger"})
MANY_GPUS: Final = 500
RICH: Final = 100_000_000


class Site:
    """One running stack and whoever asks it."""

    def __init__(self, stack: KillableStack, described: StackDescription, client: Client, http: httpx.AsyncClient):
        self.stack = stack
        self.described = described
        self.client = client
        self.gateway = http
        self.gates = Gates(stack.folder.path)
        self.admin = Admin(described.comfyui_url, described.credits_url, described.admin_token)
        self.store = TaskStore(described.database_dsn)
        self._hits: _Glance[set[str]] = _Glance(self._read_hits)
        self._rows: _Glance[dict[str, TaskRow]] = _Glance(self._read_rows)

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.described.tokens[TENANT]}"}

    def handle(self, task_id: str) -> Handle:
        return self.client.get_workflow_handle(workflow_id_of(task_id))

    def service_of(self, route: str) -> ServiceAdmin:
        return self.admin.credits if route in CREDITS_ROUTES else self.admin.comfyui

    async def furnish(self) -> None:
        """No task waits for a GPU, and nobody runs out of points."""
        for gpu_type in ("rtx4090", "a100"):
            await self.admin.comfyui.set_gpus(gpu_type, MANY_GPUS)
        await self.admin.credits.set_balance(RICH, TENANT, USER)

    def dataset(self) -> Path:
        folder = self.stack.folder.path / "datasets" / TENANT / "faces"
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(3):
            path = folder / f"{n}.txt"
            if not path.exists():  # a training fails, rightly, whose dataset is written to meanwhile
                path.write_text(f"picture {n}")
        return folder

    async def end_hold(self, pre_deduct_id: str) -> None:
        """Let an open hold end without its task: by expiry; where holds do not expire, cancelled by hand."""
        credits = self.admin.credits
        is_ended_by_service = self.stack.profile.ends_holds
        await (credits.expire_hold if is_ended_by_service else credits.cancel_hold)(pre_deduct_id)

    # What is asked of a task

    async def progress(self, task_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.handle(task_id).query("progress")
        return answer

    async def open_jobs(self, task_id: str) -> list[RunSeen]:
        return [run for run in await self.admin.comfyui.jobs(task_id) if not run.is_over]

    async def row(self, task_id: str) -> TaskRow | None:
        """The row of one of the newest tasks, as of a moment ago: all who wait for theirs share one look."""
        return (await self._rows.look()).get(task_id)

    async def hits(self) -> set[str]:
        """The faults of both services that have hit, as `key_of` names them, as of a moment ago."""
        return await self._hits.look()

    async def _read_rows(self) -> dict[str, TaskRow]:
        page = await self.store.tasks(tenant_id=TENANT, limit=NEWEST_ROWS)
        return {row.task_id: row for row in page.tasks}

    async def _read_hits(self) -> set[str]:
        return {
            key_of(service, fault)
            for service in (self.admin.comfyui, self.admin.credits)
            for fault in await service.faults()
            if fault.hits
        }


class _Glance(Generic[T]):
    """What a read tells, shared for a moment by all who ask."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._turn = asyncio.Lock()
        self._seen: T | None = None
        self._seen_at = 0.0

    async def look(self) -> T:
        async with self._turn:
            if self._seen is None or time.monotonic() - self._seen_at > GLANCE_SECONDS:
                self._seen = await self._read()
                self._seen_at = time.monotonic()
            return self._seen


def key_of(service: ServiceAdmin, fault: Fault) -> str:
    return f"{service.url} {fault.fault_id}"


async def until(
    condition: Callable[[], Awaitable[T]], what: str, *, seconds: float, look_seconds: float = LOOK_SECONDS
) -> T:
    """The condition's first true value; whoever does not answer meanwhile is asked again. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    failure: Exception | None = None
    while time.monotonic() < deadline:
        try:
            value = await condition()
        except OUTSIDE_ERRORS as error:
            failure = error
        else:
            if value:
                return value
        await asyncio.sleep(look_seconds)
    told = f" ({type(failure).__name__}: {failure})" if failure else ""
    raise TimeoutError(f"{what}: not within {seconds:g} s{told}")


@asynccontextmanager
async def opened_site(stack: KillableStack) -> AsyncIterator[Site]:
    """The stack started, and everything connected to it. Raises StackFailure."""
    async with stack.running() as described:
        client = await Client.connect(
            described.temporal_address, namespace=described.namespace, plugins=[TasksPlugin()]
        )
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=50)
        timeout = httpx.Timeout(10, read=30)
        async with httpx.AsyncClient(
            base_url=described.gateway_url, timeout=timeout, limits=limits, trust_env=False
        ) as http:
            site = Site(stack, described, client, http)
            try:
                await site.furnish()
                yield site
            finally:
                await site.admin.close()
                await site.store.close()
