"""The stand-in as a process that can be killed, frozen and started again on the same port and folder."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Final, Self

import httpx

from local_stack.ports import any_free_port
from tests.bridge.native.admin import NativeAdmin
from tests.bridge.native.traps import Traps

START_LIMIT_SECONDS: Final = 20.0


class NativeServer:
    """One server. Its files are in `folder` and survive it; queue and history do not, as in ComfyUI."""

    def __init__(self, folder: Path, *, port: int | None = None, **traps: object) -> None:
        self.folder = folder
        self.port = port or any_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin = NativeAdmin(self.url)
        self._traps = Traps.model_validate(traps)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self.admin.close()

    async def start(self, *, starts_after: float = 0.0, wait: bool = True) -> None:
        """Return when it answers, or at once with `wait=False`. It starts with the traps of the constructor."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.bridge.native",
            f"--port={self.port}",
            f"--folder={self.folder}",
            f"--traps={self._traps.model_dump_json()}",
            f"--starts-after={starts_after}",
        )
        if wait:
            await self.answers()

    async def answers(self) -> None:
        """Wait until it answers. Raises RuntimeError if the process has ended, TimeoutError after 20 s."""
        ends = time.monotonic() + START_LIMIT_SECONDS
        async with httpx.AsyncClient(timeout=1.0) as http:
            while True:
                if self._process is None or self._process.returncode is not None:
                    raise RuntimeError("the stand-in ended while it was starting")
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(f"{self.url}/admin/traps")).is_success:
                        return
                if time.monotonic() > ends:
                    raise TimeoutError(f"{self.url} did not answer")
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """SIGKILL, also while it is frozen."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()
        self._process = None

    async def restart(self) -> None:
        """Kill and start it. Queue, history, cache and counters are empty; files stay."""
        await self.kill()
        await self.start()

    def freeze(self) -> None:
        """SIGSTOP: the kernel accepts connections, but nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
