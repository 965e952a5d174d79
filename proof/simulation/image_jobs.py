"""Image jobs (contract §2). How a job runs is drawn when it is created."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobAccepted, JobRequest, JobState, JobStatus
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode
from proof.simulation.comfyui_model import ComfyUIModel, Work, refused

ENDS: Final = (
    *("delivery",) * 12,
    *("preempted",) * 3,
    "out_of_memory",
    "internal_retryable",
    "forgotten",
    "stall",
    "delivery_before_urls",
)
_ERRORS: Final = {
    "preempted": ErrorDetails(code=FailureCode.GPU_PREEMPTED, message="preempted", retryable=True),
    "out_of_memory": ErrorDetails(code=FailureCode.GPU_OUT_OF_MEMORY, message="too large"),
    "internal_retryable": ErrorDetails(code=FailureCode.INTERNAL, message="hiccup", retryable=True),
}


class ImageJobs(ComfyUIModel[JobState]):
    """ComfyUI's image jobs. `price_of` gives the price of a request in points."""

    price_of: Callable[[JobRequest], int]

    def _made(self, post: Post[Any]) -> Answer[Any]:
        if self.terms.refuses_submits_with:
            return refused(self.terms.refuses_submits_with)
        job_id = f"job-{len(self.works) + 1}"
        state = JobState(job_id=job_id, job_status=JobStatus.QUEUED, estimated_time=self.terms.minutes)
        work = Work(state, post.body, self._timeline.now, post.key, price=self.price_of(post.body))
        self.works[job_id] = work
        self.live(work, self._plan(work))
        return Answer(
            reply=JobAccepted(job_id=job_id, estimated_time=self.terms.minutes, gpu_slots=1, estimated_cost=work.price)
        )

    def _unknown(self) -> Answer[Any]:
        return refused("job_not_found")

    def _plan(self, work: Work[JobState]) -> list[tuple[float, Callable[[], None]]]:
        rng = self._rng
        span = self.terms.minutes * 60 * rng.choice((0.0, 0.01, 0.3, 0.3, 1.0, 1.0, 1.0, 2.5, 4.0))
        steps = rng.choice((0, 1, 1, 2, 4))
        pause = span / (steps + 2)
        plan: list[tuple[float, Callable[[], None]]] = []
        if rng.random() < 0.4:
            plan.append((pause / 2, lambda: self.change(work, queue_position=1)))
        if rng.random() < 0.9:
            plan.append((pause, lambda: self.change(work, job_status=JobStatus.PROCESSING, stage_progress=0.0)))
            for step in range(steps):
                plan.append((pause, self._progress(work, 100.0 * (step + 1) / (steps + 1))))
        plan.extend(self._end(work, pause))
        return plan

    def _progress(self, work: Work[JobState], percent: float) -> Callable[[], None]:
        fields: dict[str, Any] = {"stage_progress": percent}
        if self._rng.random() < 0.2:
            fields["estimated_time"] = self.terms.minutes * self._rng.choice((0.5, 1.5, 3.0))
        if self._rng.random() < 0.2:
            fields["next_eta"] = datetime.fromtimestamp(self._timeline.now + self._rng.choice((0, 60, 3_000)), UTC)
        return lambda: self.change(work, **fields)

    def _end(self, work: Work[JobState], pause: float) -> list[tuple[float, Callable[[], None]]]:
        rng, end = self._rng, self._rng.choice(ENDS)
        if end == "stall":
            return []
        if end == "forgotten":
            return [(pause, lambda: self.forget(work))]
        if end in _ERRORS:
            return [(pause, lambda: self.change(work, error_details=_ERRORS[end]))]
        cost = rng.choice((None, None, work.price, work.price, work.price - 1, work.price + 5, 0))
        if rng.random() < 0.02:
            cost = -3
        delivery = {
            "job_status": JobStatus.DELIVERY,
            "stage_progress": 100.0,
            "result_urls": [f"https://results.example/{work.state.job_id}.png"],
            "actual_cost": cost,
        }
        changes: list[tuple[float, Callable[[], None]]] = [(pause, lambda: self.change(work, **delivery))]
        if end == "delivery_before_urls":
            changes.insert(0, (pause, lambda: self.change(work, job_status=JobStatus.DELIVERY, stage_progress=90.0)))
        return changes
