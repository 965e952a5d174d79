"""The calls of each scene to ComfyUI, and how its messages are read: the table of scenes, bound to the activities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES, SceneSpec, State


@dataclass(frozen=True)
class JobRoutes:
    """The calls of one scene, and its messages read into one model for all scenes."""

    submit: Any
    get: Any
    cancel: Any
    spec: SceneSpec

    def update_from(self, body: dict[str, Any]) -> JobUpdate:
        """Raises pydantic.ValidationError where the body is no message of this scene."""
        return self.spec.update(self.spec.callback.model_validate(body))

    def update_from_state(self, state: State) -> JobUpdate:
        return self.spec.update(state)


def _routes_of(spec: SceneSpec) -> JobRoutes:
    names = (spec.submit, spec.get, spec.cancel)
    submit, get, cancel = (getattr(ComfyUIActivities, name) for name in names)
    return JobRoutes(submit=submit, get=get, cancel=cancel, spec=spec)


ROUTES: Final[Mapping[Scene, JobRoutes]] = {scene: _routes_of(spec) for scene, spec in SCENES.items()}
IMAGE_ROUTES: Final = ROUTES[Scene.IMAGE_GENERATE]
TRAINING_ROUTES: Final = ROUTES[Scene.MODEL_TRAIN]
