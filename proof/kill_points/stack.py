"""A stack whose parts are children of this process: it kills them and starts them again."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from comfyui_temporal.contracts.stack import StackDescription
from local_stack.child import Part
from local_stack.description import describe
from local_stack.folder import RunFolder
from local_stack.parts import SETTINGS_PREFIX, LocalParts
from local_stack.ports import PREFERRED, any_free_port
from proof.kill_points.gated_worker import FOLDER_VARIABLE
from proof.kill_points.gates import Gates
from proof.simulators.credits_profile import CONTRACT, CreditsProfile
from proof.site.parts import OwnParts

SPEED: Final = 480.0
"""A standard image in a second, a training in about six."""
SIGNALS_UNTIL_CONTINUED: Final = 40
"""More than any task here gets otherwise."""
SETTINGS: Final = {
    # Work runs 480 times as fast here, but a restart does not.
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


class KillableStack(OwnParts):
    """One stack in a folder of its own, on free ports, with one of the two simulated credits services."""

    def __init__(self, folder: Path, profile: CreditsProfile = CONTRACT) -> None:
        self.folder = RunFolder(folder)
        self.profile = profile
        ports: dict[str, int] = {}
        for name in PREFERRED:
            ports[name] = any_free_port(set(ports.values()))
        self._parts = LocalParts(self.folder, ports, SPEED)
        super().__init__(self.folder, self._parts.processes(), change=self._gated)

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
            await self.start_servers(self._parts)
            self.gates = Gates(self.folder.path)
            await self.start("credits", "comfyui", "gateway", "worker")
            yield describe(self._parts, self.folder.secrets(), self.records())
        finally:
            await self.stop_all()
