"""The stack as a round sees it: its clients, the gates, and reads that all waiting tasks share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from comfyui_temporal.contracts.task_store import TaskRow
from proof.kill_points.gates import Gates
from proof.kill_points.stack import KillableStack
from proof.simulators.admin_client import ServiceAdmin
from proof.simulators.admin_wire import Fault, RunSeen
from proof.site.parts import OURS
from proof.site.site import Site

T = TypeVar("T")

TENANT: Final = "tenant-demo"
USER: Final = "user-demo"
SHARED_SECONDS: Final = 0.3
NEWEST_ROWS: Final = 150
CREDITS_ROUTES: Final = frozenset({"estimate", "pre_deduct", "commit", "cancel_hold", "charge", "balance", "ledger"})
MANY_GPUS: Final = 500
RICH: Final = 100_000_000


class RoundSite(Site):
    """A site whose parts are this process's children, and whose worker has gates."""

    parts: KillableStack

    @property
    def gates(self) -> Gates:
        return self.parts.gates

    def service_of(self, route: str) -> ServiceAdmin:
        return self.admin.credits if route in CREDITS_ROUTES else self.admin.comfyui

    async def set_up(self) -> None:
        """No task waits for a GPU, and no account runs out of points."""
        for gpu_type in ("rtx4090", "a100"):
            await self.admin.comfyui.set_gpus(gpu_type, MANY_GPUS)
        await self.admin.credits.set_balance(RICH, TENANT, USER)

    def dataset(self) -> Path:
        folder = self.folder.path / "datasets" / TENANT / "faces"
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(3):
            path = folder / f"{n}.txt"
            if not path.exists():  # a training whose dataset changes meanwhile fails, as it should
                path.write_text(f"picture {n}")
        return folder

    async def end_hold(self, pre_deduct_id: str) -> None:
        """End an open hold without its task: by expiry; where holds do not expire, cancelled by hand."""
        credits = self.admin.credits
        await (credits.expire_hold if self.profile.ends_holds else credits.cancel_hold)(pre_deduct_id)

    async def progress(self, task_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.handle(task_id).query("progress")
        return answer

    async def open_jobs(self, task_id: str) -> list[RunSeen]:
        return [run for run in await self.admin.comfyui.jobs(task_id) if not run.is_over]

    async def row(self, task_id: str) -> TaskRow | None:
        """The row of one of the newest tasks, as of a moment ago."""
        return (await self._rows.read()).get(task_id)

    async def hits(self) -> set[str]:
        """The faults of both services that have hit, as `key_of` names them, as of a moment ago."""
        return await self._hits.read()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._hits: _SharedRead[set[str]] = _SharedRead(self._read_hits)
        self._rows: _SharedRead[dict[str, TaskRow]] = _SharedRead(self._read_rows)

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


class _SharedRead(Generic[T]):
    """One read, shared for a moment by all callers."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._turn = asyncio.Lock()
        self._seen: T | None = None
        self._seen_at = 0.0

    async def read(self) -> T:
        async with self._turn:
            if self._seen is None or time.monotonic() - self._seen_at > SHARED_SECONDS:
                self._seen = await self._read()
                self._seen_at = time.monotonic()
            return self._seen


def key_of(service: ServiceAdmin, fault: Fault) -> str:
    return f"{service.url} {fault.fault_id}"


@asynccontextmanager
async def opened_site(stack: KillableStack) -> AsyncIterator[RoundSite]:
    """The stack started, and everything connected to it. Raises StackFailure."""
    async with stack.running(*OURS) as described, RoundSite.connected(stack.folder, described, stack.profile) as site:
        site.parts = stack
        await site.set_up()
        yield site
