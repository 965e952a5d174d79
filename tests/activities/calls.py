"""Calls and clients that several tests here use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from activities.tokens import SignedTokens
from comfyui_temporal.contracts.calls import CallFor, JobCall, LedgerQuery, Post
from comfyui_temporal.contracts.comfyui import DatasetSnapshot, JobRequest, Resolution, TaskPriority, TrainingRequest
from comfyui_temporal.contracts.credits import (
    CancelHoldRequest,
    ChargeRequest,
    CommitRequest,
    EstimateRequest,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.permissions import Scene

SECRET: Final = "a-secret-for-tests-of-32-bytes-or-more"
PROMPT: Final = "a prompt that only ComfyUI may see"


def tokens() -> SignedTokens:
    return SignedTokens(SECRET, "comfyui-temporal", "comfyui-platform")


def call_for(*, scene: Scene = Scene.IMAGE_GENERATE, is_rollback: bool = False, task_id: str = "task-1") -> CallFor:
    return CallFor(task_id=task_id, tenant_id="tenant-demo", user_id="user-demo", scene=scene, is_rollback=is_rollback)


def job_post() -> Post[JobRequest]:
    request = JobRequest(
        task_id="task-1",
        tenant_id="tenant-demo",
        user_id="user-demo",
        template_id="text-to-image",
        prompt=PROMPT,
        resolution=Resolution.HD,
        priority=TaskPriority.STANDARD,
        extras={"seed": None},
        callback_url="http://127.0.0.1:1/callbacks/comfyui/task-1",
    )
    return Post(call_for=call_for(), key="task-1:submit:1", body=request)


def training_post() -> Post[TrainingRequest]:
    request = TrainingRequest(
        task_id="task-1",
        tenant_id="tenant-demo",
        user_id="user-demo",
        base_model="base",
        dataset=DatasetSnapshot(dataset_id="d", snapshot_uri="file:///snapshots/task-1/d/files/", files=[]),
        hyperparameters={"epochs": 1, "batch_size": 1, "learning_rate": 0.1},
        priority=TaskPriority.STANDARD,
        callback_url="http://127.0.0.1:1/callbacks/comfyui/task-1",
    )
    return Post(call_for=call_for(scene=Scene.MODEL_TRAIN), key="task-1:submit:1", body=request)


def job_call(job_id: str = "job-1", key: str | None = None) -> JobCall:
    return JobCall(call_for=call_for(), job_id=job_id, key=key)


def training_call(key: str | None = None) -> JobCall:
    return JobCall(call_for=call_for(scene=Scene.MODEL_TRAIN), job_id="training-1", key=key)


def estimate_post() -> Post[EstimateRequest]:
    request = EstimateRequest(
        tenant_id="tenant-demo",
        user_id="user-demo",
        template_id="text-to-image",
        scene=Scene.IMAGE_GENERATE,
        resolution="hd",
        priority=TaskPriority.STANDARD,
    )
    return Post(call_for=call_for(), key="task-1:estimate:1", body=request)


def pre_deduct_post(
    *, cost: int = 24, key: str = "task-1:pre-deduct:1", task_id: str = "task-1"
) -> Post[PreDeductRequest]:
    request = PreDeductRequest(
        task_id=task_id,
        template_id="text-to-image",
        tenant_id="tenant-demo",
        user_id="user-demo",
        scene=Scene.IMAGE_GENERATE,
        estimated_cost=cost,
        expire_in=600,
    )
    return Post(call_for=call_for(task_id=task_id), key=key, body=request)


def commit_post(pre_deduct_id: str = "hold-1", *, cost: int = 24, task_id: str = "task-1") -> Post[CommitRequest]:
    request = CommitRequest(
        pre_deduct_id=pre_deduct_id,
        actual_cost=cost,
        task_id=task_id,
        tenant_id="tenant-demo",
        template_id="text-to-image",
        user_id="user-demo",
    )
    return Post(call_for=call_for(task_id=task_id), key=f"{task_id}:commit:1", body=request)


def cancel_hold_post(pre_deduct_id: str = "hold-1", *, task_id: str = "task-1") -> Post[CancelHoldRequest]:
    request = CancelHoldRequest(
        pre_deduct_id=pre_deduct_id, tenant_id="tenant-demo", user_id="user-demo", reason="cancelled"
    )
    return Post(call_for=call_for(task_id=task_id), key=f"{task_id}:cancel-hold:1", body=request)


def charge_post() -> Post[ChargeRequest]:
    request = ChargeRequest(
        tenant_id="tenant-demo",
        user_id="user-demo",
        template_id="text-to-image",
        task_id="task-1",
        amount=24,
        priority=TaskPriority.STANDARD,
        reason="hold expired",
    )
    return Post(call_for=call_for(), key="task-1:charge:1", body=request)


Call = Callable[[], Awaitable[Answer[Any]]]


def every_call(comfyui: ComfyUIClient, credits_client: CreditsClient) -> dict[str, Call]:
    """Each route of contract §2, §3 and §4 that we call, by its method's name."""
    return {
        "submit_job": lambda: comfyui.submit_job(job_post()),
        "get_job": lambda: comfyui.get_job(job_call()),
        "cancel_job": lambda: comfyui.cancel_job(job_call(key="task-1:cancel:1")),
        "create_training": lambda: comfyui.create_training(training_post()),
        "start_training": lambda: comfyui.start_training(training_call("task-1:start:1")),
        "get_training": lambda: comfyui.get_training(training_call()),
        "cancel_training": lambda: comfyui.cancel_training(training_call("task-1:cancel:1")),
        "list_gpus": lambda: comfyui.list_gpus(call_for(scene=Scene.MODEL_TRAIN)),
        "list_templates": lambda: comfyui.list_templates(call_for()),
        "estimate": lambda: credits_client.estimate(estimate_post()),
        "pre_deduct": lambda: credits_client.pre_deduct(pre_deduct_post()),
        "commit": lambda: credits_client.commit(commit_post()),
        "cancel_hold": lambda: credits_client.cancel_hold(cancel_hold_post()),
        "charge": lambda: credits_client.charge(charge_post()),
        "balance": lambda: credits_client.balance(call_for()),
        "ledger": lambda: credits_client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1")),
    }
