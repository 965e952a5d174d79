"""Image jobs: queued → processing → delivery (contract §2)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from comfyui_temporal.contracts.comfyui import JobRequest, JobStatus, Resolution, TaskPriority
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from proof.simulators.runs import Forecast, Run, Segment

IMAGE_POOL: Final = "rtx4090"
IMAGE_TEMPLATES: Final = ("text-to-image", "image-to-image", "upscale", "test-pattern")
QUEUED_SHARE: Final = 0.4
GPU_SLOTS: Final = 1
_STEPS: Final = 4


class ImageRun(Run):
    """One image job. `estimated_cost` in points, by the simulator's own price table."""

    kind: Literal["image"] = "image"
    template_id: str
    prompt: str
    resolution: Resolution
    seed: str
    images: int = 1
    estimated_cost: int
    actual_cost: int | None = None
    result_urls: list[str] = []

    def standing(self) -> tuple[str, str | None]:
        if self.has_finished:
            return JobStatus.DELIVERY.value, None
        # A job that ended otherwise keeps the status it had.
        if self.has_begun:
            return JobStatus.PROCESSING.value, None
        return JobStatus.QUEUED.value, None

    def fields(
        self, at: float, forecast: Forecast, datetime_of: Callable[[float], datetime], speed: float
    ) -> dict[str, Any]:
        next_at = {"waiting": forecast.starts, "working": forecast.ends}.get(self.phase)
        return {
            "job_id": self.run_id,
            "job_status": self.standing()[0],
            "stage_progress": 100.0 if self.has_finished else self.progress(at, forecast),
            "next_eta": datetime_of(next_at).isoformat(timespec="milliseconds") if next_at is not None else None,
            "estimated_time": self.minutes_until(forecast.ends, speed),
            "gpu_slots": GPU_SLOTS,
            "queue_position": forecast.ahead if self.phase == "waiting" else None,
            "result_urls": self.result_urls,
            "error_details": self.shown_error(),
            "actual_cost": self.actual_cost,
        }

    def finish(self, at: datetime, folder: Path) -> None:
        self.actual_cost = self.estimated_cost
        self.result_urls = [f"{self.base_url}/results/{self.run_id}/{n}.png" for n in range(1, self.images + 1)]


def new_job(order: JobRequest, *, base_url: str, cost: int, work: float, seconds: float | None) -> ImageRun:
    """A job that has just been submitted. `seconds`: its whole length, instead of the priority's ETA."""
    if seconds is None:
        seconds = SCENES[Scene.IMAGE_GENERATE].eta_minutes[order.priority] * 60
    queued = seconds * QUEUED_SHARE
    return ImageRun(
        run_id=f"job-{uuid.uuid4().hex}",
        task_id=order.task_id,
        tenant_id=order.tenant_id,
        user_id=order.user_id,
        priority=TaskPriority(order.priority),
        callback_url=order.callback_url,
        base_url=base_url,
        pool=IMAGE_POOL,
        plan=[
            Segment(
                status=JobStatus.PROCESSING,
                seconds=(seconds - queued) / _STEPS,
                progress_from=100 * step / _STEPS,
                progress_to=100 * (step + 1) / _STEPS,
            )
            for step in range(_STEPS)
        ],
        queue_seconds=queued,
        counted_from=work,
        template_id=order.template_id,
        prompt=order.prompt,
        resolution=Resolution(order.resolution),
        seed=str(order.extras.get("seed", order.task_id)),
        images=order.images or 1,
        estimated_cost=cost,
    )
