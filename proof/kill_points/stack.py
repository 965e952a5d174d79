"""A stack for kill points: the worker has gates, and the limits fit the speed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from local_stack.child import Part
from proof.kill_points.gated_worker import FOLDER_VARIABLE
from proof.kill_points.gates import Gates
from proof.simulators.credits_profile import CONTRACT, CreditsProfile
from proof.site.parts import OwnStack

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


class KillableStack(OwnStack):
    """A stack with one of the two simulated credits services, whose worker has gates."""

    def __init__(self, folder: Path, profile: CreditsProfile = CONTRACT) -> None:
        self.profile = profile
        settings = {**SETTINGS, "SIMULATOR_CREDITS_PROFILE": profile.name}
        super().__init__(folder, speed=SPEED, settings=settings, change=self._gated)
        self.gates = Gates(self.folder.path)

    def _gated(self, part: Part) -> Part:
        environment = {**part.environment, FOLDER_VARIABLE: str(self.folder.path)}
        command = [sys.executable, "-m", "proof.kill_points.gated_worker"] if part.name == "worker" else part.command
        return replace(part, environment=environment, command=command)
