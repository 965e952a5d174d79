"""Tasks without a row: their run has not claimed its id yet, or was refused it and has ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from temporalio.client import Client
from temporalio.common import SearchAttributeKey

from comfyui_temporal.client.run_outcome import ended_as
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import TaskStatus, workflow_id_of
from comfyui_temporal.contracts.tasks_api import TaskView
from comfyui_temporal.runs import RunSeen
from gateway.temporal_calls import bounded, described


async def view_of_run(client: Client, task_id: str) -> TaskView | None:
    """The task by its newest run; None if there is none, or it is not one of ours. Raises Problem, RunMissing."""
    run = await described(client, workflow_id_of(task_id))
    view = None if run is None else _by_attributes(task_id, run)
    if run is None or view is None or not run.status.is_over:
        return view
    ended = await bounded(ended_as(client.get_workflow_handle(run.workflow_id, run_id=run.run_id)))
    error = ErrorDetails(code=ended["code"], message=ended["sentence"] or "") if "code" in ended else None
    return view.model_copy(update={"status": ended["status"], "error": error, "ended_at": run.close_time})


def _by_attributes(task_id: str, run: RunSeen) -> TaskView | None:
    """By the run's search attributes, which a run that is refused its id does not change any more."""

    def attribute(name: str) -> Any:
        return run.search_attributes.get(SearchAttributeKey.for_keyword(name))

    try:
        return TaskView(
            task_id=task_id,
            tenant_id=attribute("TenantId"),
            user_id=attribute("UserId"),
            scene=Scene(attribute("Scene")),
            template_id=attribute("TemplateId"),
            priority=TaskPriority(attribute("TaskPriority")),
            resolution="",
            workflow_id=run.workflow_id,
            status=TaskStatus(attribute("TaskStatus")),
            stage=attribute("TaskStage"),
            created_at=run.start_time,
            updated_at=datetime.now(UTC),
        )
    except ValueError:
        return None
