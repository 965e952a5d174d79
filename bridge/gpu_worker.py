"""`python -m bridge.gpu_worker --server http://…`: beside one ComfyUI server, takes jobs and runs them on it.

Adding a server is starting a worker, removing one is stopping it: on SIGTERM it takes nothing more and lets the graph
that runs come to its end for `gpu_grace_seconds`; past that the prompt is stopped and the job goes to another server.
A killed worker's prompt runs on; the worker that is started again finds it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import FixedSizeSlotSupplier, PollerBehaviorSimpleMaximum, Worker, WorkerTuner

from bridge.callbacks import CallbackSender
from bridge.calls import BRIDGE_QUEUE, pool_queue, presence_queue, server_queue
from bridge.forecast import SeenServer, identity_of
from bridge.gpu_activities import GpuActivities, ServerIdentity
from bridge.graph_check import NoModel, chosen_models, graph_problems
from bridge.manifest import DEFAULT_POOL
from bridge.native import NativeServer
from bridge.native_errors import NativeFailure
from bridge.prompt_run import Patience
from bridge.required_settings import heed_signals, templates_by
from bridge.slot import TAKEN_SECONDS, FreeSlots, Slot
from bridge.storage import Storage
from bridge.templates import TemplateLibrary
from comfyui_temporal.process_end import end_process
from runtime import temporal_connection
from runtime.logs import configure_logs
from runtime.required_settings import CannotStart, read_settings
from runtime.settings import Settings

OLDEST: Final = (0, 3, 56)
"""Before it, `/interrupt` stops whatever runs, whoever's it is."""
BEAT_EVERY: Final = timedelta(seconds=1)
ASK_AGAIN_SECONDS: Final = 2.0
LINGER_SECONDS: Final = 3.0
"""After a run's end its results are still to be copied by this worker."""
_VENDORS: Final = re.compile(r"^(cuda|hip|xpu|mps|cpu)(:\d+)?\s+|\s*:.*$|nvidia|geforce|amd|radeon|intel|\(r\)|\(tm\)")

log = structlog.get_logger("gpu_worker")


@activity.defn
async def is_there() -> str:
    """Never scheduled: a queue that is polled shows who polls it."""
    return "yes"


class GpuWorker:
    """One server's workers: the pool's queue, the server's own, and the one that shows that it is there."""

    def __init__(
        self,
        client: Client,
        server: NativeServer,
        seen: SeenServer,
        storage: Storage,
        sender: CallbackSender | None,
        *,
        bridge_queue: str = BRIDGE_QUEUE,
        patience: Patience | None = None,
        taken_seconds: float = TAKEN_SECONDS,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self._linger_seconds = linger_seconds
        self.slot = Slot(server, taken_seconds=taken_seconds)
        identity = ServerIdentity(seen.name, server_queue(bridge_queue, seen.name), seen.gpu_type)
        self.activities = GpuActivities(server, identity, self.slot, storage, sender, patience=patience)
        names = identity_of(seen, os.getpid())
        one = PollerBehaviorSimpleMaximum(maximum=1)
        self._pool = Worker(
            client,
            task_queue=pool_queue(bridge_queue, seen.pool),
            activities=[self.activities.take_server],
            identity=names,
            tuner=WorkerTuner.create_composite(
                workflow_supplier=FixedSizeSlotSupplier(1),
                activity_supplier=FreeSlots(self.slot),
                local_activity_supplier=FixedSizeSlotSupplier(1),
                nexus_supplier=FixedSizeSlotSupplier(1),
            ),
            activity_task_poller_behavior=one,
        )
        self._own = Worker(
            client,
            task_queue=identity.task_queue,
            activities=[self.activities.run_graph, self.activities.copy_results, self.activities.ingest_dataset],
            identity=names,
            max_concurrent_activities=8,
            activity_task_poller_behavior=PollerBehaviorSimpleMaximum(maximum=2),
            max_heartbeat_throttle_interval=BEAT_EVERY,
            default_heartbeat_throttle_interval=BEAT_EVERY,
        )
        self._presence = Worker(
            client,
            task_queue=presence_queue(bridge_queue),
            activities=[is_there],
            identity=names,
            max_concurrent_activities=1,
            activity_task_poller_behavior=one,
        )

    @asynccontextmanager
    async def running(self, *, grace_seconds: float) -> AsyncIterator[None]:
        """Work while the body runs; afterwards finish what runs for `grace_seconds`, then hand it back."""
        async with self._own:
            async with self._presence, self._pool:
                yield
            await self._finished(grace_seconds)

    async def _finished(self, grace_seconds: float) -> None:
        try:
            async with asyncio.timeout(grace_seconds):
                while self.slot.is_held or self.activities.is_copying:
                    await asyncio.sleep(0.1)
                    if not self.slot.is_held:
                        await asyncio.sleep(self._linger_seconds)
        except TimeoutError:
            log.warning("gpu_worker_hands_back", grace_seconds=grace_seconds)


async def until_answering(server: NativeServer, stop: asyncio.Event) -> Mapping[str, Any] | None:
    """What the server says of itself, as soon as it does; None where `stop` comes first."""
    said = False
    while not stop.is_set():
        try:
            return await server.system_stats()
        except NativeFailure as failure:
            if not said:
                log.warning("comfyui_awaited", reason=str(failure))
            said = True
        try:
            async with asyncio.timeout(ASK_AGAIN_SECONDS):
                await stop.wait()
        except TimeoutError:
            continue
    return None


def check_version(stats: Mapping[str, Any], url: str) -> None:
    """Raises CannotStart for a server on which nothing can be stopped by its id."""
    system = stats.get("system")
    version = str(system.get("comfyui_version") or "") if isinstance(system, Mapping) else ""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers and numbers < OLDEST:
        needed = ".".join(str(number) for number in OLDEST)
        raise CannotStart(f"ComfyUI at {url} is {version}: at least {needed} is needed, to stop a job by its id.")


def gpu_type_of(stats: Mapping[str, Any]) -> str:
    """The kind of GPU by the server's own words: `NVIDIA GeForce RTX 4090` → `rtx-4090`."""
    devices = stats.get("devices")
    device = devices[0] if isinstance(devices, list) and devices else {}
    name = str(device.get("name") or "") if isinstance(device, Mapping) else ""
    kept = re.sub(r"[^a-z0-9]+", "-", _VENDORS.sub("", name.lower())).strip("-")
    return kept[:60] or str(device.get("type") or "gpu")[:60]


def name_of(url: str) -> str:
    """A name for queues from the server's address; the same for each worker of this server."""
    parts = urlsplit(url)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{parts.hostname}-{parts.port or parts.scheme}")[:64]


async def check_templates(server: NativeServer, templates: TemplateLibrary, pool: str) -> list[str]:
    """What this server would refuse of its pool's templates. Raises NativeFailure."""
    info = await server.object_info()
    problems: list[str] = []
    for template in templates.of_pools([pool]):
        found = graph_problems(template.graph, info, template.result_nodes, uploads=template.filled_in_later())
        try:
            chosen_models(template.graph, info, template.models_needed(), template.result_nodes)
        except NoModel as missing:
            found.append(str(missing))
        problems += [f"template {template.template_id!r}: {problem}" for problem in found]
    return problems


async def serve(settings: Settings, options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Work until `stop` is set. Raises CannotStart."""
    templates = templates_by(settings)
    async with AsyncExitStack() as opened:
        try:
            server = await opened.enter_async_context(NativeServer(options.server))
            storage = Storage(settings.bridge_store_url)
            sender: CallbackSender | None = None
            if settings.callback_secrets:
                secret = settings.callback_secrets[0].get_secret_value()
                sender = await opened.enter_async_context(CallbackSender(secret))
            client = await temporal_connection.connect(settings)
        except (ValueError, RuntimeError) as error:
            raise CannotStart(str(error)) from None
        stats = await until_answering(server, stop)
        if stats is None:
            return
        check_version(stats, server.url)
        for problem in await check_templates(server, templates, options.pool):
            log.warning("template_unusable_here", problem=problem)
        gpu_type = options.gpu_type or gpu_type_of(stats)
        seen = SeenServer(name=options.name or name_of(server.url), pool=options.pool, gpu_type=gpu_type)
        worker = GpuWorker(client, server, seen, storage, sender, bridge_queue=settings.bridge_task_queue)
        async with worker.running(grace_seconds=settings.gpu_grace_seconds):
            log.info("gpu_worker_serves", server=server.url, name=seen.name, pool=seen.pool, gpu_type=gpu_type)
            await stop.wait()
            log.info("gpu_worker_drains", grace_seconds=settings.gpu_grace_seconds)
    log.info("gpu_worker_ended")


async def check(settings: Settings, options: argparse.Namespace) -> int:
    """Say what the server would refuse of its pool's templates; 1 where there is something."""
    templates = templates_by(settings)
    try:
        async with NativeServer(options.server) as server:
            check_version(await server.system_stats(), server.url)
            problems = await check_templates(server, templates, options.pool)
    except (NativeFailure, ValueError) as failure:
        raise CannotStart(f"{failure}.") from None
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
    parser.add_argument("--pool", default=DEFAULT_POOL, help="which templates' jobs it takes (their `pool`)")
    parser.add_argument("--name", help="the server's name; default: from its address")
    parser.add_argument("--gpu-type", help="default: as the server says")
    parser.add_argument("--check", action="store_true", help="only say which templates this server can run")
    return parser.parse_args()


async def _run(settings: Settings, options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    heed_signals(stop)
    if options.check:
        return await check(settings, options)
    await serve(settings, options, stop)
    return 0


def main() -> int:
    options = _options()
    try:
        settings = read_settings()
        configure_logs(level=settings.log_level, as_json=settings.log_json)
        return asyncio.run(_run(settings, options))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    end_process(main())
