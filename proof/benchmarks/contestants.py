"""The same job three ways, as the driver sees them: their worker, how a task starts, how a callback comes in."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from comfyui_temporal.client.submission import WORKFLOW_TASK_TIMEOUT, start_task
from comfyui_temporal.contracts.comfyui import JobCallback
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, TASK_QUEUE, workflow_id_of
from gateway.callback_relay import CallbackRelay
from gateway.metrics import Metrics
from gateway.task_runs import TaskRuns
from gateway.tick_writer import Ticked, TickWriter
from local_stack.folder import PROJECT
from proof.benchmarks import job
from proof.benchmarks.bare_worker import BARE_WORKFLOW
from proof.benchmarks.servers import Servers
from store import TaskStore


class Contestant(Protocol):
    """One implementation of the job."""

    name: str

    async def run_workers(self, count: int, settings: dict[str, str]) -> None: ...

    async def start(self, task_id: str) -> None: ...

    async def call_back(self, task_id: str, body: dict[str, Any]) -> None: ...

    async def aclose(self) -> None: ...


class Ours:
    """`ImageGenerationWorkflow` on `worker.py`; callbacks by the gateway's own code, without its HTTP."""

    name = "ours"

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._store = TaskStore(servers.database_dsn)
        self._relay = CallbackRelay(TaskRuns(servers.client, self._store, Metrics()))
        self._ticks = TickWriter(self._store, self._relay)

    async def run_workers(self, count: int, settings: dict[str, str]) -> None:
        for number in range(count):
            await self.servers.run_worker(f"worker-{self.name}-{number}", self._command(), settings)

    async def start(self, task_id: str) -> None:
        await start_task(self.servers.client, job.image_task(task_id))

    async def call_back(self, task_id: str, body: dict[str, Any]) -> None:
        callback = JobCallback.model_validate(body)
        if await self._ticks.take(task_id, callback) is Ticked.LONG_WAY:
            await self._relay.take(task_id, callback)

    async def aclose(self) -> None:
        """Its client is the servers'."""
        await self._ticks.close()
        await self._relay.close()
        await self._store.close()

    def _command(self) -> list[str]:
        return [str(PROJECT / "worker.py")]


class Bare(Ours):
    """`BareImageWorkflow`; callbacks as signals."""

    name = "bare Temporal"

    async def call_back(self, task_id: str, body: dict[str, Any]) -> None:
        await self.servers.client.get_workflow_handle(workflow_id_of(task_id)).signal(CALLBACK_SIGNAL, body)

    async def start(self, task_id: str) -> None:
        await self.servers.client.start_workflow(
            BARE_WORKFLOW,
            job.image_task(task_id),
            id=workflow_id_of(task_id),
            task_queue=TASK_QUEUE,
            task_timeout=WORKFLOW_TASK_TIMEOUT,
        )

    def _command(self) -> list[str]:
        return ["-m", "proof.benchmarks.bare_worker"]


class OnDbos:
    """`dbos_worker.image_job`; callbacks as messages. Runs in the benchmarks' own environment (`make bench`)."""

    name = "DBOS"

    def __init__(self, servers: Servers) -> None:
        from proof.benchmarks import dbos_worker  # only that environment has DBOS

        self._servers = servers
        self._dbos = dbos_worker
        self._client: Any = None

    async def run_workers(self, count: int, settings: dict[str, str]) -> None:
        for number in range(count):
            await self._servers.run_worker(f"worker-dbos-{number}", ["-m", "proof.benchmarks.dbos_worker"], settings)
        self._client = await asyncio.to_thread(self._dbos.client, self._servers.database_dsn)

    async def start(self, task_id: str) -> None:
        options = {"workflow_name": self._dbos.WORKFLOW, "queue_name": self._dbos.QUEUE, "workflow_id": task_id}
        task = job.image_task(task_id).model_dump(mode="json")
        await self._client.enqueue_async({**options, "app_version": self._dbos.VERSION}, task, self._dbos.now())

    async def call_back(self, task_id: str, body: dict[str, Any]) -> None:
        await self._client.send_async(task_id, body, self._dbos.TOPIC)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._client.destroy)
