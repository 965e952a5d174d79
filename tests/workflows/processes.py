"""A worker as a process of its own, so that it can be killed as a machine would kill it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from local_stack.ports import any_free_port
from proof.simulators.serving import TEST_TOKEN_SECRET
from tests.workflows.platform import Platform

PROJECT = Path(__file__).parents[2]
READY_SECONDS = 20.0


class WorkerProcess:
    """`python worker.py` on a platform's task queue."""

    def __init__(self, platform: Platform, address: str, database_dsn: str) -> None:
        self._log = platform.folder / "worker.log"
        self._health_port = any_free_port()
        settings = {
            "TEMPORAL_ADDRESS": address,
            "TASK_QUEUE": platform.task_queue,
            "COMFYUI_URL": platform.simulators.comfyui_url,
            "CREDITS_URL": platform.simulators.credits_url,
            "SERVICE_SECRET": TEST_TOKEN_SECRET,
            "CALLBACK_BASE_URL": platform.gateway_url,
            "DATABASE_DSN": database_dsn,
            "OBJECT_STORE_URL": (platform.folder / "objects").as_uri(),
            "DATASET_ROOTS": f"{(platform.folder / 'datasets').as_uri()}/{{tenant_id}}/",
            "HEALTH_PORT": str(self._health_port),
            "GRACE_SECONDS": "10",
            # Work runs 480 times as fast here and a restart does not: a deadline of three times the ETA is too near.
            "DEADLINE_FACTOR": "100",
        }
        self._environment = {**os.environ, **{f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when it polls."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "worker.py", cwd=PROJECT, env=self._environment, stdout=log, stderr=log
            )
        async with asyncio.timeout(READY_SECONDS):
            while not await self._is_ready():
                assert self._process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def terminate(self) -> int:
        """SIGTERM; its exit code once it has drained."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return 0
        process.send_signal(number)
        async with asyncio.timeout(READY_SECONDS):
            return await process.wait()

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._health_port)
        except OSError:
            return False
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await reader.read(64)
        writer.close()
        return b" 200 " in answer
