"""`python worker.py`: run workflows and activities until a signal arrives, then drain.

After SIGTERM or SIGINT no new work is taken, and calls in flight get `grace_seconds` to end. Workflows continue on
another worker or later. A second signal ends the process immediately; that delays tasks but loses none.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import structlog
import uvloop
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import PollerBehaviorAutoscaling, Worker, WorkerDeploymentConfig

from activities.closed_runs import ClosedRunActivities
from activities.comfyui import ComfyUIActivities, ComfyUIClient
from activities.credits import CreditsActivities, CreditsClient
from activities.dataset_list import DatasetFolders, DatasetListActivities
from activities.datasets import DatasetActivities, DatasetSnapshots
from activities.earlier_runs import EarlierRunActivities
from activities.lives import Lives
from activities.metrics import BUCKETS_SECONDS
from activities.task_store import TaskStoreActivities
from activities.tokens import ServiceToken, SignedTokens, TokenMaker
from activities.unsettled import UnsettledActivities
from activities.worker_settings import WorkerSettingsActivities
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_store import TaskClaim
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from comfyui_temporal.contracts.worker_settings import WorkerSettings
from comfyui_temporal.encryption import NO_ENCRYPTION, encryption_of
from comfyui_temporal.process_end import end_process
from runtime import temporal_connection
from runtime.health_page import FirstAnswers, HealthPage, is_polling
from runtime.logs import configure_logs
from runtime.metrics_page import metrics_runtime
from runtime.reconciler_schedule import ensure_reconciler
from runtime.required_settings import CannotStart, database_of, read_settings
from runtime.settings import Settings
from runtime.tracing import traced_process
from store import TaskStore
from store.namespace_check import bound_store
from workflows.dataset_list import DatasetListWorkflow
from workflows.give_back import GiveBackWorkflow
from workflows.image_generation import ImageGenerationWorkflow
from workflows.pinned import PinnedImageGenerationWorkflow
from workflows.reconciler import ReconcileWorkflow
from workflows.template_list import TemplateListWorkflow
from workflows.training import TrainingWorkflow
from workflows.worker_settings import WorkerSettingsWorkflow

VERSIONED: Final[dict[type, type]] = {ImageGenerationWorkflow: PinnedImageGenerationWorkflow}
"""What a versioned worker runs in place of a workflow that stays on its build (decision 15)."""
WORKFLOWS: Final = (
    ImageGenerationWorkflow,
    TrainingWorkflow,
    GiveBackWorkflow,
    ReconcileWorkflow,
    WorkerSettingsWorkflow,
    TemplateListWorkflow,
    DatasetListWorkflow,
)
STICKY_SECONDS: Final = 2.5
"""How long a workflow waits for its worker: this delays the work of a killed one.

With 1 s a burst of 150 starts on a busy machine missed it 121 times. Each miss replays a whole history, which keeps
the machine busy. A killed worker's work continues within 5 s either way.
"""
FIRST_POLLERS: Final = 5
RECONCILE_EVERY: Final = "reconciler_every_seconds"
REQUEST_SECONDS: Final = 5.0
EXIT_CANNOT_START: Final = 2
EXIT_FORCED: Final = 1

log = structlog.get_logger("worker")


def token_maker(settings: Settings) -> TokenMaker:
    """How our calls authenticate (contract §7). Raises CannotStart."""
    if settings.service_token is not None:
        return ServiceToken(settings.service_token.get_secret_value())
    if settings.service_secret is None:
        raise CannotStart(
            "No token for ComfyUI and credits is set: set COMFYUI_TEMPORAL_SERVICE_SECRET (HS256, at least 32 "
            "bytes), or COMFYUI_TEMPORAL_SERVICE_TOKEN if only a static token is accepted."
        )
    return SignedTokens(
        settings.service_secret.get_secret_value(), issuer=settings.service_issuer, audience=settings.service_audience
    )


def policy_by(settings: Settings) -> Callable[[TaskClaim], Policy]:
    """Prices and limits of a task, from the worker's settings (contract §5)."""

    def policy_of(claim: TaskClaim) -> Policy:
        return settings.policy(
            scene=claim.scene, task_id=claim.task_id, tenant_id=claim.tenant_id, priority=claim.priority.value
        )

    return policy_of


def activities_of(*holders: object) -> list[Callable[..., Any]]:
    """Every activity method of these objects."""
    methods = (getattr(holder, name) for holder in holders for name in dir(holder) if not name.startswith("_"))
    return [method for method in methods if hasattr(method, "__temporal_activity_definition")]


def all_activities(
    comfyui: ComfyUIClient,
    credits_client: CreditsClient,
    datasets: DatasetSnapshots,
    store: TaskStore,
    policy_of: Callable[[TaskClaim], Policy],
    client: Client | None,
    limits_of: Callable[[str], TenantLimits] = lambda _tenant_id: NO_LIMITS,
    *,
    keeps_inputs: bool = True,
) -> list[Callable[..., Any]]:
    """Every activity, on open clients. Without `client` the activities that read other runs are left out."""
    lives = Lives(store)
    return activities_of(
        ComfyUIActivities(comfyui, lives, datasets),
        CreditsActivities(credits_client, lives),
        DatasetActivities(datasets),
        DatasetListActivities(DatasetFolders(datasets.dataset_roots)),
        TaskStoreActivities(
            store,
            policy_of,
            encryption_of(client) if client else NO_ENCRYPTION,
            limits_of,
            keeps_inputs=keeps_inputs,
        ),
        *(
            [ClosedRunActivities(client, store), EarlierRunActivities(client, store), UnsettledActivities(store)]
            if client
            else []
        ),
    )


@asynccontextmanager
async def opened_activities(
    settings: Settings, client: Client | None = None
) -> AsyncIterator[Sequence[Callable[..., Any]]]:
    """All activities on open clients, which are closed afterwards. `client` is for activities that read runs.

    Raises CannotStart.
    """
    dsn = database_of(settings)
    async with AsyncExitStack() as opened:
        try:
            tokens = token_maker(settings)
            store = TaskStore(dsn)
            opened.push_async_callback(store.close)
            comfyui = await opened.enter_async_context(ComfyUIClient(settings.comfyui_url, tokens))
            credits_client = await opened.enter_async_context(CreditsClient(settings.credits_url, tokens))
            datasets = await opened.enter_async_context(
                DatasetSnapshots(settings.object_store_url, dataset_roots=settings.dataset_roots)
            )
        except ValueError as error:
            raise CannotStart(str(error)) from None
        policy_of = policy_by(settings)
        tasks = all_activities(
            comfyui,
            credits_client,
            datasets,
            store,
            policy_of,
            client,
            settings.limits_of,
            keeps_inputs=settings.keep_inputs,
        )
        yield [*tasks, *activities_of(WorkerSettingsActivities(_used(settings, store)))]


def _used(settings: Settings, store: TaskStore) -> WorkerSettings:
    return WorkerSettings(
        comfyui_url=settings.comfyui_url,
        credits_url=settings.credits_url,
        callback_base_url=settings.callback_base_url,
        object_store_url=settings.object_store_url,
        database=store.address,
    )


async def connect(settings: Settings) -> Client:
    """A client whose server knows our search attributes. Raises CannotStart."""
    runtime = _runtime(settings)
    try:
        client = await temporal_connection.connect(settings, runtime=runtime)
    except (RuntimeError, ValueError) as error:
        address = settings.temporal_address or "the address of Temporal's environment configuration"
        raise CannotStart(
            f"Temporal at {address} cannot be reached: {error}. Check that the server runs, or set its address in "
            "TEMPORAL_ADDRESS, TEMPORAL_PROFILE or COMFYUI_TEMPORAL_TEMPORAL_ADDRESS."
        ) from None
    await check_search_attributes(client)
    return client


async def check_search_attributes(client: Client) -> None:
    """Raises CannotStart if one of contract §8's is missing: a run that sets it would be stuck (pitfall 6)."""
    try:
        known = await client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=client.namespace), timeout=timedelta(seconds=REQUEST_SECONDS)
        )
    except RPCError as error:
        if error.status in (RPCStatusCode.UNIMPLEMENTED, RPCStatusCode.PERMISSION_DENIED):
            log.warning("search_attributes_unchecked", reason=error.message, needed=list(SEARCH_ATTRIBUTES))
            return
        raise CannotStart(
            f"Temporal does not show the search attributes of namespace {client.namespace!r}: "
            f"{error.message.rstrip('.')}. Check that the namespace exists."
        ) from None
    keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    missing = [name for name in SEARCH_ATTRIBUTES if known.custom_attributes.get(name) != keyword]
    if missing:
        named = " ".join(f"--name {name} --type Keyword" for name in missing)
        raise CannotStart(
            f"Namespace {client.namespace!r} lacks the search attributes {', '.join(missing)} (type Keyword). "
            f"Add them: temporal operator search-attribute create --namespace {client.namespace} {named}"
        )


async def schedule_reconciler(client: Client, settings: Settings) -> None:
    """Tasks run without the schedule too: if it cannot be made, that is logged, and `doctor` reports it."""
    try:
        await ensure_reconciler(client, settings)
    except RPCError as error:
        log.warning("reconciler_not_scheduled", reason=error.message)


def make_worker(
    client: Client,
    settings: Settings,
    activities: Sequence[Callable[..., Any]],
    workflows: Sequence[type] = WORKFLOWS,
    **options: Any,
) -> Worker:
    """The worker, with the defaults of docs/architecture.md, "Defaults"; `options` override them."""
    deployment = deployment_of(settings)
    if deployment is not None:
        workflows = [VERSIONED.get(each, each) for each in workflows]
    defaults: dict[str, Any] = {
        "deployment_config": deployment,
        "task_queue": settings.task_queue,
        "max_cached_workflows": settings.max_cached_workflows,
        "max_concurrent_workflow_tasks": settings.max_workflow_tasks,
        "max_concurrent_activities": settings.max_activities,
        "max_concurrent_local_activities": settings.max_local_activities,
        "workflow_task_poller_behavior": _pollers(at_least=2, at_most=settings.max_workflow_tasks),
        "activity_task_poller_behavior": _pollers(at_least=1, at_most=settings.max_activities),
        "sticky_queue_schedule_to_start_timeout": timedelta(seconds=STICKY_SECONDS),
        "graceful_shutdown_timeout": timedelta(seconds=settings.grace_seconds),
    }
    return Worker(client, workflows=workflows, activities=activities, **{**defaults, **options})


def deployment_of(settings: Settings) -> WorkerDeploymentConfig | None:
    """The worker's version; None where no deployment is named (decision 15).

    Images stay on their build (`VERSIONED`). All else moves on: trainings last for days, no give-back may ever wait for
    a build that is gone, and a pass of the reconciler that waited for one would hold back every later pass.
    """
    if settings.deployment_name is None or settings.build_id is None:
        return None
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(deployment_name=settings.deployment_name, build_id=settings.build_id),
        use_worker_versioning=True,
        default_versioning_behavior=VersioningBehavior.AUTO_UPGRADE,
    )


def _pollers(*, at_least: int, at_most: int) -> PollerBehaviorAutoscaling:
    return PollerBehaviorAutoscaling(minimum=at_least, maximum=at_most, initial=min(FIRST_POLLERS, at_most))


def health_page(
    client: Client, worker: Worker, stop: asyncio.Event, parties: Mapping[str, str] | None = None
) -> HealthPage:
    """`/readyz`: the server sees this worker poll, and it is not draining. `/startupz`: also, each of `parties` (name →
    address) has answered once.
    """
    first_answers = FirstAnswers(parties or {})

    async def ready() -> list[str]:
        if stop.is_set() or not worker.is_running:
            return ["not polling: the worker starts or drains"]
        if not await is_polling(client, worker.task_queue, client.identity):
            return [f"not polling: Temporal does not see this worker at task queue {worker.task_queue}"]
        return []

    async def started() -> list[str]:
        looked = await asyncio.gather(ready(), first_answers.missing())
        return [sentence for missing in looked for sentence in missing]

    return HealthPage({"/readyz": ready, "/startupz": started})


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Work until `stop` is set, then drain. Closes the worker before its clients (pitfall 30). Raises CannotStart."""
    client = await connect(settings)
    home = bound_store(
        client,
        database_of(settings),
        refused=stop.set,
        then=lambda: schedule_reconciler(client, settings),
    )
    if not settings.dataset_roots:
        log.warning("no_dataset_roots", setting="COMFYUI_TEMPORAL_DATASET_ROOTS", means="trainings are refused")
    async with home, opened_activities(settings, client) as activities:
        worker = make_worker(client, settings, activities)
        parties = {"ComfyUI": settings.comfyui_url, "the credits service": settings.credits_url}
        page = health_page(client, worker, stop, parties)
        async with page.served(settings.worker_host, settings.health_port):
            running = asyncio.create_task(worker.run())
            stopping = asyncio.create_task(stop.wait())
            log.info("worker_serves", task_queue=settings.task_queue, namespace=client.namespace)
            if settings.deployment_name is not None:
                log.info("worker_is_versioned", **_version_of(settings))
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not running.done():
                log.info("worker_drains", grace_seconds=settings.grace_seconds)
                await worker.shutdown()
            await running
    log.info("worker_ended")


def _version_of(settings: Settings) -> dict[str, str]:
    """What an operator must know of a versioned worker: it gets no work before its build is current or ramping."""
    named = f"--deployment-name {settings.deployment_name} --build-id {settings.build_id}"
    return {
        "deployment_name": settings.deployment_name or "",
        "build_id": settings.build_id or "",
        "gets_work_after": f"temporal worker deployment set-current-version {named}",
    }


def _runtime(settings: Settings) -> Runtime | None:
    try:
        runtime = metrics_runtime(
            settings.worker_host, settings.metrics_port, setting="METRICS_PORT", buckets=BUCKETS_SECONDS
        )
    except ValueError as error:
        raise CannotStart(str(error)) from None
    if runtime is not None:
        runtime.metric_meter.create_gauge_float(
            RECONCILE_EVERY, "How often the reconciler is to look for open rows whose run is closed."
        ).set(settings.reconcile_every_seconds)
    return runtime


def _handle_signals(stop: asyncio.Event) -> None:
    def on_signal() -> None:
        if stop.is_set():
            log.warning("worker_ends_at_once")
            os._exit(EXIT_FORCED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


async def run(settings: Settings) -> None:
    stop = asyncio.Event()
    _handle_signals(stop)
    await serve(settings, stop)


def main() -> int:
    try:
        settings = read_settings()
        configure_logs(level=settings.log_level, as_json=settings.log_json, hidden=settings.hidden_values)
        with traced_process("worker", is_on=settings.traces):
            uvloop.run(run(settings))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CANNOT_START
    return 0


if __name__ == "__main__":
    end_process(main())
