"""The bodies of row 1: a job's and a training's request (contract §2, §3)."""

from __future__ import annotations

from collections.abc import Sequence

from comfyui_temporal.contracts.comfyui import JobRequest, LoraFile, SnapshotReference, TrainingDraft
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.loras import no_such_model
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_store import TrainedModel
from comfyui_temporal.contracts.tasks import ImageTask, TrainingTask
from workflows.failures import TaskFailed


def lora_files(task: ImageTask, models: Sequence[TrainedModel]) -> list[LoraFile]:
    """The files of an image's LoRAs. `models`: those of its tenant. Raises TaskFailed `input_invalid` for any other."""
    of_tenant = {model.model_id: model for model in models}
    files: list[LoraFile] = []
    for number, lora in enumerate(task.loras):
        if lora.model_id is None:
            files.append(LoraFile(model_path=lora.model_url or "", sha256=lora.sha256, strength=lora.strength))
            continue
        model = of_tenant.get(lora.model_id)
        if model is None:
            raise TaskFailed(
                FailureCode.INPUT_INVALID,
                f"The input is not valid: loras.{number}.model_id: {no_such_model(lora.model_id)}.",
            )
        files.append(LoraFile(model_path=model.model_path, sha256=model.sha256, strength=lora.strength))
    return files


def image_job(task: ImageTask, policy: Policy, loras: Sequence[LoraFile]) -> JobRequest:
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
        loras=list(loras) or None,
        images=task.images if task.images > 1 else None,
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
