"""The bridge in one process over real connections: Temporal, HTTP, callbacks, GPU workers and stand-in servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
from pydantic import SecretStr
from temporalio.client import Client

from bridge.__main__ import Bridge
from bridge.calls import TAKE_SERVER, workflow_of
from bridge.gpu_worker import GpuWorker
from bridge.native import NativeServer as NativeClient
from bridge.probe import Probe
from bridge.prompt_run import Patience
from bridge.seen_server import SeenServer
from bridge.server import Server
from bridge.server_health import ServerHealth
from bridge.server_name import owner_of
from bridge.storage_health import StorageHealth
from bridge.template_library import SHIPPED, load_library
from bridge.templates import Template
from bridge.warm_up import WarmUpPace
from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.encryption import encryption_of
from comfyui_temporal.plugin import TasksPlugin
from proof.conformance.receiver import receiving
from proof.simulators.serving import ServedApp
from proof.simulators.tokens import Tokens
from runtime.settings import Settings
from tests.bridge.native import NativeServer
from tests.conftest import unique
from tests.simulators.platform import Receiver
from tests.waiting import until

T = TypeVar("T")
Json = dict[str, Any]
SECRET: Final = "the-bridge-in-tests-signs-with-this-one"
CALLBACK_SECRET: Final = "whsec_dGhlLWJyaWRnZS1pbi10ZXN0cy1zaWducy13aXRoLXRoaXM="
TENANT, USER = "tenant-demo", "user-demo"
QUICK: Final = Patience(poll=0.1, silent=2.0, dead=1.0, stalled=60.0, stalled_runs=0.0, look_again=0.3, stop=10.0)
"""The defaults, about thirty times faster."""
QUICK_WARM_UP: Final = WarmUpPace(look=0.1, poll=0.05, within=30.0, stop=15.0)
QUICK_PROBE: Final = Probe(within_seconds=2.0, poll_seconds=0.05)


@dataclass
class BridgePlatform:
    """One bridge on task queues of its own. Tests send HTTP requests as any client would."""

    client: Client
    settings: Settings
    bridge: Bridge
    url: str
    receiver: Receiver
    http: httpx.AsyncClient
    folder: Path
    working: AsyncExitStack = field(default_factory=AsyncExitStack)
    templates: list[Template] = field(default_factory=lambda: list(load_library(SHIPPED)))
    tokens: Tokens = field(default_factory=lambda: Tokens(SECRET, "comfyui-temporal", "comfyui-services"))

    # Requests

    def headers(
        self, key: str | None = None, *, tenant: str = TENANT, user: str = USER, scopes: Any = tuple(Scope)
    ) -> dict[str, str]:
        token = self.tokens.made_for(tenant, user, scopes)
        return {"Authorization": f"Bearer {token}"} | ({"X-Idempotency-Key": key} if key else {})

    def job_body(self, **fields: Any) -> Json:
        task_id = fields.pop("task_id", None) or unique("task")
        return {
            "task_id": task_id,
            "tenant_id": TENANT,
            "user_id": USER,
            "template_id": "test-pattern",
            "prompt": "a lighthouse at dusk",
            "controls": [],
            "resolution": "sd",
            "priority": "standard",
            "extras": {},
            "callback_url": f"{self.receiver.url}/callbacks/comfyui/{task_id}",
            **fields,
        }

    async def post(self, path: str, body: Json, *, key: str | None = None, **who: Any) -> httpx.Response:
        key = key or unique("key")
        return await self.http.post(f"{self.url}/comfyui/v1{path}", json=body, headers=self.headers(key, **who))

    async def get(self, path: str, **who: Any) -> httpx.Response:
        return await self.http.get(f"{self.url}/comfyui/v1{path}", headers=self.headers(**who))

    async def submit(self, **fields: Any) -> Json:
        """Submit a job; the body of its 202, with the task id."""
        body = self.job_body(**fields)
        answer = await self.post("/jobs", body, tenant=body["tenant_id"], user=body["user_id"])
        assert answer.status_code == 202, answer.text
        accepted: Json = answer.json()
        return accepted | {"task_id": body["task_id"]}

    async def job(self, job_id: str, **who: Any) -> Json:
        answer = await self.get(f"/jobs/{job_id}", **who)
        assert answer.status_code == 200, answer.text
        state: Json = answer.json()
        return state

    async def cancel(self, job_id: str, **who: Any) -> Json:
        answer = await self.post(f"/jobs/{job_id}/cancel", {}, **who)
        assert answer.status_code == 200, answer.text
        state: Json = answer.json()
        return state

    # Waiting on conditions

    async def until(self, condition: Callable[[], Awaitable[T]], *, seconds: float = 20.0) -> T:
        return await until(condition, within_seconds=seconds)

    async def ended(self, job_id: str, *, seconds: float = 30.0, **who: Any) -> Json:
        """Wait until the job is over; its state."""

        async def over() -> Json | None:
            state = await self.job(job_id, **who)
            is_over = state["error_details"] is not None or state["job_status"] == "delivery"
            return state if is_over else None

        state = await self.until(over, seconds=seconds)
        assert state is not None
        return state

    async def in_status(self, job_id: str, status: str) -> Json:
        async def reached() -> Json | None:
            state = await self.job(job_id)
            return state if state["job_status"] == status else None

        state = await self.until(reached)
        assert state is not None
        return state

    async def is_waiting(self, job: Json) -> bool:
        """Whether this job waits for a server."""
        described = await self.client.get_workflow_handle(workflow_of(job["job_id"])).describe()
        return any(
            pending.activity_type.name == TAKE_SERVER for pending in described.raw_description.pending_activities
        )

    # Workers

    async def start_worker(self) -> None:
        """Start the worker of the bridge's own queue."""
        await self.working.enter_async_context(self.bridge.worker())

    async def stop_worker(self) -> None:
        """Stop that worker: what arrives until the next start is handled in one workflow task."""
        await self.working.aclose()

    @asynccontextmanager
    async def gpu(
        self,
        native: NativeServer,
        *,
        name: str | None = None,
        gpu_type: str = "rtx-4090",
        patience: Patience = QUICK,
        grace_seconds: float = 5.0,
        taken_seconds: float = 2.0,
        warm_up: Sequence[str] = (),
        warm_up_pace: WarmUpPace = QUICK_WARM_UP,
    ) -> AsyncIterator[GpuWorker]:
        """A GPU worker for this stand-in, in this process."""
        async with (
            NativeClient(native.url, read_seconds=1.0) as server,
            self.gpu_of(
                server,
                name=name,
                gpu_type=gpu_type,
                patience=patience,
                grace_seconds=grace_seconds,
                taken_seconds=taken_seconds,
                warm_up=warm_up,
                warm_up_pace=warm_up_pace,
            ) as worker,
        ):
            yield worker

    @asynccontextmanager
    async def gpu_of(
        self,
        server: Server,
        *,
        name: str | None = None,
        gpu_type: str = "rtx-4090",
        patience: Patience = QUICK,
        grace_seconds: float = 5.0,
        taken_seconds: float = 2.0,
        warm_up: Sequence[str] = (),
        warm_up_pace: WarmUpPace = QUICK_WARM_UP,
    ) -> AsyncIterator[GpuWorker]:
        """A GPU worker for any kind of server, in this process."""
        seen = SeenServer(name or unique("gpu"), "default", gpu_type, owner_of(server.url))
        # A connection polls a queue only once per process. In production each worker is a process of its own.
        client = await Client.connect(
            self.client.service_client.config.target_host, plugins=[TasksPlugin(encryption_of(self.client))]
        )
        worker = GpuWorker(
            client,
            server,
            seen,
            self.bridge.storage,
            self.bridge.sender,
            templates=self.templates,
            bridge_queue=self.settings.bridge_task_queue,
            patience=patience,
            taken_seconds=taken_seconds,
            linger_seconds=0.5,
            health=ServerHealth(server, probe=QUICK_PROBE, first_pause_seconds=0.2),
            storage_health=StorageHealth(self.bridge.storage, seen.name, probe_seconds=0.2),
            warm_up=warm_up,
            warm_up_pace=warm_up_pace,
        )
        async with worker.running(grace_seconds=grace_seconds):
            yield worker


@asynccontextmanager
async def running_bridge(client: Client, folder: Path, **settings: Any) -> AsyncIterator[BridgePlatform]:
    """A bridge that serves on a free port while the body runs."""
    async with receiving(Receiver(CALLBACK_SECRET)) as receiver, httpx.AsyncClient(timeout=10) as http:
        kept_at = {"bridge_store_url": (folder / "objects").as_uri(), **settings}
        chosen = Settings(
            _env_file=None,
            service_secret=SecretStr(SECRET),
            callback_secrets=CALLBACK_SECRET,
            callback_base_url=receiver.url,
            bridge_task_queue=unique("bridge"),
            object_store_url=(folder / "store").as_uri(),
            bridge_image_roots=[(folder / "images").as_uri() + "/{tenant_id}/"],
            uploads_url=(folder / "uploads").as_uri(),
            **kept_at,
        )
        bridge = Bridge(chosen, client)
        served = ServedApp(bridge.app)
        platform = BridgePlatform(client, chosen, bridge, "", receiver, http, folder)
        async with bridge.sender, platform.working:
            await platform.start_worker()
            await served.start()
            platform.url = served.url
            bridge.signed.base_url = served.url
            try:
                yield platform
            finally:
                await served.stop()
