"""A whole platform in one process with real connections: simulators, gateway, PostgreSQL, Temporal, a worker.

`Platform` starts tasks as any client would, by name and JSON. `books.py` holds the one assertion that every scenario
ends with.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from activities.datasets import DatasetSnapshots
from activities.file_lists import FileLists
from activities.outside_http import READ_SECONDS
from activities.tokens import SignedTokens
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.task_store import TaskClaim
from comfyui_temporal.contracts.tasks import (
    CALLBACK_SIGNAL,
    IMAGE_WORKFLOW,
    TRAINING_WORKFLOW,
    WORKFLOW_ID_PREFIX,
    workflow_id_of,
)
from comfyui_temporal.contracts.tenant_limits import TenantLimits
from comfyui_temporal.plugin import TasksPlugin
from gateway.access import Access
from gateway.app import create_app
from gateway.tokens import StreamTokens
from proof.simulators.admin_client import ServiceAdmin
from proof.simulators.admin_wire import Fault, RunSeen
from proof.simulators.credits_profile import CONTRACT, CreditsProfile
from proof.simulators.serving import (
    DEFAULT_AUDIENCE,
    DEFAULT_ISSUER,
    TEST_CALLBACK_SECRET,
    TEST_TOKEN_SECRET,
    Simulators,
    running_simulators,
)
from proof.simulators.tokens import Tokens
from runtime.caller_tokens import CallerTokens, SharedSecret
from runtime.settings import Settings
from store import TaskStore
from tests.conftest import unique
from tests.served_app import served_app
from tests.waiting import until
from worker import WORKFLOWS, all_activities, make_worker
from workflows.image_generation import ImageGenerationWorkflow
from workflows.training import TrainingWorkflow

T = TypeVar("T")
Handle = WorkflowHandle[Any, Any]
STICKY = {"sticky_queue_schedule_to_start_timeout": timedelta(seconds=10)}
"""Longer than a busy machine keeps a worker from a task: no scenario replays a history that it does not mean to."""
CALLERS = Tokens("gateways-in-tests-know-callers-by-this", DEFAULT_ISSUER, "comfyui-platform")
"""Tokens of the gateway's callers. Those of the simulators are service tokens."""
FLOWS: tuple[type, ...] = (ImageGenerationWorkflow, TrainingWorkflow)


@dataclass
class Platform:
    """Everything a scenario needs; `policy` overrides what the worker's settings would say."""

    client: Client
    environment: WorkflowEnvironment
    simulators: Simulators
    store: TaskStore
    folder: Path
    gateway_url: str = ""
    task_queue: str = field(default_factory=lambda: unique("queue"))
    policy: dict[str, Any] = field(default_factory=dict)
    limits: TenantLimits = field(default_factory=TenantLimits)
    """Each tenant's."""
    read_seconds: float = READ_SECONDS
    """How long the worker's clients wait for an answer."""
    told_by_hand: set[str] = field(default_factory=set)
    """Tasks and tenants for whom a scenario sent messages or calls of its own: the services do not know all."""

    cached_workflows: ClassVar[int] = 1_000
    """How many runs a worker keeps in memory by default."""

    # Starting tasks

    def image(self, **fields: Any) -> dict[str, Any]:
        """A good image input as JSON."""
        return {
            "task_id": unique("image"),
            "tenant_id": "tenant-demo",
            "user_id": "user-demo",
            "template_id": "text-to-image",
            "prompt": "a lighthouse at dusk",
            **fields,
        }

    def training(self, **fields: Any) -> dict[str, Any]:
        """A good training input as JSON, its dataset on disk, its price confirmed beforehand."""
        dataset = self.folder / "datasets" / "tenant-demo" / "faces"
        dataset.mkdir(parents=True, exist_ok=True)
        for n in range(3):
            (dataset / f"{n}.txt").write_text(f"picture {n}")
        return {
            "task_id": unique("training"),
            "tenant_id": "tenant-demo",
            "user_id": "user-demo",
            "template_id": "lora-train",
            "dataset": {"dataset_id": "faces", "source_uri": dataset.as_uri()},
            "hyperparameters": {"epochs": 4, "batch_size": 1, "learning_rate": 0.001},
            "max_credits": 1_000,
            **fields,
        }

    async def start(self, task: dict[str, Any], **options: Any) -> Handle:
        """Start a task with no option but id and queue, unless more are given."""
        workflow = TRAINING_WORKFLOW if "dataset" in task else IMAGE_WORKFLOW
        return await self.client.start_workflow(
            workflow, task, id=workflow_id_of(task["task_id"]), task_queue=self.task_queue, **options
        )

    async def start_image(self, **fields: Any) -> Handle:
        return await self.start(self.image(**fields))

    async def start_training(self, **fields: Any) -> Handle:
        return await self.start(self.training(**fields))

    async def start_waiting_image(self, **fields: Any) -> Handle:
        """Start an image task and wait until its credits are held and its job is waited for."""
        handle = await self.start_image(**fields)
        await self.until_held(task_id_of(handle))
        await self.until_settled(handle)
        return handle

    # Messages

    async def progress(self, handle: Handle) -> dict[str, Any]:
        answer: dict[str, Any] = await handle.query("progress")
        return answer

    async def cancel(self, handle: Handle, reason: str = "no longer wanted") -> str:
        """The update `cancel_task`; its outcome."""
        answer: dict[str, str] = await handle.execute_update("cancel_task", {"reason": reason})
        return answer["outcome"]

    async def callback(self, handle: Handle, **body: Any) -> None:
        """A signal past the gateway, as a careless sender would send it."""
        self.told_by_hand.add(task_id_of(handle))
        await handle.signal(CALLBACK_SIGNAL, body)

    # Waiting on conditions

    async def until(self, condition: Callable[[], Awaitable[T]], *, seconds: float = 30.0) -> T:
        return await until(condition, within_seconds=seconds)

    async def until_stage(self, handle: Handle, stage: str) -> dict[str, Any]:
        """Wait until the task shows this stage; its progress."""

        async def shown() -> dict[str, Any] | None:
            progress = await self.progress(handle)
            return progress if progress["stage"] == stage else None

        progress = await self.until(shown)
        assert progress is not None
        return progress

    async def until_settled(self, handle: Handle, *, seconds: float = 0.1) -> None:
        """Wait until nothing has happened in the run for a moment: all that was due by now has been done."""
        length, since = 0, asyncio.get_running_loop().time()

        async def quiet() -> bool:
            nonlocal length, since
            described = (await handle.describe()).raw_description
            is_busy = described.pending_activities or described.HasField("pending_workflow_task")
            seen, now = described.workflow_execution_info.history_length, asyncio.get_running_loop().time()
            if seen != length or is_busy:
                length, since = seen, now
            return now - since >= seconds

        await self.until(quiet)

    async def until_held(self, task_id: str, *, points: int = 1) -> None:
        """Wait until at least `points` are held for the task, in one hold."""

        async def is_held() -> bool:
            holds = await self.simulators.admin.credits.holds(task_id)
            return any(hold.phase == "open" and hold.amount >= points for hold in holds)

        await self.until(is_held)

    def service_of(self, route: str) -> ServiceAdmin:
        """The switchboard of the service that offers this route."""
        on_credits = route in ("estimate", "pre_deduct", "commit", "cancel_hold", "charge", "ledger")
        return self.simulators.admin.credits if on_credits else self.simulators.admin.comfyui

    async def until_hit(self, route: str, fault: Fault) -> None:
        """Wait until this fault of a route has hit."""
        service = self.service_of(route)

        async def hit() -> bool:
            return any(known.fault_id == fault.fault_id and known.hits for known in await service.faults())

        await self.until(hit)

    async def job(self, handle: Handle) -> RunSeen:
        """The task's newest job or training, as ComfyUI has it; waits until there is one."""

        async def newest() -> RunSeen | None:
            runs = await self.simulators.admin.comfyui.jobs(handle.id.removeprefix("task-"))
            return runs[-1] if runs else None

        run = await self.until(newest)
        assert run is not None
        return run

    def snapshot_files(self, task_id: str) -> list[Path]:
        """What temporary object storage holds of a training's dataset."""
        kept = self.folder / "objects" / "snapshots" / task_id
        return sorted(path for path in kept.rglob("*") if path.is_file())

    async def pass_time(self, handle: Handle, span: timedelta | float) -> None:
        """Move the task's clock and the simulators' on together; needs the time-skipping platform."""
        seconds = span.total_seconds() if isinstance(span, timedelta) else span
        await self.simulators.admin.advance(seconds)
        await self.environment.fast_forward(handle, timedelta(seconds=seconds))

    def description(self) -> StackDescription:
        """The platform, described as a local stack describes itself."""
        payer = ("tenant-demo", "user-demo")
        return StackDescription(
            temporal_address=self.client.service_client.config.target_host,
            namespace="default",
            task_queue=self.task_queue,
            ui_url="http://127.0.0.1:8233",
            comfyui_url=self.simulators.comfyui_url,
            credits_url=self.simulators.credits_url,
            gateway_url=self.gateway_url,
            database_dsn="",
            callback_secret="",
            admin_token=self.simulators.admin_token,
            tokens={payer[0]: CALLERS.made_for(*payer)},
            service_tokens={payer[0]: self.simulators.tokens.made_for(*payer)},
        )

    # Restarting parts

    def settings(self) -> Settings:
        return Settings(
            _env_file=None,
            callback_base_url=self.gateway_url,
            dataset_roots=[f"{(self.folder / 'datasets').as_uri()}/{{tenant_id}}/"],
        )

    def policy_of(self, claim: TaskClaim) -> Policy:
        policy = self.settings().policy(
            scene=claim.scene, task_id=claim.task_id, tenant_id=claim.tenant_id, priority=claim.priority.value
        )
        return policy.model_copy(update=self.policy)

    def _cache(self) -> dict[str, int]:
        """Without a cache one workflow task at a time: a second would evict the first while its local call runs."""
        one = {} if self.cached_workflows else {"max_concurrent_workflow_tasks": 1}
        return {"max_cached_workflows": self.cached_workflows, **one}

    @asynccontextmanager
    async def worker(
        self, *, flows: Sequence[type] = FLOWS, build: tuple[str, str] | None = None, **options: Any
    ) -> AsyncIterator[Worker]:
        """A worker on this platform's task queue, with its own clients, as `worker.py` opens them.

        `flows`: the tasks' workflows, to run another version's instead. `build`: names of deployment and build.
        """
        version = dict(zip(("deployment_name", "build_id"), build or (), strict=False))
        tokens = SignedTokens(TEST_TOKEN_SECRET, DEFAULT_ISSUER, DEFAULT_AUDIENCE)
        async with AsyncExitStack() as stack:
            comfyui = await stack.enter_async_context(
                ComfyUIClient(self.simulators.comfyui_url, tokens, read_seconds=self.read_seconds)
            )
            credits = await stack.enter_async_context(
                CreditsClient(self.simulators.credits_url, tokens, read_seconds=self.read_seconds)
            )
            snapshots = await stack.enter_async_context(
                DatasetSnapshots((self.folder / "objects").as_uri(), dataset_roots=self.settings().dataset_roots)
            )
            activities = all_activities(
                comfyui, credits, snapshots, self.store, self.policy_of, self.client, lambda _tenant_id: self.limits
            )
            own = {"task_queue": self.task_queue, "graceful_shutdown_timeout": timedelta(seconds=5), **self._cache()}
            worker = make_worker(
                self.client,
                self.settings().model_copy(update=version),
                activities,
                [*flows, *(each for each in WORKFLOWS if each not in FLOWS)],
                **{**own, **STICKY, **options},
            )
            yield await stack.enter_async_context(worker)


def task_id_of(handle: Handle) -> str:
    return handle.id.removeprefix(WORKFLOW_ID_PREFIX)


async def scheduled(handle: Handle, activity: str) -> list[float]:
    """When activities of this type were scheduled on the run's own clock, in seconds since its start."""
    began, at = None, []
    async for event in handle.fetch_history_events():
        now = event.event_time.ToDatetime()
        began = began or now
        if event.activity_task_scheduled_event_attributes.activity_type.name == activity:
            at.append((now - began).total_seconds())
    return at


async def sent(handle: Handle, activity: str) -> list[dict[str, Any]]:
    """The first argument of each visible activity of this type, as the run's history has it."""
    return [
        json.loads(event.activity_task_scheduled_event_attributes.input.payloads[0].data)
        async for event in handle.fetch_history_events()
        if event.activity_task_scheduled_event_attributes.activity_type.name == activity
    ]


async def answered(handle: Handle, activity: str) -> int:
    """How many calls of this type have an answer in the run's history."""
    events = [event async for event in handle.fetch_history_events()]
    names = {event.event_id: event.activity_task_scheduled_event_attributes.activity_type.name for event in events}
    ids = [event.activity_task_completed_event_attributes.scheduled_event_id for event in events]
    return sum(names.get(event_id) == activity for event_id in ids)


@asynccontextmanager
async def served_gateway(client: Client, store: TaskStore, objects: str, task_queue: str) -> AsyncIterator[str]:
    """The gateway on a free port; its base URL. `CALLERS` makes its callers' tokens."""
    callers = CallerTokens(SharedSecret(CALLERS.secret), issuer=CALLERS.issuer, audience=CALLERS.audience)
    access = Access(callers, StreamTokens(CALLERS.secret))
    app = create_app(
        temporal=client,
        store=store,
        lists=FileLists.at(objects),
        callback_secrets=[TEST_CALLBACK_SECRET],
        access=access,
        task_queue=task_queue,
        short_way=Settings(_env_file=None).short_way,
    )
    async with served_app(app) as port:
        yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def running_platform(
    environment: WorkflowEnvironment,
    store: TaskStore,
    folder: Path,
    *,
    speed: float = 480.0,
    gateway: bool = True,
    client: Client | None = None,
    credits_profile: CreditsProfile = CONTRACT,
    prices: PriceTable | None = None,
    task_queue: str | None = None,
) -> AsyncIterator[Platform]:
    """Everything but the worker, so that a scenario can start, stop and configure it.

    `client`: for a server of the scenario's own. `task_queue`: default one that no other scenario uses. `prices`: of
    tasks and of both services.
    """
    config = environment.client.service_client.config
    async with AsyncExitStack() as stack:
        if client is None and environment.supports_time_skipping:
            client = environment.client
        client = client or await Client.connect(config.target_host, plugins=[TasksPlugin()])
        simulators = await stack.enter_async_context(
            running_simulators(folder / "simulators", speed=speed, credits_profile=credits_profile, prices=prices)
        )
        platform = Platform(client, environment, simulators, store, folder, task_queue=task_queue or unique("queue"))
        # At such a pace three times what is announced is a hiccup of a busy machine, as the local stack knows too.
        platform.policy = {"deadline_factor": max(3.0, 0.3 * speed)} | ({"prices": prices} if prices else {})
        if gateway:
            platform.gateway_url = await stack.enter_async_context(
                served_gateway(client, store, (folder / "objects").as_uri(), platform.task_queue)
            )
        else:
            platform.gateway_url = "http://127.0.0.1:9"
        yield platform


__all__ = ["Handle", "Platform", "WorkflowUpdateFailedError", "running_platform"]
