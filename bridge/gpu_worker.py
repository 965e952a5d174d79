"""`python -m bridge.gpu_worker --server http://…`: takes jobs and runs them on one ComfyUI server.

Start a worker to add a server, stop it to remove one. On SIGTERM it takes no more jobs and gives the running graph
`gpu_grace_seconds` to finish; then the prompt is cancelled and the job moves to another server. The prompt of a killed
worker runs on, and the restarted worker finds it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Final

import structlog
from temporalio import activity
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client
from temporalio.worker import FixedSizeSlotSupplier, PollerBehaviorSimpleMaximum, Worker, WorkerTuner

from bridge.callbacks import CallbackSender
from bridge.calls import BRIDGE_QUEUE, pool_queue, presence_queue, server_queue, template_queue
from bridge.fitness import Fitness, problems_of
from bridge.forecast import Forecast
from bridge.gpu_activities import GpuActivities, ServerIdentity
from bridge.lora_cache import LORA_CACHE_BYTES, LoraCache
from bridge.manifest import DEFAULT_POOL
from bridge.native import NativeServer
from bridge.orders import ServerReport
from bridge.prompt_run import Patience
from bridge.required_settings import (
    server_headers_by,
    stop_on_signals,
    template_folders_by,
    templates_by,
    warm_up_by,
)
from bridge.seen_server import SeenServer, identity_of
from bridge.server import Server, ServerDescription, ServerError, UnsupportedServer
from bridge.server_gauges import ServerGauges
from bridge.server_health import ServerHealth
from bridge.server_name import TAKEN_WAIT_SECONDS, NameTaken, demand_name, name_of, owner_of
from bridge.server_reports import Reporting, ServerReports
from bridge.slot import TAKEN_SECONDS, FreeSlots, Slot
from bridge.storage import Storage
from bridge.storage_health import StorageHealth
from bridge.template_library import TemplateLibrary
from bridge.template_queues import TemplateQueues
from bridge.template_watch import TemplateWatch
from bridge.templates import Template
from bridge.ticks import RunningJobs
from bridge.warm_up import WarmUpPace, WarmUps
from comfyui_temporal.process_end import end_process
from runtime import temporal_connection
from runtime.health_page import HealthPage, is_polling
from runtime.logs import configure_logs
from runtime.metrics_page import metrics_runtime
from runtime.required_settings import CannotStart, read_settings
from runtime.settings import Settings
from runtime.tracing import traced_process

BEAT_EVERY: Final = timedelta(seconds=1)
RETRY_SECONDS: Final = 2.0
FIRST_LOOK_SECONDS: Final = 10.0
"""How long the first reading of the server's nodes and models is waited for before jobs are taken without it."""
LOOK_SECONDS: Final = 1.0
"""A server answers its health page's question within it; the page as a whole has 4 s."""
LINGER_SECONDS: Final = 3.0
"""After a run ends, this worker still has to copy its results."""

log = structlog.get_logger("gpu_worker")


@activity.defn
async def is_there() -> str:
    """Never scheduled: the pollers of its queue show which servers exist."""
    return "yes"


class GpuWorker:
    """One server's workers: on the queues of its pool and of the templates that it can run, on the server's own queue,
    and on the presence queue."""

    def __init__(
        self,
        client: Client,
        server: Server,
        seen: SeenServer,
        storage: Storage,
        sender: CallbackSender | None,
        *,
        templates: Iterable[Template] = (),
        bridge_queue: str = BRIDGE_QUEUE,
        patience: Patience | None = None,
        taken_seconds: float = TAKEN_SECONDS,
        linger_seconds: float = LINGER_SECONDS,
        health: ServerHealth | None = None,
        storage_health: StorageHealth | None = None,
        lora_cache_bytes: int = LORA_CACHE_BYTES,
        warm_up: Iterable[str] = (),
        warm_up_pace: WarmUpPace | None = None,
    ) -> None:
        """`warm_up`: ids of the templates to run once before jobs need them."""
        self._client = client
        self._seen = seen
        self._bridge_queue = bridge_queue
        self._forecast = Forecast(client, task_queue=bridge_queue)
        self._linger_seconds = linger_seconds
        self.health = health or ServerHealth(server)
        self.fitness = Fitness(server, templates)
        self._queues = TemplateQueues(lambda: self.fitness.fit, self._template_worker)
        self._reporting = Reporting(ServerReports(client, bridge_queue), self.report)
        self.storage_health = storage_health or StorageHealth(storage, seen.name)
        self.slot = Slot(server, self.health, storage_health=self.storage_health, taken_seconds=taken_seconds)
        self.warm_ups = WarmUps(
            *(server, self.slot, self.fitness, warm_up),
            waiting=lambda: self._forecast.waiting_for(seen.pool, self.fitness.fit),
            pace=warm_up_pace,
            on_change=self._reporting.changed,
        )
        self.health.on_change = self.fitness.on_change = self.storage_health.on_change = self._changed
        identity = ServerIdentity(seen.name, server_queue(bridge_queue, seen.name), seen.gpu_type)
        self.activities = GpuActivities(
            server,
            identity,
            self.slot,
            self.fitness,
            storage,
            sender,
            patience=patience,
            jobs=RunningJobs(client),
            loras=LoraCache(server, storage, seen.name, limit_bytes=lora_cache_bytes),
            storage_health=self.storage_health,
            warm_ups=self.warm_ups,
            are_others=self._are_others,
        )
        self._identity = poller_identity = identity_of(seen, os.getpid())
        one_poller = PollerBehaviorSimpleMaximum(maximum=1)
        self._pool = self._taking_worker(pool_queue(bridge_queue, seen.pool))
        self._own = Worker(
            client,
            task_queue=identity.task_queue,
            activities=[
                self.activities.run_graph,
                self.activities.copy_results,
                self.activities.clean_server,
                self.activities.ingest_dataset,
            ],
            identity=poller_identity,
            max_concurrent_activities=8,
            activity_task_poller_behavior=PollerBehaviorSimpleMaximum(maximum=2),
            max_heartbeat_throttle_interval=BEAT_EVERY,
            default_heartbeat_throttle_interval=BEAT_EVERY,
        )
        self._presence = Worker(
            client,
            task_queue=presence_queue(bridge_queue),
            activities=[is_there],
            identity=poller_identity,
            max_concurrent_activities=1,
            activity_task_poller_behavior=one_poller,
        )

    def _taking_worker(self, task_queue: str) -> Worker:
        """A worker that takes jobs from a queue while the server is free."""
        return Worker(
            self._client,
            task_queue=task_queue,
            activities=[self.activities.take_server],
            identity=self._identity,
            tuner=WorkerTuner.create_composite(
                workflow_supplier=FixedSizeSlotSupplier(1),
                activity_supplier=FreeSlots(self.slot),
                local_activity_supplier=FixedSizeSlotSupplier(1),
                nexus_supplier=FixedSizeSlotSupplier(1),
            ),
            activity_task_poller_behavior=PollerBehaviorSimpleMaximum(maximum=1),
        )

    def _template_worker(self, template_id: str) -> Worker:
        return self._taking_worker(template_queue(self._bridge_queue, self._seen.pool, template_id))

    def report(self) -> ServerReport:
        """What this server can run now, and how it is."""
        sickness = self.health.sickness or self.storage_health.sickness
        return ServerReport(
            name=self._seen.name,
            identity=self._identity,
            unfit=self.fitness.missing,
            unknown=self.fitness.unknown,
            templates=self.fitness.templates,
            sick_since=sickness.since if sickness else None,
            sick_reason=sickness.reason if sickness else "",
            cold=self.warm_ups.cold,
            failed_warm_ups=self.warm_ups.failed,
        )

    def _changed(self) -> None:
        if self.health.sickness is not None:
            self.warm_ups.was_away()
        self._queues.changed()
        self._reporting.changed()

    async def missing(self) -> list[str]:
        """What keeps this worker from taking jobs, a sentence each: for its health page."""
        if self.health.problem is not None:
            return [self.health.problem]
        if self.storage_health.problem is not None:
            return [self.storage_health.problem]
        queue = self._presence.task_queue
        kind = TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY
        if not await is_polling(self._client, queue, self._identity, kind):
            return [f"not polling: Temporal does not see this worker at task queue {queue}"]
        return []

    @asynccontextmanager
    async def running(self, *, grace_seconds: float) -> AsyncIterator[None]:
        """Work while the body runs. Afterwards finish running work for `grace_seconds`, then hand it back."""
        with suppress(ServerError, TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_SECONDS):
                await self.fitness.refresh()
        async with self._own, self.health.watched(), self.storage_health.watched(), self.fitness.watched():
            async with self._reporting.kept(), self._presence, self.warm_ups.kept(), self._pool, self._queues.polled():
                yield
            await self._finish(grace_seconds)

    async def _are_others(self) -> bool:
        servers = await self._forecast.servers()
        return any(server.pool == self._seen.pool and server.name != self._seen.name for server in servers)

    async def _finish(self, grace_seconds: float) -> None:
        try:
            async with asyncio.timeout(grace_seconds):
                while self.slot.is_held or self.activities.is_copying:
                    await asyncio.sleep(0.1)
                    if not self.slot.is_held:
                        await asyncio.sleep(self._linger_seconds)
        except TimeoutError:
            log.warning("gpu_worker_hands_back", grace_seconds=grace_seconds)


class GpuHealth:
    """`/readyz` of one GPU worker: its server answers, Temporal sees it poll, and it is not draining."""

    def __init__(self, server: Server, stop: asyncio.Event) -> None:
        self._server = server
        self._stop = stop
        self.worker: GpuWorker | None = None
        """None while the server has not answered yet."""

    async def missing(self) -> list[str]:
        if self._stop.is_set():
            return ["draining"]
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._server.describe()
        except TimeoutError:
            return [f"the server cannot be used: no answer from {self._server.url} within {LOOK_SECONDS:g} s"]
        except ServerError as error:
            return [f"the server cannot be used: {error}"]
        return await self.worker.missing() if self.worker else ["the worker starts"]


def open_server(url: str, settings: Settings) -> NativeServer:
    """The only place that chooses a kind of server. Raises ValueError for an unusable address, CannotStart."""
    return NativeServer(url, headers=server_headers_by(settings))


async def until_answering(server: Server, stop: asyncio.Event) -> ServerDescription | None:
    """Wait until the server answers. Returns None if `stop` is set first. Raises CannotStart."""
    is_logged = False
    while not stop.is_set():
        try:
            return await server.describe()
        except UnsupportedServer as error:
            raise CannotStart(f"{error}.") from None
        except ServerError as error:
            if not is_logged:
                log.warning("comfyui_awaited", reason=str(error))
            is_logged = True
        try:
            async with asyncio.timeout(RETRY_SECONDS):
                await stop.wait()
        except TimeoutError:
            continue
    return None


async def check_templates(server: Server, templates: TemplateLibrary, pool: str) -> list[str]:
    """What this server would refuse in its pool's templates. Raises ServerError."""
    info = await server.node_types()
    return [
        f"template {template.template_id!r}: {problem}"
        for template in templates.of_pools([pool])
        for problem in problems_of(template, info)
    ]


async def serve(settings: Settings, options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Work until `stop` is set. Raises CannotStart."""
    templates = templates_by(settings)
    warm_up = warm_up_by(settings, templates, options.pool)
    async with AsyncExitStack() as opened:
        try:
            server = await opened.enter_async_context(open_server(options.server, settings))
            storage = Storage(settings.bridge_store_url)
            sender: CallbackSender | None = None
            if (secret := settings.signing_secret) is not None:
                sender = await opened.enter_async_context(CallbackSender(secret))
            runtime = metrics_runtime(settings.worker_host, settings.gpu_metrics_port, setting="GPU_METRICS_PORT")
            client = await temporal_connection.connect(settings, runtime=runtime)
            await temporal_connection.check_namespace(client)
        except (ValueError, RuntimeError) as error:
            raise CannotStart(str(error)) from None
        health = GpuHealth(server, stop)
        page = HealthPage({"/readyz": health.missing})
        await opened.enter_async_context(
            page.served(settings.worker_host, settings.gpu_health_port, setting="GPU_HEALTH_PORT")
        )
        name = options.name or name_of(server.url)
        gauges = ServerGauges(runtime.metric_meter, server, name=name, pool=options.pool) if runtime else None
        description = await until_answering(server, stop)
        if description is None:
            return
        gpu_type = options.gpu_type or description.gpu_type
        seen = SeenServer(name=name, pool=options.pool, gpu_type=gpu_type, owner=owner_of(server.url))
        forecast = Forecast(client, task_queue=settings.bridge_task_queue)
        try:
            await demand_name(forecast, name, seen.owner, wait_seconds=TAKEN_WAIT_SECONDS)
        except NameTaken as taken:
            raise CannotStart(str(taken)) from None
        worker = GpuWorker(
            *(client, server, seen, storage, sender),
            templates=templates.of_pools([options.pool]),
            bridge_queue=settings.bridge_task_queue,
            lora_cache_bytes=settings.bridge_lora_cache_bytes,
            warm_up=warm_up,
        )
        health.worker = worker
        watch = TemplateWatch(
            *(templates, template_folders_by(settings)),
            on_change=lambda: worker.fitness.replace(templates.of_pools([options.pool])),
        )
        await opened.enter_async_context(watch.watched())
        if gauges is not None:
            warm_ups = worker.warm_ups
            await opened.enter_async_context(
                gauges.shown(worker.slot, lambda: len(warm_ups.cold) + len(warm_ups.failed))
            )
        async with worker.running(grace_seconds=settings.gpu_grace_seconds):
            log.info(
                "gpu_worker_serves",
                server=server.url,
                version=description.version,
                name=seen.name,
                pool=seen.pool,
                gpu_type=gpu_type,
            )
            await stop.wait()
            log.info("gpu_worker_drains", grace_seconds=settings.gpu_grace_seconds)
    log.info("gpu_worker_ended")


async def check(settings: Settings, options: argparse.Namespace) -> int:
    """Print what the server would refuse in its pool's templates. Returns 1 if there is anything."""
    templates = templates_by(settings)
    try:
        async with open_server(options.server, settings) as server:
            await server.describe()
            problems = await check_templates(server, templates, options.pool)
    except (ServerError, ValueError) as error:
        raise CannotStart(f"{error}.") from None
    for template in templates.of_pools([options.pool]):
        name = f"template {template.template_id!r}"
        if not any(problem.startswith(name) for problem in problems):
            sys.stdout.write(f"ok    {name}\n")
    for problem in problems:
        sys.stdout.write(f"WRONG {problem}\n")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bridge.gpu_worker", description=__doc__.partition("\n")[0])
    parser.add_argument("--server", required=True, help="address of the ComfyUI server, e.g. http://127.0.0.1:8188")
    parser.add_argument("--pool", default=DEFAULT_POOL, help="take jobs of templates with this `pool`")
    parser.add_argument("--name", help="the server's name; default: made from its address")
    parser.add_argument("--gpu-type", help="type of GPU; default: what the server reports")
    parser.add_argument("--check", action="store_true", help="only print which templates this server can run")
    return parser.parse_args()


async def _run(settings: Settings, options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    stop_on_signals(stop)
    if options.check:
        return await check(settings, options)
    await serve(settings, options, stop)
    return 0


def main() -> int:
    options = _options()
    try:
        settings = read_settings()
        configure_logs(level=settings.log_level, as_json=settings.log_json, hidden=settings.hidden_values)
        with traced_process("gpu-worker", is_on=settings.traces):
            return asyncio.run(_run(settings, options))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    end_process(main())
