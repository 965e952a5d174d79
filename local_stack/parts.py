"""The parts of the stack: the command and settings of each, what it needs, and when it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from temporalio.client import Client

from comfyui_temporal.contracts.tasks import TASK_QUEUE
from local_stack.child import Part
from local_stack.folder import PROJECT, RunFolder, StackFailure
from local_stack.own_services import COMFYUI_URL, CREDITS_URL, DATABASE_SETTING, own_url, tokens_of_own_services
from local_stack.own_services import TASK_QUEUE as TASK_QUEUE_SETTING
from local_stack.pace import paced_settings
from local_stack.ports import LOOPBACK
from local_stack.postgres import LocalPostgres
from local_stack.temporal_server import NAMESPACE, LocalTemporal
from proof.simulators.credits_profile import CONTRACT
from runtime.settings import SECRETS
from store import StoreUnavailable, TaskStore
from store.namespace_check import home_of

SETTINGS_PREFIX: Final = "COMFYUI_TEMPORAL_"
PROFILE_SETTING: Final = SETTINGS_PREFIX + "SIMULATOR_CREDITS_PROFILE"
DEFAULT_PROFILE: Final = CONTRACT.name
TABLES: Final = "tables"
"""The need of parts that use the task store's tables."""
NEVER_INHERITED: Final = frozenset(
    {
        *("SERVICE_TOKEN", "TEMPORAL_PROFILE", "SERVICE_ISSUER", "SERVICE_AUDIENCE"),
        *("JWKS_URL", "CALLER_ISSUER", "CALLER_AUDIENCE", "STREAM_TOKEN_SECRET", "GATEWAY_PUBLIC_URL"),
    }
)
"""A real platform's settings in the user's shell must not reach the simulators."""
SECRETS_OF: Final[dict[str, frozenset[str]]] = {
    "tables": frozenset({"DATABASE_DSN"}),
    "worker": frozenset({"DATABASE_DSN", "SERVICE_SECRET", "SERVICE_TOKEN", "ENCRYPTION_KEYS"}),
    "gateway": frozenset(
        {"DATABASE_DSN", "CALLER_SECRET", "STREAM_TOKEN_SECRET", "CALLBACK_SECRETS", "ENCRYPTION_KEYS"}
    ),
    "bridge": frozenset({"SERVICE_SECRET", "BRIDGE_RESULT_SECRET", "CALLBACK_SECRETS", "ENCRYPTION_KEYS"}),
    "gpu-worker": frozenset(
        {"CALLBACK_SECRETS", "ENCRYPTION_KEYS", "GPU_SERVER_TOKEN", "GPU_SERVER_LOGIN", "GPU_SERVER_HEADERS"}
    ),
    "comfyui-simulator": frozenset({"SERVICE_SECRET", "CALLBACK_SECRETS", "SIMULATOR_ADMIN_TOKEN"}),
    "credits-simulator": frozenset({"SERVICE_SECRET", "SIMULATOR_ADMIN_TOKEN"}),
    "codec-server": frozenset({"CODEC_SERVER_TOKEN", "ENCRYPTION_KEYS"}),
}
"""Program → the secrets that it reads. No other reaches its process, here or in docker-compose.yml."""
GRACE_SECONDS: Final = 5.0
"""The worker's grace here: longer than the simulators take to answer, shorter than a user waits for `make down`."""
LOOK_SECONDS: Final = 1.0
SERVER_ERROR: Final = 500
STAGES: Final = (("worker",), ("gateway", "comfyui", "gpu", "credits"), ("temporal", "postgres"))
"""The order of ending: callers end before the parts that they call. `gpu` means all of `gpu-1`, `gpu-2`, …"""


class LocalParts:
    """Every part of one stack, on its ports and in its folder. Raises StackFailure if a program is missing."""

    def __init__(self, folder: RunFolder, ports: dict[str, int], speed: float, comfyui: Sequence[str] = ()) -> None:
        """`comfyui`: real servers, reached through the bridge, instead of the simulated one."""
        self._folder = folder
        self._comfyui = comfyui
        self._ports = ports
        self._sealed = sealed_environment()
        self.temporal = LocalTemporal(
            folder, port=ports["temporal"], ui_port=ports["temporal_ui"], environment=self._sealed
        )
        self.postgres: LocalPostgres | None = None
        self.database_dsn = os.environ.get(DATABASE_SETTING, "")
        if not self.database_dsn:
            self.postgres = LocalPostgres(folder, ports["postgres"], self._sealed)
            self.database_dsn = self.postgres.dsn
        self.owner_dsn = self.postgres.owner_dsn if self.postgres else self.database_dsn
        """Of the user that owns the tables; the services' own may not change them."""
        self.credits_url = own_url(CREDITS_URL) or self.url("credits")
        self.comfyui_url = (own_url(COMFYUI_URL) if not comfyui else None) or self.url("comfyui")
        self.task_queue = os.environ.get(TASK_QUEUE_SETTING) or TASK_QUEUE
        self._all_settings = self._settings(speed)

    def url(self, part: str) -> str:
        return f"http://{LOOPBACK}:{self._ports[part]}"

    async def prepare(self) -> None:
        """What must be done before anything runs. Raises StackFailure."""
        if self.postgres is not None:
            await self.postgres.prepare()

    def processes(self) -> list[Part]:
        return [
            self.temporal.part(),
            *([self.postgres.part()] if self.postgres is not None else []),
            *self._credits_parts(),
            *self._comfyui_parts(),
            # On older tables both refuse to start.
            self._ours("gateway", "gateway", ["-m", "gateway"], needs=(TABLES,)),
            self._ours("worker", "worker", [str(PROJECT / "worker.py")], needs=("temporal", TABLES), page="/readyz"),
        ]

    def _credits_parts(self) -> list[Part]:
        """The simulator; nothing if the user's own service is used."""
        if self.credits_url != self.url("credits"):
            return []
        return [self._ours("credits", "credits-simulator", ["-m", "proof.simulators", "credits"])]

    def _comfyui_parts(self) -> list[Part]:
        """The simulator; or the bridge, and a GPU worker for each real server; nothing for a service of the user's."""
        if self.comfyui_url != self.url("comfyui"):
            return []
        if not self._comfyui:
            return [self._ours("comfyui", "comfyui-simulator", ["-m", "proof.simulators", "comfyui"])]
        workers = [
            Part(
                name=f"gpu-{number}",
                command=[sys.executable, "-m", "bridge.gpu_worker", "--server", server],
                environment=self._environment_of("gpu-worker"),
                is_ready=serves(server),
                needs=("temporal",),
                stop_within_seconds=GRACE_SECONDS + 10,
            )
            for number, server in enumerate(self._comfyui, 1)
        ]
        return [self._ours("comfyui", "bridge", ["-m", "bridge"], needs=("temporal",)), *workers]

    async def make_tables(self) -> None:
        """Migrate the task store's tables, once PostgreSQL is ready; one's own PostgreSQL: once Temporal is.

        Raises StackFailure, also for a store of the user's own that belongs to another Temporal: it stays as it is.
        """
        if self.postgres is None:
            await self._refuse_strange_store()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "store", "migrate"),
            env={**self._environment_of("tables"), DATABASE_SETTING: self.owner_dsn},
            cwd=self._folder.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise StackFailure(f"The task store's tables could not be made: {output.decode(errors='replace').strip()}")

    async def _refuse_strange_store(self) -> None:
        try:
            store = TaskStore(self.database_dsn, pool_size=1)
        except ValueError as error:
            raise StackFailure(str(error)) from None
        try:
            home = await store.home()
            ours = await home_of(await Client.connect(self.temporal.address, namespace=NAMESPACE))
        except StoreUnavailable:
            # It has no tables yet; or it is away, and the migration says so.
            return
        finally:
            await store.close()
        if home is not None and not home.is_same(ours):
            raise StackFailure(
                f"The task store at {store.address} ({DATABASE_SETTING}) belongs to Temporal namespace {home}, and the "
                f"local stack has a Temporal of its own, {ours}: nothing was changed in it. Unset {DATABASE_SETTING}, "
                "or name an empty database."
            )

    def _environment_of(self, program: str) -> dict[str, str]:
        """All settings, and of the secrets its own."""
        others = {SETTINGS_PREFIX + name.upper() for name in SECRETS} - {
            SETTINGS_PREFIX + name for name in SECRETS_OF[program]
        }
        return {**self._sealed, **{name: value for name, value in self._all_settings.items() if name not in others}}

    def _ours(
        self, name: str, program: str, arguments: list[str], *, needs: tuple[str, ...] = (), page: str = "/healthz"
    ) -> Part:
        return Part(
            name=name,
            command=[sys.executable, *arguments],
            environment=self._environment_of(program),
            is_ready=answers(self._ports[name], page),
            port=self._ports[name],
            needs=needs,
            stop_within_seconds=GRACE_SECONDS + 10,
        )

    def _settings(self, speed: float) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS_PREFIX)}
        for name in NEVER_INHERITED:
            inherited.pop(SETTINGS_PREFIX + name, None)
        paced = {SETTINGS_PREFIX + name: value for name, value in paced_settings(speed).items()}
        own = {SETTINGS_PREFIX + name: value for name, value in self._own_settings(speed).items()}
        return {**paced, **inherited, **own, **tokens_of_own_services()}

    def _own_settings(self, speed: float) -> dict[str, str]:
        secrets = self._folder.secrets()
        return {
            "TEMPORAL_ADDRESS": self.temporal.address,
            "TEMPORAL_NAMESPACE": NAMESPACE,
            "TASK_QUEUE": self.task_queue,
            "COMFYUI_URL": self.comfyui_url,
            "CREDITS_URL": self.credits_url,
            "CALLER_SECRET": secrets.caller_secret,
            "SERVICE_SECRET": secrets.service_secret,
            "CALLBACK_BASE_URL": self.url("gateway"),
            "CALLBACK_SECRETS": secrets.callback_secret,
            "GATEWAY_HOST": LOOPBACK,
            "GATEWAY_PORT": str(self._ports["gateway"]),
            "TEMPORAL_UI_URL": self.temporal.ui_url,
            "DATABASE_DSN": self.database_dsn,
            "OBJECT_STORE_URL": (self._folder.path / "objects").as_uri(),
            "UPLOADS_URL": (self._folder.path / "uploads").as_uri(),
            "DATASET_ROOTS": (self._folder.path / "datasets").as_uri() + "/{tenant_id}/",
            "GRACE_SECONDS": str(GRACE_SECONDS),
            "WORKER_HOST": LOOPBACK,
            "HEALTH_PORT": str(self._ports["worker"]),
            "SIMULATOR_HOST": LOOPBACK,
            "SIMULATOR_SPEED": str(speed),
            "SIMULATOR_FOLDER": str(self._folder.path / "simulators"),
            "SIMULATOR_ADMIN_TOKEN": secrets.admin_token,
            "BRIDGE_HOST": LOOPBACK,
            "BRIDGE_PORT": str(self._ports["comfyui"]),
            "BRIDGE_URL": self.url("comfyui"),
            "BRIDGE_STORE_URL": (self._folder.path / "bridge").as_uri(),
            "BRIDGE_IMAGE_ROOTS": (self._folder.path / "images").as_uri() + "/{tenant_id}/",
            "GPU_GRACE_SECONDS": str(GRACE_SECONDS),
            "COMFYUI_SIMULATOR_PORT": str(self._ports["comfyui"]),
            "CREDITS_SIMULATOR_PORT": str(self._ports["credits"]),
        }


def sealed_environment() -> dict[str, str]:
    """The user's environment without variables that would redirect a part: Temporal profiles, settings.

    A `.env` is not read either, because the parts run in `.run`.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TEMPORAL_", SETTINGS_PREFIX, "PYTHON", "PG"))
    }
    programs = Path(sys.executable).parent
    return {
        **kept,
        "PATH": f"{programs}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "PYTHONPATH": str(PROJECT),
        "PYTHONUNBUFFERED": "1",
        "TEMPORAL_CONFIG_FILE": os.devnull,
    }


def serves(server: str) -> Callable[[], Awaitable[bool]]:
    """Whether something answers at this address, with any status."""

    async def look() -> bool:
        parts = urlsplit(server)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                _, writer = await asyncio.open_connection(parts.hostname, port)
                writer.close()
                return True
        except (OSError, TimeoutError):
            return False

    return look


def answers(port: int, page: str) -> Callable[[], Awaitable[bool]]:
    """Whether a server on this port answers `page` without an error of its own."""

    async def look() -> bool:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                reader, writer = await asyncio.open_connection(LOOPBACK, port)
                try:
                    writer.write(f"GET {page} HTTP/1.1\r\nHost: {LOOPBACK}\r\nConnection: close\r\n\r\n".encode())
                    status = b"".join((await reader.readline()).split()[1:2])
                    return status.isdigit() and int(status) < SERVER_ERROR
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, TimeoutError):
            return False

    return look
