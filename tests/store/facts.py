"""Claims, facts and writes for tests, with what a test does not care about filled in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskClaim, TaskState, TaskWrite
from comfyui_temporal.contracts.tasks import TaskStatus, workflow_id_of
from tests.conftest import unique

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def claim_of(task_id: str, run_id: str = "run-1", **fields: Any) -> TaskClaim:
    given = {
        "tenant_id": "tenant-a",
        "user_id": "user-a",
        "scene": Scene.IMAGE_GENERATE,
        "template_id": "test-pattern",
        "priority": TaskPriority.STANDARD,
        "resolution": "hd",
        "input_sha256": "0" * 64,
        "at": NOON,
    }
    return TaskClaim(
        task_id=task_id,
        workflow_id=workflow_id_of(task_id),
        first_execution_run_id=run_id,
        **{**given, **fields},
    )


def fact(key: str, **fields: Any) -> Fact:
    given = {"event": EventType.RUNNING, "ts": NOON, "attempt": 1, "status": TaskStatus.RUNNING}
    return Fact(key=key, **{**given, **fields})


def end(**fields: Any) -> Fact:
    return fact("end", **{"event": EventType.COMPLETED, "status": TaskStatus.COMPLETED, "is_end": True, **fields})


def write_of(task_id: str, *facts: Fact, run_id: str = "run-1", version: int = 1, **state: Any) -> TaskWrite:
    given = {"status": TaskStatus.RUNNING}
    return TaskWrite(
        task_id=task_id,
        first_execution_run_id=run_id,
        state=TaskState(version=version, **{**given, **state}),
        facts=list(facts),
    )


def new_task_id() -> str:
    return unique("task")
