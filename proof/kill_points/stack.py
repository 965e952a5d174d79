"""The stack's processes, each ours to kill and to start again; nobody else watches over them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil

from comfyui_temporal.contracts.stack import StackDescription
from local_stack.child import Child, Part
from local_stack.description import describe
from local_stack.folder import RunFolder
from local_stack.parts import SETTINGS_PREFIX, STAGES, LocalParts
from local_stack.ports import PREFERRED, any_free_port
from proof.kill_points.gated_worker import FOLDER_VARIABLE
from proof.simulators.credits_profile import CONTRACT, CreditsProfile

SPEED: Final = 480.0
"""A standard image in a second, a training in about six."""
SIGNALS_UNTIL_CONTINUED: Final = 40
"""More than any task here gets of itself."""
SETTINGS: Final = {
    # Work runs 480 times as fast here and a restart does not.
    "DEADLINE_FACTOR": "1000",
    "IMAGE_POLL_AFTER_SECONDS": "3",
    "IMAGE_POLL_AT_MOST_SECONDS": "6",
    "TRAINING_POLL_AFTER_SECONDS": "3",
    "TRAINING_POLL_AT_MOST_SECONDS": "6",
    "RETRY_AFTER_SECONDS": "1.5,1.5,1.5",
    "RECONCILE_EVERY_SECONDS": "2",
    "RECONCILE_PAUSE_SECONDS": "1",
    "CONTINUE_AS_NEW_SIGNALS": str(SIGNALS_UNTIL_CONTINUED),
    # Each call that waits in a local try keeps one of these.
    "MAX_WORKFLOW_TASKS": "64",
    "MAX_LOCAL_ACTIVITIES": "300",
    "MAX_ACTIVITIES": "300",
    "GRACE_SECONDS": "10",
    "LOG_LEVEL": "WARNING",
}


class KillableStack:
    """One stack in a folder of its own, on free ports, with one of the two simulated credits services."""

    def __init__(self, folder: Path, profile: CreditsProfile = CONTRACT) -> None:
        self.folder = RunFolder(folder)
        self.profile = profile
        ports: dict[str, int] = {}
        for name in PREFERRED:
            ports[name] = any_free_port(set(ports.values()))
        self._parts = LocalParts(self.folder, ports, SPEED)
        self._children = {
            part.name: Child(self._gated(part), folder=self.folder.path, log=self.folder.log(part.name), said=_ignored)
            for part in self._parts.processes()
        }

    def _gated(self, part: Part) -> Part:
        given = {**SETTINGS, "SIMULATOR_CREDITS_PROFILE": self.profile.name}
        settings = {SETTINGS_PREFIX + name: value for name, value in given.items()}
        environment = {**part.environment, **settings, FOLDER_VARIABLE: str(self.folder.path)}
        command = [sys.executable, "-m", "proof.kill_points.gated_worker"] if part.name == "worker" else part.command
        return replace(part, environment=environment, command=command)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StackDescription]:
        """Raises StackFailure where a part does not get ready."""
        try:
            await self._parts.prepare()
            await asyncio.gather(*(self.start(name) for name in ("temporal", "postgres")))
            await self._parts.make_tables()
            await asyncio.gather(*(self.start(name) for name in ("credits", "comfyui", "gateway", "worker")))
            processes = {name: child.record for name, child in self._children.items()}
            known = {name: record for name, record in processes.items() if record is not None}
            yield describe(self._parts, self.folder.secrets(), known)
        finally:
            for stage in STAGES:
                await asyncio.gather(*(self._children[name].stop() for name in stage if name in self._children))

    async def start(self, name: str) -> None:
        """Returns when it is ready. Raises StackFailure."""
        child = self._children[name]
        await child.start()
        await child.ready()

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a part and, but for SIGTERM's grace, all below it; returns when they are gone."""
        record = self._children[name].record
        assert record is not None, f"{name} does not run: see {self.folder.log(name)}"
        process = psutil.Process(record.pid)
        below = process.children(recursive=True)
        process.send_signal(number)
        if number is signal.SIGKILL:
            for each in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        # The process itself is asyncio's to wait for.
        await asyncio.to_thread(psutil.wait_procs, below, 30)
        while self._children[name].record is not None:  # noqa: ASYNC110 - its end has to be noticed here too
            await asyncio.sleep(0.01)


def _ignored(line: str) -> None:
    """What a part says of itself stands in its log."""
