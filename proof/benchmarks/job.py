"""The job that all contestants do: the calls' bodies, and the events that are stored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from comfyui_temporal.contracts.calls import CallFor, Post
from comfyui_temporal.contracts.comfyui import JobAccepted, JobCallback, JobRequest, JobStatus
from comfyui_temporal.contracts.credits import CommitRequest, EstimateRequest, HoldReply, PreDeductRequest
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskClaim, TaskState, TaskWrite
from comfyui_temporal.contracts.tasks import CreditsSummary, ImageTask, TaskStatus, input_sha256_of, workflow_id_of

RUN: Final = "run"
LIFE_SECONDS: Final = 3_600


def image_task(task_id: str) -> ImageTask:
    return ImageTask(
        task_id=task_id,
        tenant_id="tenant-demo",
        user_id="user-demo",
        template_id="text-to-image",
        prompt="a lighthouse at dusk, oil on canvas, by a patient painter",
    )


def call_for(task: ImageTask) -> CallFor:
    return CallFor(task_id=task.task_id, tenant_id=task.tenant_id, user_id=task.user_id, scene=task.scene)


def submit(task: ImageTask) -> Post[JobRequest]:
    given = task.model_dump(include={"task_id", "tenant_id", "user_id", "template_id", "prompt", "extras"})
    callback_url = f"http://127.0.0.1/callbacks/comfyui/{task.task_id}"
    body = JobRequest(**given, resolution=task.resolution, priority=task.priority, callback_url=callback_url)
    return Post[JobRequest](call_for=call_for(task), key=f"{task.task_id}:submit:1", body=body)


def estimate(task: ImageTask) -> Post[EstimateRequest]:
    named = {"tenant_id": task.tenant_id, "user_id": task.user_id, "template_id": task.template_id}
    body = EstimateRequest(**named, scene=task.scene, resolution=task.resolution, priority=task.priority)
    return Post[EstimateRequest](call_for=call_for(task), key=f"{task.task_id}:estimate:1", body=body)


def pre_deduct(task: ImageTask, cost: int) -> Post[PreDeductRequest]:
    named = task.model_dump(include={"task_id", "tenant_id", "user_id", "template_id"})
    body = PreDeductRequest(**named, scene=task.scene, estimated_cost=cost, expire_in=LIFE_SECONDS)
    return Post[PreDeductRequest](call_for=call_for(task), key=f"{task.task_id}:pre_deduct:1", body=body)


def commit(task: ImageTask, hold: HoldReply) -> Post[CommitRequest]:
    named = task.model_dump(include={"task_id", "tenant_id", "user_id", "template_id"})
    body = CommitRequest(**named, pre_deduct_id=hold.pre_deduct_id, actual_cost=hold.frozen_amount)
    return Post[CommitRequest](call_for=call_for(task), key=f"{task.task_id}:commit:1", body=body)


def claim(task: ImageTask, at: datetime) -> TaskClaim:
    given = task.model_dump(include={"task_id", "tenant_id", "user_id", "template_id", "priority", "resolution"})
    return TaskClaim(
        **given,
        scene=task.scene,
        workflow_id=workflow_id_of(task.task_id),
        first_execution_run_id=RUN,
        input_sha256=input_sha256_of(task),
        at=at,
    )


class Story:
    """The events of one job, as our own workflow writes them, write by write."""

    def __init__(self, task: ImageTask, job: JobAccepted) -> None:
        self._task_id = task.task_id
        self._job = job
        self._version = 0
        self._credits = CreditsSummary(estimated=job.estimated_cost)

    def held(self, hold: HoldReply, at: datetime) -> TaskWrite:
        amount = hold.frozen_amount
        self._credits = CreditsSummary(estimated=amount, held=amount, pre_deduct_ids=[hold.pre_deduct_id])
        fact = self._fact("held:1", EventType.CREDITS, at, TaskStatus.QUEUED, stage="queued", credits_delta=-amount)
        return self._write(TaskStatus.QUEUED, fact)

    def reported(self, callback: JobCallback, at: datetime) -> TaskWrite:
        stage, status = callback.job_status.value, TaskStatus.RUNNING
        if callback.job_status is JobStatus.QUEUED:
            status = TaskStatus.QUEUED
        shown = {"stage": stage, "progress": callback.stage_progress}
        named = {"job_id": callback.job_id, "sequence": callback.sequence}
        fact = self._fact(f"{callback.job_id}:{callback.sequence}", EventType.RUNNING, at, status, **shown, **named)
        return self._write(status, fact, **shown)

    def ended(self, callback: JobCallback, at: datetime) -> TaskWrite:
        held = self._credits.held
        self._credits = self._credits.model_copy(update={"charged": held})
        shown = {"stage": callback.job_status.value, "progress": callback.stage_progress}
        done, urls = TaskStatus.COMPLETED, callback.result_urls
        settled = self._fact("settled", EventType.CREDITS, at, TaskStatus.RUNNING, credits_delta=0, **shown)
        end = self._fact("end", EventType.COMPLETED, at, done, result_urls=urls, is_end=True, **shown)
        return self._write(done, settled, end, result_urls=urls, **shown)

    def _fact(self, key: str, event: EventType, at: datetime, status: TaskStatus, **given: Any) -> Fact:
        return Fact(key=key, event=event, ts=at, attempt=1, status=status, **given)

    def _write(self, status: TaskStatus, *facts: Fact, **given: Any) -> TaskWrite:
        self._version += 1
        shown = {"job_id": self._job.job_id, "attempts": 1, "gpu_slots": self._job.gpu_slots, "credits": self._credits}
        state = TaskState(version=self._version, status=status, **shown, **given)
        return TaskWrite(task_id=self._task_id, first_execution_run_id=RUN, state=state, facts=list(facts))
