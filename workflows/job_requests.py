"""The bodies of row 1: a job's and a training's request (contract §2, §3)."""

from __future__ import annotations

from comfyui_temporal.contracts.comfyui import JobRequest, SnapshotReference, TrainingDraft
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.tasks import ImageTask, TrainingTask


def image_job(task: ImageTask, policy: Policy) -> JobRequest:
    return JobRequest(
        task_id=task.task_id,
        tenant_id=task.tenant_id,
        user_id=task.user_id,
        template_id=task.template_id,
        prompt=task.prompt,
        controls=[control.model_dump(mode="json") for control in task.controls],
        resolution=task.resolution,
        priority=task.priority,
        extras=task.extras,
        callback_url=policy.callback_url,
    )


def training_draft(
    task: TrainingTask, policy: Policy, *, dataset: SnapshotReference, resume_from: str | None
) -> TrainingDraft:
    """A training's request, with the address of its file list. The call reads the list and sends it whole."""
    return TrainingDraft(
        task_id=task.task_id,
        tenant_id=task.tenant_id,
        user_id=task.user_id,
        base_model=task.base_model,
        dataset=dataset,
        hyperparameters=task.hyperparameters.model_dump(mode="json"),
        priority=task.priority,
        gpu_type=task.gpu_type,
        resume_from=resume_from or task.resume_from,
        callback_url=policy.callback_url,
    )
