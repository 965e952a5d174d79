"""The table of scenes: it is complete, names what exists, and is asked by all code that depends on the scene."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import BaseModel

import worker
from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts import scenes
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES, SceneSpec
from runtime.settings import Settings

ROOT = Path(__file__).parent.parent
ROOMS = ("comfyui_temporal", "workflows", "activities", "store", "gateway", "runtime")
OWN = {"contracts/scenes.py", "contracts/comfyui.py"}
"""The table itself, and the wire of ComfyUI, which it is made of."""
OF_A_SCENE = {
    name
    for spec in SCENES.values()
    for model in (spec.task, spec.run, spec.result, spec.request, spec.accepted, *spec.callback.__mro__[:2])
    for name in [model.__name__]
}
MAY_ASK = {
    ("gateway/tasks.py", "TrainingOrder"): "a long list of files, which only this order has",
    ("gateway/callbacks.py", "TrainingCallback"): "a training's log, which only this callback has",
    ("workflows/image_generation.py", "JobAccepted"): "its own scene's flow",
    ("workflows/training.py", "TrainingAccepted"): "its own scene's flow",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not any(name.endswith(own) for own in OWN):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def questions_in(module: ast.Module) -> Iterator[str]:
    """What a module compares with a scene, or asks a value to be an instance of."""
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            yield from (part.attr for part in ast.walk(node) if _is_scene(part) and isinstance(part, ast.Attribute))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            yield from (part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name))
        if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
            yield node.cls.id


def _is_scene(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Scene"


def test_nothing_asks_which_scene_a_task_is_of_but_the_table() -> None:
    """A third scene would be forgotten there."""
    kinds = OF_A_SCENE | {scene.name for scene in Scene} | {"ImageOrder", "TrainingOrder"}
    asked = {(name, asked) for name, module in modules() for asked in questions_in(module) if asked in kinds}
    assert asked - set(MAY_ASK) == set()
    assert set(MAY_ASK) <= asked, "an exemption that nothing needs"


def test_every_scene_has_a_row_of_its_own() -> None:
    assert set(SCENES) == set(Scene)
    assert all(spec.scene is scene for scene, spec in SCENES.items())
    for name in ("noun", "workflow", "collection", "submit", "get", "cancel", "job_id_field", "callback"):
        assert len({getattr(spec, name) for spec in SCENES.values()}) == len(SCENES), name


@pytest.mark.parametrize("spec", SCENES.values(), ids=lambda spec: spec.noun)
def test_a_row_names_what_exists(spec: SceneSpec) -> None:
    assert spec.workflow in {workflow.__temporal_workflow_definition.name for workflow in worker.WORKFLOWS}  # type: ignore[union-attr]
    submit = get_type_hints(getattr(ComfyUIActivities, spec.submit))
    assert submit["post"] == _of(Post, spec.request)
    assert submit["return"] == _of(Answer, spec.accepted)
    for call in (spec.get, spec.cancel):
        assert "call" in get_type_hints(getattr(ComfyUIActivities, call))
    assert spec.job_id_field in spec.callback.model_fields and spec.job_id_field in spec.result.model_fields
    task: Any = spec.task
    assert task.model_construct().scene is spec.scene


def _of(generic: object, parameter: type[BaseModel]) -> object:
    return generic[parameter]  # type: ignore[index]


@pytest.mark.parametrize("spec", SCENES.values(), ids=lambda spec: spec.noun)
def test_a_setting_of_a_scene_goes_before_the_table(spec: SceneSpec) -> None:
    settings = Settings(_env_file=None, **{f"{spec.noun}_cap_minutes": 7.0})  # type: ignore[arg-type]
    policy = settings.policy(scene=spec.scene, task_id="t", tenant_id="t", priority="standard")
    assert (policy.cap_minutes, policy.poll_after_seconds) == (7.0, spec.poll_after_seconds)


def test_a_training_that_names_a_job_too_is_a_training() -> None:
    assert scenes.scene_of_message({"job_id": None, "training_id": "training-1"}) is SCENES[Scene.MODEL_TRAIN]
    assert scenes.scene_of_message({"job_id": "job-1"}) is SCENES[Scene.IMAGE_GENERATE]
    assert scenes.scene_of_message({}) is None
