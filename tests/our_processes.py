"""Our own processes, as an operator starts them, on loopback: their settings come from the environment alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from local_stack.folder import PROJECT
from local_stack.ports import any_free_port

PREFIX: Final = "COMFYUI_TEMPORAL_"
SERVICE_SECRET: Final = "services-in-these-tests-know-this-one"
CALLER_SECRET: Final = "callers-in-these-tests-know-this-one"
CALLBACK_SECRET: Final = "whsec_dGhlc2UtdGVzdHMtc2lnbi1jYWxsYmFja3Mtd2l0aC10aGlz"
END_SECONDS: Final = 20.0


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process: none of the shell's own settings, these instead. A name in capitals with a prefix
    of its own (`OTEL_…`) stays as it is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "TEMPORAL_", "OTEL_"))}
    given = {name if name.startswith("OTEL_") else PREFIX + name: value for name, value in settings.items()}
    return {**kept, "PYTHONPATH": str(PROJECT), "TEMPORAL_CONFIG_FILE": os.devnull, **given}


@asynccontextmanager
async def process(
    arguments: list[str], settings: Mapping[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python ARGUMENTS` in a folder without `.env`; told to end afterwards, and killed if it does not."""
    with log.open("ab") as written:
        started = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments), env=environment_of(settings), cwd=log.parent, stdout=written, stderr=written
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(started.wait(), END_SECONDS)
        if started.returncode is None:
            started.kill()
            await started.wait()


@dataclass
class Stack:
    """Worker, gateway, bridge and a GPU worker; each with every page that it has, on a port of its own."""

    folder: Path
    settings: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)

    def url(self, part: str) -> str:
        """Of `gateway`, `bridge`, `worker-health`, `worker-metrics`, …"""
        return f"http://127.0.0.1:{self.ports[part]}"

    def log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @asynccontextmanager
    async def running(
        self, gpu_server: str | None, *names: str
    ) -> AsyncIterator[dict[str, asyncio.subprocess.Process]]:
        """These processes (default: all), by name."""
        commands = {
            "worker": [str(PROJECT / "worker.py")],
            "gateway": ["-m", "gateway"],
            "bridge": ["-m", "bridge"],
            "gpu-worker": ["-m", "bridge.gpu_worker", "--server", gpu_server or "http://127.0.0.1:9"],
        }
        async with AsyncExitStack() as opened:
            yield {
                name: await opened.enter_async_context(process(commands[name], self.settings, self.log_of(name)))
                for name in names or commands
            }


def new_stack(folder: Path, *, temporal: str, dsn: str, queue: str, **more: str) -> Stack:
    """`more` settings override these. ComfyUI is the bridge, unless `COMFYUI_URL` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ("gateway", "bridge", "worker-health", "worker-metrics", "bridge-metrics", "gpu-health", "gpu-metrics")
    ports = {part: any_free_port() for part in parts}
    settings = {
        "TEMPORAL_ADDRESS": temporal,
        "TEMPORAL_NAMESPACE": "default",
        "DATABASE_DSN": dsn,
        "TASK_QUEUE": queue,
        "BRIDGE_TASK_QUEUE": f"{queue}-bridge",
        "SERVICE_SECRET": SERVICE_SECRET,
        "CALLER_SECRET": CALLER_SECRET,
        "CALLBACK_SECRETS": CALLBACK_SECRET,
        "GATEWAY_PORT": str(ports["gateway"]),
        "CALLBACK_BASE_URL": f"http://127.0.0.1:{ports['gateway']}",
        "BRIDGE_PORT": str(ports["bridge"]),
        "COMFYUI_URL": f"http://127.0.0.1:{ports['bridge']}",
        "HEALTH_PORT": str(ports["worker-health"]),
        "METRICS_PORT": str(ports["worker-metrics"]),
        "BRIDGE_METRICS_PORT": str(ports["bridge-metrics"]),
        "GPU_HEALTH_PORT": str(ports["gpu-health"]),
        "GPU_METRICS_PORT": str(ports["gpu-metrics"]),
        "OBJECT_STORE_URL": (folder / "objects").as_uri(),
        "BRIDGE_STORE_URL": (folder / "bridge").as_uri(),
        "GRACE_SECONDS": "2",
        "GPU_GRACE_SECONDS": "2",
        **more,
    }
    return Stack(folder, settings, ports)
