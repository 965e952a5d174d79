"""`python -m bridge.gpu_worker` in a process of its own that can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Final, Self

from temporalio.client import Client

from tests.bridge.platform import CALLBACK_SECRET, SECRET, BridgePlatform

_PREFIX: Final = "COMFYUI_TEMPORAL_"


class WorkerProcess:
    """A GPU worker for one server and one bridge."""

    def __init__(self, bridge: BridgePlatform, client: Client, server: str, templates: Path) -> None:
        settings = bridge.settings
        self._server = server
        self._environment = {name: given for name, given in os.environ.items() if not name.startswith(_PREFIX)} | {
            f"{_PREFIX}TEMPORAL_ADDRESS": client.service_client.config.target_host,
            f"{_PREFIX}BRIDGE_TASK_QUEUE": settings.bridge_task_queue,
            f"{_PREFIX}BRIDGE_STORE_URL": settings.bridge_store_url,
            f"{_PREFIX}BRIDGE_TEMPLATES": str(templates),
            f"{_PREFIX}SERVICE_SECRET": SECRET,
            f"{_PREFIX}CALLBACK_SECRETS": CALLBACK_SECRET,
        }
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end(signal.SIGKILL)

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bridge.gpu_worker", f"--server={self._server}", env=self._environment
        )

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait. Returns the exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        return await self._process.wait()
